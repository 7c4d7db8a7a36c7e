"""The resident proxy: base and experts as flat shards on every rank, merged into a live model.

Nothing is communicated when a candidate is applied: each rank merges its own shard of the
parameters, in place, under whatever layout the model has.
"""

from __future__ import annotations

import math
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.evaluate.continuations import Continuations, Prompt
from megatron_mergemix.evaluate.proxy import MergedFrom
from megatron_mergemix.megatron.continuations import continuation_log_probs
from megatron_mergemix.megatron.dist_checkpoint import (
    load_model,
    model_state,
    sharded_tensors,
    unwrap,
)
from megatron_mergemix.megatron.generation import generate
from megatron_mergemix.megatron.gradient import (
    backward,
    check_differentiable,
    counted_here,
    main_gradients,
)
from megatron_mergemix.megatron.replicas import DataRanks, Replicas
from megatron_mergemix.megatron.scoring import sequence_losses, token_losses
from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.flat import FlatCopies, copy_bytes
from megatron_mergemix.merge.linear import base_weight, block_size
from megatron_mergemix.merge.placement import PLACES, Place, Room, choose_place, describe, room_on
from megatron_mergemix.processes.distributed import from_all, rank, together

_LEAST_COSINE = 0.5
"""Experts a short run away from their base have a weight cosine near 1; independently trained
models are near 0."""


class ResidentProxy:
    """A live Megatron model that becomes ``base + sum_k alpha_k (expert_k - base)`` on demand."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        base: Path,
        experts: Mapping[str, Path],
        resident: str = "auto",
        replicas: Replicas | None = None,
        wanted: int = 0,
    ):
        """Collective: read every checkpoint once, and leave the live model at the base.

        Args:
            chunks: this rank's model chunks; their parameters keep their storage for good.
            base: iteration folder of the base.
            experts: name -> iteration folder; the names are those of the merge weights.
            resident: where base and experts are held: ``auto`` or one of ``PLACES``.
            replicas: of the model; None where they need not be told apart.
            wanted: bytes of this rank's device that scoring will take.

        Raises:
            CheckpointError: a checkpoint does not fit, holds NaN or Inf, or is not an expert of
                this base.
            MergeMixError: the wished place, or the disk, is too small.
        """
        self._chunks = list(chunks)
        self._live = _mergeable_tensors(self._chunks)
        self._names = list(experts)
        self._base, self._experts = base, dict(experts)
        self._replicas = replicas
        by_triton = _by_triton(self._device.type)  # before anything is read for long
        self._copies = self._room_for(1 + len(experts), resident, wanted, by_triton)
        for number, (name, path) in enumerate([("base", base), *experts.items()]):
            load_model(path, self._chunks)
            with together():
                _check_finite(self._live, name, path)
            self._copies.keep(number)
        products, of_matrices = self._task_vector_products()
        self._check_relatives(base, experts, of_matrices)
        self._products, self._base_square = products[1:, 1:], products[0, 0].item()
        self.apply({})

    def _room_for(self, num: int, wish: str, wanted: int, by_triton: bool) -> FlatCopies:
        """Collective: return uninitialised copies in the place that suits every rank."""
        live = [tensor for _, tensor in self._live]
        needed = num * copy_bytes(live)
        beside = _ranks_on_this_machine()
        with together():
            room = room_on(self._device, beside, wanted)
            own = choose_place(wish, needed, room, self._device.type)
        place, fullest, least = _for_all_ranks(own, needed, room)
        folder = Path(tempfile.gettempdir())
        if rank() == 0:
            held = describe(place, fullest, least, self._device, folder)
            print(f"resident: base and {num - 1} experts: {held}", flush=True)
        with together():
            copies = FlatCopies(live, num, place, folder, by_triton)
        return copies  # noqa: RET504 - only once every rank has them

    @property
    def _device(self) -> torch.device:
        return self._live[0][1].device

    @property
    def _data_ranks(self) -> DataRanks | None:
        return self._replicas.data_ranks if self._replicas is not None else None

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """Return the live model chunks of this rank."""
        return self._chunks

    @property
    def names(self) -> list[str]:
        """Return the experts, in the order of everything that is by expert."""
        return self._names

    @property
    def task_vector_products(self) -> torch.Tensor:
        """Return ``<expert_i - base, expert_j - base>`` over the whole model, float64 [K, K]."""
        return self._products

    @property
    def base_norm(self) -> float:
        """Return the L2 norm of the base over the whole model."""
        return math.sqrt(self._base_square)

    @property
    def dtype(self) -> torch.dtype:
        """Return the least precise type of the live tensors, to which a merge is rounded."""
        return max((live.dtype for _, live in self._live), key=lambda d: torch.finfo(d).eps)

    def update_sizes(self) -> list[float]:
        """Collective: return ``sum |expert - base| / (sum |expert| + sum |base|)`` by expert.

        Source: DeMix (arXiv 2602.00747), delta.
        """
        sums = torch.zeros(2, 1 + len(self._names), dtype=torch.float64, device=self._device)
        for _, _, block in self._blocks(owned_here(self._chunks)):
            sums[0] += block.abs().sum(dim=1)
            block -= block[0].clone()
            sums[1] += block.abs().sum(dim=1)
        dist.all_reduce(sums)
        sizes, changes = sums.cpu()
        total = sizes[1:] + sizes[0]
        return torch.where(total > 0, changes[1:] / total, 0.0).tolist()

    def apply(self, merge_weights: Mapping[str, float]) -> float:
        """Merge in place; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.apply`."""
        alpha = [float(merge_weights.get(name, 0.0)) for name in self._names]
        unknown = set(merge_weights) - set(self._names)
        assert not unknown, f"merge weights of unknown experts {sorted(unknown)}"
        self._copies.write_sum([base_weight(alpha), *alpha])
        if self._device.type == "cuda":  # the merge is timed, and so is what comes after it
            torch.cuda.synchronize(self._device)
        self._alpha = alpha
        vector = torch.tensor(alpha, dtype=torch.float64)
        return math.sqrt(max(0.0, (vector @ self.task_vector_products @ vector).item()))

    def sequence_losses(self, sequences: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
        """Score; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.sequence_losses`."""
        return sequence_losses(self._chunks, sequences, micro_batch_size, self._data_ranks)

    def token_losses(self, sequences: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
        """Score; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.token_losses`."""
        return token_losses(self._chunks, sequences, micro_batch_size, self._data_ranks)

    def continuation_log_probs(
        self, continuations: Continuations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.continuation_log_probs`."""
        return continuation_log_probs(self._chunks, continuations, self._data_ranks)

    def generate(
        self,
        prompts: Sequence[Prompt],
        is_done: Callable[[int, Sequence[int]], bool],
        *,
        micro_batch_size: int,
        vocab_size: int,
    ) -> list[list[int]]:
        """Decode greedily; see :meth:`megatron_mergemix.evaluate.proxy.Proxy.generate`."""
        return generate(
            self._chunks, prompts, is_done, micro_batch_size, vocab_size, self._data_ranks
        )

    def loss_gradient(
        self, sequences: torch.Tensor, weights: torch.Tensor, micro_batch_size: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Differentiate; see :meth:`.evaluate.proxy.DifferentiableProxy.loss_gradient`.

        The gradient takes 4 bytes per parameter of this rank while it is summed, and the backward
        pass the activations of training, without its optimizer states.

        Raises:
            ConfigError: the model is in a mode without a right backward pass.
        """
        check_differentiable(self._chunks)
        with main_gradients(self._chunks) as gradients:
            losses = backward(self._chunks, sequences, weights, micro_batch_size, self._data_ranks)
            products = self.products_with(gradients)
        return losses, dict(zip(self._names, products.tolist(), strict=True))

    def products_with(self, gradients: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Collective: return ``<gradient, expert_k - base>`` over the whole model, float64 [K].

        Args:
            gradients: address of a live tensor -> this rank's part of its gradient. Buffers have
                none: they decide which MoE experts are taken, and nothing that could be derived.
        """
        products = torch.zeros(1 + len(self._names), dtype=torch.float64, device=self._device)
        for live, part, block in self._blocks(counted_here(self._chunks) & gradients.keys()):
            block[1:] -= block[0].clone()  # first, so that the base leaves no rounding behind
            products += block @ gradients[live.data_ptr()].reshape(-1)[part].double()
        dist.all_reduce(products)
        return products[1:].cpu()

    @property
    def replicas(self) -> Replicas | None:
        """Return the replicas that were told apart when this proxy was made."""
        return self._replicas

    @property
    def merged_from(self) -> MergedFrom:
        """Return the checkpoints; see :attr:`.evaluate.proxy.OnDisk.merged_from`."""
        weighed = zip(self._experts.items(), self._alpha, strict=True)
        return MergedFrom(self._base, {name: (path, alpha) for (name, path), alpha in weighed})

    def _blocks(self, counted: Set[int]) -> Iterator[tuple[torch.Tensor, slice, torch.Tensor]]:
        """Yield base and experts of the live tensors at these addresses, a part at a time.

        Yields:
            The live tensor, which part of it when it is flat, and that part of the base and of
            every expert on the device, float64 ``[1 + K, n]``.
        """
        size, device = 1 + len(self._names), self._device
        step = max(1, block_size(device) // size)  # float64 of all copies at once
        for index, (_, live) in enumerate(self._live):
            if live.data_ptr() not in counted:
                continue
            for part, piece in self._copies.pieces(index, step):
                block = piece.to(device).to(torch.float64).transpose(0, 1).reshape(size, -1)
                yield live, part, block

    def _task_vector_products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Collective: return inner products of (base, task vectors...), ``[K + 1, K + 1]``.

        Over all parameters, and over the matrices alone. Every parameter counts once, however
        many ranks hold a copy of it.
        """
        size = 1 + len(self._names)
        # On the device, so that no block waits for the one before it.
        products = torch.zeros(2, size, size, dtype=torch.float64, device=self._device)
        for live, _, block in self._blocks(owned_here(self._chunks)):
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


def _ranks_on_this_machine() -> int:
    """Collective: return how many ranks share this machine, and so its memory."""
    own = socket.gethostname()
    return from_all(own).count(own)


def _by_triton(device_type: str) -> bool:
    """Collective: return whether Triton merges, which it does on all ranks or on none.

    Rank 0 says what any rank lacks.
    """
    lacking = from_all(kernel.missing(device_type))
    slower = [f"rank {number}: {why}" for number, why in enumerate(lacking) if why is not None]
    if slower and rank() == 0:
        print(f"warning: {slower[0]}", flush=True)
    return device_type != "cpu" and not slower


def _for_all_ranks(own: Place, needed: int, room: Room) -> tuple[Place, int, Room]:
    """Collective: return the slowest place, the largest need and the least room of any rank."""
    places, needs, rooms = zip(*from_all((PLACES.index(own), needed, room)), strict=True)
    least = Room(min(r.device for r in rooms), min(r.host for r in rooms))
    return PLACES[max(places)], max(needs), least


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
            assert tensor.data_ptr() or not tensor.numel(), f"{name} has no memory of its own"
            seen.add(tensor.data_ptr())
            tensors.append((f"{number}.{name}" if len(chunks) > 1 else name, tensor.data))
    return tensors


def owned_here(chunks: Sequence[torch.nn.Module]) -> set[int]:
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
