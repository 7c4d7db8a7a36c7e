"""A patched Megatron-LM, without the launcher, does in every stage what the launcher does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mergemix.checkpoint.common_state import arguments, read_common
from megatron_mergemix.checkpoint.metadata import read_index
from tests.support.megatron_lm import each_checkout
from tests.support.plugin import PP2, STEPS, TP2, BigRun, Launches
from tests.support.weights import assert_same_weights

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def on_patched(launches: Launches, patched: Path) -> Launches:
    """The launcher's experiment, with one expert and the search made on a patched tree."""
    changes = {
        "run_dir": str(launches.home / "patched"),
        "references": {"as_math": launches.mixture_of("math")},
    }
    made = replace(
        launches.with_settings("patched", changes),
        checkout=patched,
        launcher="megatron_mergemix.megatron.cpu_mode",
    )
    done = made.stage("expert", *TP2, ranks=2, expert="math")
    assert done.returncode == 0, done.stdout
    for expert in ("code", "prose"):
        theirs, ours = (each.run_dir / "experts" / expert for each in (launches, made))
        shutil.copytree(theirs, ours, symlinks=True)
    done = made.stage("search", *PP2, ranks=2)
    assert done.returncode == 0, done.stdout
    return made


@each_checkout()
def test_it_trains_the_same_expert(
    checkout: Path, launches: Launches, on_patched: Launches
) -> None:
    ours, theirs = (
        each.run_dir / "experts" / "math" / "checkpoints" for each in (on_patched, launches)
    )
    assert_same_weights(ours / LAST, theirs / LAST)


@each_checkout()
def test_it_searches_to_the_same_blend(
    checkout: Path, launches: Launches, on_patched: Launches
) -> None:
    ours, theirs = on_patched.trials(), launches.trials()
    assert len(ours) >= 6
    assert [(t.mixture, t.scores) for t in ours] == [(t.mixture, t.scores) for t in theirs]
    for name in ("data_args.txt", "per_split_data_args.json"):
        files = [each.run_dir / "blend" / name for each in (on_patched, launches)]
        assert files[0].read_bytes() == files[1].read_bytes()


@each_checkout()
def test_it_trains_the_same_reference(
    checkout: Path, launches: Launches, on_patched: Launches
) -> None:
    done = on_patched.stage("reference", *TP2, "--mergemix-mixture", "as_math", ranks=2)
    assert done.returncode == 0, done.stdout
    ours = on_patched.run_dir / "references" / "as_math" / "checkpoints"
    # It has the mixture of that expert, hence it is the same run.
    assert_same_weights(ours / LAST, launches.run_dir / "experts" / "math" / "checkpoints" / LAST)


def arguments_of(run: BigRun, launches: Launches) -> dict[str, str]:
    """Return every argument that a training run was made with, places aside."""
    given = arguments(read_common(read_index(run.saves / LAST)))
    places = {str(launches.config): "YAML", str(launches.run_dir): "RUN_DIR", str(run.home): "HOME"}
    shown = {name: str(value) for name, value in given.items()}
    for place, word in places.items():
        shown = {name: value.replace(place, word) for name, value in shown.items()}
    return shown


@each_checkout()
def test_it_makes_the_same_training_run(
    checkout: Path, launches: Launches, on_patched: Launches, big_run: BigRun, tmp_path: Path
) -> None:
    run = BigRun(tmp_path)
    done = on_patched.stage("train", *run.words, ranks=2)
    assert done.returncode == 0, done.stdout
    ours = arguments_of(run, on_patched)
    assert ours == arguments_of(big_run, launches)
    assert ours["per_split_data_args_path"] == "RUN_DIR/blend/per_split_data_args.json"
    assert_same_weights(run.saves / LAST, big_run.saves / LAST)
