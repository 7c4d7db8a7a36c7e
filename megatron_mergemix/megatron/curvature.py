"""How the loss bends along the task vectors: Hessian-vector products through the sharded model.

Fused and flash kernels, and Megatron's own autograd functions, have no second derivative. But the
Hessian is needed in the K directions of the task vectors alone, so each product is a central
difference of the gradient,

    H tau = (g(base + h tau) - g(base - h tau)) / 2 h + O(h^2),

and both sides are affine merges, which the resident proxy writes in place. Two step sizes, ``h``
and ``h / 2``, are extrapolated to ``O(h^4)`` (Richardson), and what they disagree by is reported:
it shows rounding, and MoE tokens that change their experts between the sides.

The difference is summed up in the fp32 gradients themselves, so that it takes no more memory than
one gradient: backward passes are linear in the weights of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.gradient import (
    backward,
    is_part_on_tensor_ranks,
    main_gradients,
)
from megatron_mergemix.megatron.resident import ResidentProxy, owned_here
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.processes.distributed import together


@dataclass(frozen=True)
class Curvature:
    """One loss at the base, to second order along K task vectors ``tau``; float64, in nats.

    Attributes:
        loss: at the base.
        first_order: ``<gradient, tau_k>``, ``[K]``.
        second_order: ``tau_k^T H tau_l`` at ``[k, l]``, ``[K, K]``, as measured: symmetric but for
            errors.
        lengths: ``|H tau_l|`` over the whole model, ``[K]``.
        steps: the larger step ``h`` of every direction, ``[K]``.
        disagreements: of the columns from ``h`` and from ``h / 2``, relative, ``[K]``.
    """

    loss: float
    first_order: Array
    second_order: Array
    lengths: Array
    steps: Array
    disagreements: Array


def curvature(
    proxy: ResidentProxy, sequences: torch.Tensor, weights: torch.Tensor, micro_batch_size: int
) -> Curvature:
    """Expand ``sum_n weights[n] * loss_n`` around the base, and leave the live model there.

    Collective: ``1 + 4 K`` backward passes over the sequences.

    Args:
        proxy: base and experts, resident.
        sequences: int64 ``[N, S + 1]`` on the CPU, the same on every rank; token 0 is context.
        weights: float64 ``[N]``, the same on every rank.
        micro_batch_size: sequences per pass.

    Raises:
        ConfigError: gradients are summed in less than fp32, where a difference of two is noise.
    """
    proxy.apply({})
    with main_gradients(proxy.chunks) as gradients:
        with together():
            _check_precise(gradients)
        losses = backward(proxy.chunks, sequences, weights, micro_batch_size)
        first_order = proxy.products_with(gradients).numpy()
    steps = step_sizes(proxy)
    products = [
        _hessian_product(proxy, name, step, sequences, weights, micro_batch_size)
        for name, step in steps.items()
    ]
    proxy.apply({})
    columns, lengths, disagreements = zip(*products, strict=True)
    return Curvature(
        loss=float(weights @ losses),
        first_order=first_order,
        second_order=np.stack(columns, axis=1),
        lengths=np.array(lengths),
        steps=np.array(list(steps.values())),
        disagreements=np.array(disagreements),
    )


def step_sizes(proxy: ResidentProxy) -> dict[str, float]:
    """Return the step of the difference along every task vector, in merge weights.

    It moves the model by the cube root of the rounding unit of its weights, relative to their
    norm: that balances the two errors of a central difference, rounding over ``h`` and a truncated
    ``h^2`` (Press et al., Numerical Recipes, section 5.7). That is 0.4 % in fp32 and 16 % in
    bf16; no step goes farther than the expert itself.
    """
    norms = torch.sqrt(torch.diagonal(proxy.task_vector_products)).tolist()
    relative = (torch.finfo(proxy.dtype).eps / 2) ** (1 / 3)
    return {
        name: min(1.0, relative * proxy.base_norm / norm) if norm > 0 else 1.0
        for name, norm in zip(proxy.names, norms, strict=True)
    }


def _hessian_product(
    proxy: ResidentProxy,
    name: str,
    step: float,
    sequences: torch.Tensor,
    weights: torch.Tensor,
    micro_batch_size: int,
) -> tuple[Array, float, float]:
    """Collective: return ``tau_k^T H tau`` by k, ``|H tau|``, and how much two steps disagree."""
    with main_gradients(proxy.chunks) as gradients:

        def add(part: float, step: float) -> None:
            """Add a part of the central difference to the gradients."""
            for side in (step, -step):
                proxy.apply({name: side})
                scaled = part / (2 * side) * weights
                backward(proxy.chunks, sequences, scaled, micro_batch_size)

        add(4 / 3, step / 2)
        of_half = 3 / 4 * proxy.products_with(gradients)
        add(-1 / 3, step)
        column = proxy.products_with(gradients)
        length = whole_norm(proxy.chunks, gradients)
    of_whole = 4 * of_half - 3 * column
    size = torch.linalg.vector_norm(column).item()
    disagreement = torch.linalg.vector_norm(of_whole - of_half).item()
    return column.numpy(), length, disagreement / size if size > 0 else 0.0


def whole_norm(chunks: Sequence[torch.nn.Module], gradients: Mapping[int, torch.Tensor]) -> float:
    """Return the L2 norm of the whole gradient; afterwards parts of it are summed in place.

    Collective, on all ranks. Ranks that hold parts of one gradient (see
    :func:`.gradient.counted_here`) sum them, as ``finalize_model_grads`` does after training
    steps; then every parameter counts once.
    """
    _sum_tied_embeddings(chunks, gradients)
    owned = owned_here(chunks)
    total = torch.zeros((), dtype=torch.float64, device=next(iter(gradients.values())).device)
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            gradient = gradients[parameter.data_ptr()]
            for group in _groups_with_parts(name, parameter, chunk):
                dist.all_reduce(gradient, group=group)
            if parameter.data_ptr() in owned:
                total += gradient.double().square().sum()
    dist.all_reduce(total)
    return total.sqrt().item()


def _groups_with_parts(name: str, parameter: Any, chunk: Any) -> Iterator[Any]:
    """Yield the process groups whose ranks hold different parts of one parameter's gradient."""
    from megatron.core import parallel_state

    if ".experts." in name:  # MoE experts get tokens of all ranks that they serve
        yield parallel_state.get_expert_data_parallel_group()
        return
    yield parallel_state.get_data_parallel_group()
    if is_part_on_tensor_ranks(name, parameter, chunk):
        yield parallel_state.get_tensor_model_parallel_group()


def _sum_tied_embeddings(
    chunks: Sequence[torch.nn.Module], gradients: Mapping[int, torch.Tensor]
) -> None:
    """Collective: add up what the first and the last pipeline stage have of one matrix."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return
    if not parallel_state.is_rank_in_embedding_group():
        return
    for chunk in chunks:
        module: Any = unwrap(chunk)
        is_end = module.pre_process or module.post_process
        if is_end and module.share_embeddings_and_output_weights:
            shared = module.shared_embedding_or_output_weight()
            group = parallel_state.get_embedding_group()
            dist.all_reduce(gradients[shared.data_ptr()], group=group)


def _check_precise(gradients: Mapping[int, torch.Tensor]) -> None:
    found = {gradient.dtype for gradient in gradients.values()} - {torch.float32}
    if found:
        raise ConfigError(
            f"this launch sums gradients in {', '.join(map(str, found))}, expected fp32: curvature "
            "is a small difference of gradients. Add --accumulate-allreduce-grads-in-fp32."
        )
