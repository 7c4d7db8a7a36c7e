"""The diagnosis job: expand every loss around the base, along the task vectors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_mergemix.config import Config
from megatron_mergemix.diagnosis.record import (
    diagnosed_losses,
    diagnosis_digests,
    merges_to_check,
    on_record,
    publish_measured,
    source_of,
)
from megatron_mergemix.errors import DataError, EvaluationError
from megatron_mergemix.evaluate.windows import loss_windows
from megatron_mergemix.experiment.checks import check_checkpoints
from megatron_mergemix.megatron.curvature import curvature
from megatron_mergemix.megatron.gradient import check_differentiable
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.megatron.pass_memory import scoring_bytes
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.model_facts import model_facts, vocab_size
from megatron_mergemix.processes.distributed import from_rank_0, rank, together
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.training_runs.mixtures import component_matrix


def diagnose(config: Config) -> None:
    """Collective: measure with the built-in model what is not on record."""
    assert config.model is not None, "checked when the YAML was loaded"
    chunks = build_model(config, vocab_size(config), seed=0)
    diagnose_on(config, chunks, config.model.padded_vocab(vocab_size(config)))


def diagnose_on(config: Config, chunks: Sequence[torch.nn.Module], vocab_rows: int) -> None:
    """Collective: measure with a given model what is not on record.

    Args:
        config: the experiment.
        chunks: this rank's model chunks; their weights are replaced.
        vocab_rows: of the model's embedding, padding included.

    Raises:
        ConfigError: the model is in a mode without a right backward pass.
        DataError: data were made with another tokenizer.
        EvaluationError: a loss is not finite.
    """
    with together():
        if rank() == 0:
            check_checkpoints(config)
        check_differentiable(chunks, "mergemix diagnose", "Change the launch.")
        windows = _windows(config, vocab_rows)
    experts = expert_checkpoints(config)
    batch, length = config.evaluate.micro_batch_size, model_facts(config).seq_length
    proxy = ResidentProxy(
        chunks,
        base_checkpoint(config),
        experts,
        config.search.resident,
        wanted=scoring_bytes(chunks, batch, length, differentiates=True),
    )
    sizes = proxy.update_sizes()
    record: dict[str, Any] = from_rank_0(lambda: on_record(config) or _begun(config, proxy, sizes))
    merges = merges_to_check(component_matrix(config), list(experts))
    for name, tokens in windows.items():
        if name in record["losses"]:
            continue
        started = time.monotonic()
        measured = {"source": source_of(config, name), **_measured(config, proxy, tokens, merges)}
        with together():
            _check_finite(name, measured)
            record["losses"][name] = measured
            if rank() == 0:
                publish_measured(config, record)
                seconds = time.monotonic() - started
                print(f"diagnose: loss of {name}: {seconds:.1f} s", flush=True)


def _windows(config: Config, vocab_rows: int) -> dict[str, torch.Tensor]:
    """Return the windows of every loss, int64 ``[N, S + 1]``."""
    found = {}
    for name, task in diagnosed_losses(config).items():
        tokens = torch.from_numpy(loss_windows(task, model_facts(config).seq_length).tokens)
        if int(tokens.max()) >= vocab_rows:
            raise DataError(
                f"token {int(tokens.max())} in {', '.join(task.prefixes)} is outside the model's "
                f"vocabulary of {vocab_rows} rows; the dataset was made with another tokenizer."
            )
        found[name] = tokens
    return found


def _begun(config: Config, proxy: ResidentProxy, update_sizes: Sequence[float]) -> dict[str, Any]:
    """Return a record without any loss."""
    return {
        "products": proxy.task_vector_products.tolist(),
        "base_norm": proxy.base_norm,
        "delta": list(update_sizes),
        "losses": {},
        "digests": diagnosis_digests(config),
    }


def _measured(
    config: Config,
    proxy: ResidentProxy,
    tokens: torch.Tensor,
    merges: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """Collective: return the expansion of a loss, and the loss itself at some merges."""
    count, length = len(tokens), tokens.shape[1] - 1
    weights = torch.full((count,), 1 / (count * length), dtype=torch.float64)
    batch = config.evaluate.micro_batch_size
    found = curvature(proxy, tokens, weights, batch)
    losses = []
    for alpha in merges:
        proxy.apply(alpha)
        losses.append(float(weights @ proxy.sequence_losses(tokens, batch)))
    return {
        "windows": count,
        **{n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in vars(found).items()},
        "merges": {"alpha": [list(alpha.values()) for alpha in merges], "losses": losses},
    }


def _check_finite(name: str, measured: Mapping[str, Any]) -> None:
    numbers = [measured[key] for key in ("loss", "first_order", "second_order", "lengths")]
    numbers.append(measured["merges"]["losses"])
    if not all(bool(np.isfinite(each).all()) for each in numbers):
        raise EvaluationError(
            f"the loss of {name}, or a derivative of it, is not finite at the base or at an "
            "expert. Training went wrong; use earlier saves or train again."
        )
