from __future__ import annotations

import argparse

import pytest

from megatron_mergemix.megatron_lm.rewriting import Rewriting


def test_the_table_has_a_line_per_argument_that_changed() -> None:
    args = argparse.Namespace(
        lr=3e-4, seed=1, mock_data=True, data_path=None, train_samples=None, finetune=False
    )
    rewriting = Rewriting()
    rewriting.apply(args, lr=1e-2, seed=1, mock_data=False, data_path=["0.5", "a", "0.5", "b"])
    rewriting.apply(args, train_samples=None, finetune=True)
    assert vars(args) == {
        "lr": 1e-2,
        "seed": 1,
        "mock_data": False,
        "data_path": ["0.5", "a", "0.5", "b"],
        "train_samples": None,
        "finetune": True,
    }
    assert rewriting.table().splitlines() == [
        "  --lr         0.0003 -> 0.01",
        "  --mock-data  True   -> -",
        "  --data-path  -      -> 0.5 a 0.5 b",
        "  --finetune   -      -> True",
    ]


def test_an_argument_that_this_megatron_lacks_may_only_be_unset() -> None:
    args = argparse.Namespace(lr=1.0)
    rewriting = Rewriting()
    rewriting.apply(args, phase_transition_iterations=None)
    assert vars(args) == {"lr": 1.0}
    with pytest.raises(AssertionError, match="has no argument load"):
        rewriting.apply(args, load="/base")


def test_a_second_parse_does_not_hide_what_the_user_gave() -> None:
    rewriting = Rewriting()
    for _ in range(3):
        rewriting.apply(argparse.Namespace(load="/mine"), load="/base")
    same = argparse.Namespace(load="/base")
    rewriting.apply(same, load="/base")
    assert rewriting.table() == "  --load  /mine -> /base"


def test_a_flag_is_shown_as_the_command_line_calls_it() -> None:
    rewriting = Rewriting()
    args = argparse.Namespace(microbatch_group_size_per_vp_stage=8)
    rewriting.apply(args, microbatch_group_size_per_vp_stage=None)
    assert rewriting.table() == "  --microbatch-group-size-per-virtual-pipeline-stage  8 -> -"


def test_long_values_are_cut() -> None:
    rewriting = Rewriting()
    rewriting.apply(argparse.Namespace(data_path=None), data_path=["0.5", "x" * 100])
    assert rewriting.table().endswith("x...")
    assert len(rewriting.table()) < 100
