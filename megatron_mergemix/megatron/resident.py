"""The resident proxy: base and experts as flat shards on every rank, merged into a live model.

Nothing is read from disk and nothing is communicated when a candidate is applied: each rank
merges its own shard of the parameters, in place, under whatever layout the model has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.distributed import rank, together
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.megatron.dist_checkpoint import (
    load_model,
    model_state,
    sharded_tensors,
    unwrap,
)
from megatron_mergemix.megatron.scoring import sequence_losses
from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.linear import base_weight, block_size, weighted_sum_

_LEAST_COSINE = 0.5
"""Experts a short run away from their base have a weight cosine near 1; independently trained
models are near 0."""


class ResidentProxy:
    """A live Megatron model that becomes ``base + sum_k alpha_k (expert_k - base)`` on demand."""

    def __init__(self, chunks: Sequence[torch.nn.Module], base: Path, experts: Mapping[str, Path]):
        """Collective: read every checkpoint once, and leave the live model at the base.

        Args:
            chunks: this rank's model chunks; their parameters keep their storage for good.
            base: iteration folder of the base.
            experts: name -> iteration folder; the names are those of the merge weights.

        Raises:
            CheckpointError: a checkpoint does not fit, holds NaN or Inf, or is not an expert of
                this base.
        """
        self._chunks = list(chunks)
        self._live = _mergeable_tensors(self._chunks)
        self._names = list(experts)
        self._sources: list[list[torch.Tensor]] = []
        largest = max((tensor.numel() for _, tensor in self._live), default=1)
        device = self._live[0][1].device
        if device.type == "cpu" and kernel.library() is None and rank() == 0:
            print(f"warning: {kernel.MISSING}", flush=True)
        self._accumulator = torch.empty(
            min(block_size(device), largest), dtype=torch.float32, device=device
        )
        for name, path in [("base", base), *experts.items()]:  # a domain may be called base
            load_model(path, self._chunks)
            with together():
                _check_finite(self._live, name, path)
            self._sources.append([tensor.detach().clone().view(-1) for _, tensor in self._live])
        products, of_matrices = self._task_vector_products()
        self._check_relatives(base, experts, of_matrices)
        self._products = products[1:, 1:]
        self.apply({})

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """Return the live model chunks of this rank."""
        return self._chunks

    @property
    def task_vector_products(self) -> torch.Tensor:
        """Return ``<expert_i - base, expert_j - base>`` over the whole model, float64 [K, K]."""
        return self._products

    def apply(self, merge_weights: Mapping[str, float]) -> float:
        """Merge in place; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.apply`."""
        alpha = [float(merge_weights.get(name, 0.0)) for name in self._names]
        unknown = set(merge_weights) - set(self._names)
        assert not unknown, f"merge weights of unknown experts {sorted(unknown)}"
        weights = [base_weight(alpha), *alpha]
        with torch.no_grad():
            for index, (_, live) in enumerate(self._live):
                parts = [source[index] for source in self._sources]
                weighted_sum_(live.view(-1), parts, weights, self._accumulator)
        vector = torch.tensor(alpha, dtype=torch.float64)
        return math.sqrt(max(0.0, (vector @ self.task_vector_products @ vector).item()))

    def sequence_losses(self, sequences: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
        """Score; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.sequence_losses`."""
        return sequence_losses(self._chunks, sequences, micro_batch_size)

    def _task_vector_products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Collective: return inner products of (base, task vectors...), ``[K + 1, K + 1]``.

        Over all parameters, and over the matrices alone. Every parameter counts once, however
        many ranks hold a copy of it.
        """
        owned = _owned_here(self._chunks)
        size = len(self._sources)
        device = self._live[0][1].device
        # On the device, so that no block waits for the one before it.
        products = torch.zeros(2, size, size, dtype=torch.float64, device=device)
        step = max(1, block_size(device) // size)  # float64 copies of all sources at once
        for index, (_, live) in enumerate(self._live):
            if live.data_ptr() not in owned:
                continue
            for start in range(0, live.numel(), step):
                block = torch.stack(
                    [source[index][start : start + step].double() for source in self._sources]
                )
                block[1:] -= block[0].clone()
                products[0 if live.dim() > 1 else 1] += block @ block.T
        dist.all_reduce(products)
        matrices, vectors = products.cpu()
        return matrices + vectors, matrices

    def _check_relatives(
        self, base: Path, experts: Mapping[str, Path], products: torch.Tensor
    ) -> None:
        """Compare weights of matrices; gains of normalisations are near one in any model."""
        base_square = products[0, 0].item()
        for index, (name, path) in enumerate(experts.items(), start=1):
            along = products[0, index].item()
            square = base_square + 2 * along + products[index, index].item()
            cosine = (base_square + along) / math.sqrt(base_square * square)
            if cosine < _LEAST_COSINE:
                raise CheckpointError(
                    f"expert {name} ({path}) was not trained from the base ({base}): the cosine "
                    f"between their weights is {cosine:.3f}, expected above {_LEAST_COSINE}. "
                    "Merging models of different origin says nothing about data mixtures."
                )


def _mergeable_tensors(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.Tensor]]:
    """Return name and live tensor of all parameters and persistent float buffers, each once."""
    tensors: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()
    for number, chunk in enumerate(chunks):
        module = unwrap(chunk)
        persistent = set(module.state_dict(keep_vars=True))
        named: list[tuple[str, torch.Tensor]] = [*module.named_parameters()]
        named += [(n, b) for n, b in module.named_buffers() if n in persistent]
        for name, tensor in named:
            if not tensor.is_floating_point() or tensor.data_ptr() in seen:
                continue
            assert tensor.is_contiguous(), f"{name} is not contiguous"
            seen.add(tensor.data_ptr())
            tensors.append((f"{number}.{name}" if len(chunks) > 1 else name, tensor.data))
    return tensors


def _owned_here(chunks: Sequence[torch.nn.Module]) -> set[int]:
    """Return addresses of the tensors whose main replica is on this rank."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    owned: set[int] = set()
    tensor: Any
    for tensor in sharded_tensors(model_state(chunks)):
        if is_main_replica(tensor.replica_id) and tensor.data is not None:
            owned.add(tensor.data.data_ptr())
    return owned


def _check_finite(live: Sequence[tuple[str, torch.Tensor]], name: str, path: Path) -> None:
    for tensor_name, tensor in live:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{name} ({path}) holds {bad} NaN or Inf values in {tensor_name}. Its training "
                "went wrong; use an earlier save or train it again."
            )
