"""Rows are padded so that every rank's matrix products take as many tokens as fp8 wants."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_mergemix.megatron.passes import _length_step


def config(tensor: int = 1, sequence: bool = False, **precision: str) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_model_parallel_size=tensor, sequence_parallel=sequence, **precision
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 48])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (8, False), (2, True), (8, True)])
@pytest.mark.parametrize(("recipe", "multiple"), [("mxfp8", 32), ("delayed", 16)])
def test_the_tokens_of_a_rank_are_a_multiple_of_what_the_recipe_wants(
    rows: int, tensor: int, sequence: bool, recipe: str, multiple: int
) -> None:
    step = _length_step(config(tensor, sequence, fp8="hybrid", fp8_recipe=recipe), rows)
    cut = tensor if sequence else 1
    fitting = [
        length
        for length in range(1, step + 1)
        if length % cut == 0 and rows * length // cut % multiple == 0
    ]
    assert fitting == [step], "the least length that does"


def test_without_fp8_only_sequence_parallelism_wants_something_of_a_length() -> None:
    assert _length_step(config(8), 3) == 1
    assert _length_step(config(8, sequence=True), 3) == 8
    assert _length_step(config(8, sequence=True, fp8="", fp4=""), 16) == 8


def test_fp4_wants_more() -> None:
    assert _length_step(config(fp4="e2m1", fp4_recipe="nvfp4"), 1) in (32, 128)  # by version
