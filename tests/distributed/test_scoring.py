"""Scoring against a plain forward pass of the whole model, under data and pipeline parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.run_distributed import run_distributed

COUNTS = (1, 4, 5, 8, 11)
"""With two data ranks and micro-batches of 2: a rank without work, full and padded batches."""

MICRO_BATCH = 2


def score(config_path: Path) -> dict[str, Any]:
    """Score the trained base under both layouts of two ranks, and plainly without any schedule."""
    import torch
    from megatron.core import parallel_state

    from megatron_mergemix.config import load_config
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.scoring import sequence_losses
    from megatron_mergemix.model_facts import vocab_size
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint

    sequences = torch.randint(97, 123, (max(COUNTS), 33), generator=torch.manual_seed(0))
    found: dict[str, Any] = {}
    for name, pipeline in (("data", 1), ("pipeline", 2)):
        changes = ["parallel.tensor=1", f"parallel.pipeline={pipeline}"]
        config = load_config(config_path, changes)
        parallel.start(config.parallel)
        chunks = build_model(config, vocab_size(config), seed=5)
        load_model(base_checkpoint(config), chunks)
        if name == "data":  # every rank has the whole model
            found["plain"] = plain_losses(chunks[0], sequences)
            chunks[0].eval()
            sequence_losses(chunks, sequences, MICRO_BATCH)
            found["eval mode"] = chunks[0].training
            chunks[0].train()
        for count in COUNTS:
            losses = sequence_losses(chunks, sequences[:count], MICRO_BATCH)
            assert losses.dtype == torch.float64
            assert losses.device.type == "cpu"
            found[f"{name} {count}"] = losses.tolist()
        found[f"{name} whole"] = sequence_losses(chunks, sequences, len(sequences)).tolist()
        found[f"{name} training"] = chunks[0].training
        parallel_state.destroy_model_parallel()
    return found


def plain_losses(model: Any, sequences: Any) -> list[float]:
    """Return the summed loss of each sequence from logits, by torch's own cross entropy."""
    import torch

    losses = []
    positions = torch.arange(sequences.shape[1] - 1)[None]
    with torch.no_grad():
        for sequence in sequences:
            logits = model(sequence[None, :-1], positions, None).double()[0]
            losses.append(
                torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").item()
            )
    return losses


@pytest.fixture(scope="module")
def scored(trained_experiment: Path) -> list[dict[str, Any]]:
    return run_distributed(score, 2, trained_experiment)


@pytest.mark.parametrize("layout", ["data", "pipeline"])
@pytest.mark.parametrize("count", COUNTS)
def test_losses_are_those_of_a_plain_forward(scored, layout: str, count: int) -> None:
    expected = scored[0]["plain"][:count]
    assert len(set(expected)) == count, "sequences must be told apart"
    for found in scored:
        np.testing.assert_allclose(found[f"{layout} {count}"], expected, rtol=2e-6)


def test_every_rank_has_the_same_losses(scored) -> None:
    assert scored[0] == scored[1]


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_the_micro_batch_size_does_not_matter(scored, layout: str) -> None:
    np.testing.assert_allclose(scored[0][f"{layout} whole"], scored[0]["plain"], rtol=2e-6)


def test_the_model_keeps_its_mode(scored) -> None:
    for found in scored:
        assert found["eval mode"] is False
        assert found["data training"] is True
        assert found["pipeline training"] is True
