"""Gradients of the held-out loss in the live weights, under any parallel layout.

The loss of ``base + sum_k alpha_k v_k`` has the derivative ``<dL/dweights, v_k>`` in a merge
weight: each rank sums over its own shards, and what is communicated in the end is one number per
expert. No gradient is ever reduced over ranks, since the inner product of a sum is the sum of the
inner products. What must be known instead is which ranks hold a part of a gradient, and which hold
the same one again; see :func:`counted_here`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.dist_checkpoint import model_state, sharded_tensors, unwrap
from megatron_mergemix.megatron.replicas import DataRanks, all_data_ranks
from megatron_mergemix.megatron.scoring import gathered, micro_batches, rows_of_this_rank

_NOT_OURS = {
    "finalize_model_grads_func": None,
    "grad_scale_func": None,
    "no_sync_func": None,
    "grad_sync_func": None,
    "param_sync_func": None,
    # Its schedule wants another kind of forward step.
    "overlap_moe_expert_parallel_comm": False,
    # Some releases of TransformerEngine take the weights of tokens in another order.
    "cross_entropy_loss_fusion": False,
    # Megatron adds the gradient of multi-token prediction in eval mode, too.
    "mtp_loss_scaling_factor": 0.0,
}
"""What training sets in the configuration of a model, and what is neutral here."""


def check_differentiable(
    chunks: Sequence[torch.nn.Module],
    asker: str = "search.strategy: gradient",
    remedy: str = "Change the launch, or use another search.strategy.",
) -> None:
    """Check that a backward pass through these chunks gives the gradient of the loss.

    Args:
        chunks: this rank's model chunks.
        asker: what wants the gradient; begins the message.
        remedy: what else may be done; ends it.

    Raises:
        ConfigError: the model is in a mode that leaves gradients out, or makes them vanish.
    """
    problems = [problem for chunk in chunks for problem in _problems(chunk)]
    if problems:
        raise ConfigError(
            f"{asker} cannot differentiate this model: {' '.join(dict.fromkeys(problems))} {remedy}"
        )


def _problems(chunk: torch.nn.Module) -> Iterator[str]:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.utils import get_model_config

    module, config = unwrap(chunk), get_model_config(chunk)
    if not hasattr(module, "sharded_state_dict"):
        known = f"{DistributedDataParallel.__name__} and {Float16Module.__name__}"
        yield f"it is wrapped in {type(module).__name__}; only {known} are known."
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"{len(frozen)} parameters are frozen ({frozen[0]})."
    if getattr(config, "fp16", False):
        yield "in fp16 small gradients vanish; use bf16 or fp32."
    if getattr(config, "delay_wgrad_compute", False):
        yield "--delay-wgrad-compute leaves gradients of weights to the training loop."
    graphs = getattr(config, "cuda_graph_impl", "none") not in ("none", None)
    if graphs or getattr(config, "enable_cuda_graph", False):
        yield "captured CUDA graphs have no backward pass in eval mode."
    is_moe = getattr(config, "num_moe_experts", None) is not None
    if is_moe and config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        yield "MoE under tensor parallelism needs --sequence-parallel for training, and so here."


def counted_here(chunks: Sequence[torch.nn.Module]) -> set[int]:
    """Return addresses of the parameters whose gradients count on this rank.

    Summed over all ranks, their inner products with a vector are those of the whole gradient.

    - Every data-parallel rank has rows of its own, MoE experts get tokens of all ranks they serve,
      and the two copies of a tied embedding see inputs and outputs: parts, all of which count.
    - Shards of tensor and expert parallelism are different parameters: all count.
    - A parameter that tensor-parallel ranks hold again gets the same gradient on each of them,
      since what comes after reduces the gradients of its inputs: it counts on the first alone.
    - Unless each of these ranks sees a part only, of the sequence (sequence parallelism) or of the
      heads (normalised queries and keys): then all count. Megatron sums the same gradients in
      ``finalize_model_grads``.
    """
    counted = {
        tensor.data.data_ptr()
        for tensor in sharded_tensors(model_state(chunks))
        if isinstance(tensor.data, torch.Tensor) and _is_first_of_tensor_ranks(tensor.replica_id)
    }
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if is_part_on_tensor_ranks(name, parameter, chunk):
                counted.add(parameter.data_ptr())
    return counted


def _is_first_of_tensor_ranks(replica_id: Any) -> bool:
    """Read Megatron's number of a replica: over pipeline, tensor and data-parallel ranks."""
    assert isinstance(replica_id, tuple), f"a replica is numbered {replica_id}, expected a tuple"
    assert len(replica_id) == 3, f"a replica is numbered {replica_id}, expected three numbers"
    return bool(replica_id[1] == 0)


def is_part_on_tensor_ranks(name: str, parameter: torch.nn.Parameter, chunk: Any) -> bool:
    """Return whether tensor-parallel ranks hold parts of the gradient of a parameter they share."""
    from megatron.core.utils import get_model_config

    config = get_model_config(chunk)
    if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    # Latent attention normalises what all tensor-parallel ranks share, not heads.
    of_heads = getattr(config, "qk_layernorm", False) and not getattr(
        config, "multi_latent_attention", False
    )
    return of_heads and ("q_layernorm" in name or "k_layernorm" in name)


@contextmanager
def main_gradients(chunks: Sequence[torch.nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Give every parameter a ``main_grad`` of zeros for the block, and leave no gradient behind.

    Backward passes inside the block add to it. Chunks in Megatron's DDP have such buffers; others
    get fp32 ones, which cost 4 bytes per parameter of this rank while the block lasts.

    Yields:
        The address of a parameter -> its gradient, of the parameter's shape.
    """
    from megatron.core.distributed import DistributedDataParallel

    with ExitStack() as stack:
        for chunk in chunks:
            if isinstance(chunk, DistributedDataParallel):
                chunk.zero_grad_buffer()
                stack.callback(chunk.zero_grad_buffer)
                stack.enter_context(chunk.no_sync())
            else:
                stack.enter_context(_own_main_gradients(chunk))
        parameters: list[Any] = [p for chunk in chunks for p in chunk.parameters()]
        gradients = {parameter.data_ptr(): parameter.main_grad for parameter in parameters}
        stack.callback(gradients.clear)  # whoever still holds them must not hold their memory
        yield gradients


@contextmanager
def _own_main_gradients(chunk: torch.nn.Module) -> Iterator[None]:
    """Accumulate in fp32 as Megatron's DDP does; fused layers add to ``main_grad`` themselves."""
    parameters: list[Any] = list(chunk.parameters())
    hooks = []
    for parameter in parameters:
        parameter.grad = None
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        parameter.grad_added_to_main_grad = False
        hooks.append(parameter.register_post_accumulate_grad_hook(_add_to_main_gradient))
    try:
        yield
    finally:
        for parameter, hook in zip(parameters, hooks, strict=True):
            hook.remove()
            parameter.grad = None
            del parameter.main_grad, parameter.grad_added_to_main_grad


def _add_to_main_gradient(parameter: Any) -> None:
    # What a fused layer leaves in ``grad`` has no meaning, but where it was asked for zeros.
    fused = parameter.grad_added_to_main_grad and not getattr(parameter, "zero_out_wgrad", False)
    if parameter.grad is not None and not fused:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def backward(
    chunks: Sequence[torch.nn.Module],
    sequences: torch.Tensor,
    weights: torch.Tensor,
    micro_batch_size: int,
    data_ranks: DataRanks | None = None,
) -> torch.Tensor:
    """Add this rank's part of the gradient of ``sum_n weights[n] * loss_n`` to every ``main_grad``.

    Collective, inside :func:`main_gradients`. The model is in eval mode, as when it is scored:
    no dropout, and no auxiliary loss of an MoE router.

    Args:
        chunks: this rank's model chunks.
        sequences: int64 ``[N, S + 1]`` on the CPU, the same on every rank; token 0 is context.
        weights: float64 ``[N]``, the same on every rank.
        micro_batch_size: sequences per pass.
        data_ranks: the data-parallel ranks that share these sequences; None for all.

    Returns:
        The summed negative log-likelihood of each sequence in nats, float64 ``[N]`` on the CPU,
        the same on every rank.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data_ranks = data_ranks or all_data_ranks()
    mine, num_microbatches = rows_of_this_rank(
        len(sequences), micro_batch_size, len(chunks), data_ranks
    )
    is_padding = data_ranks.own * len(mine) + torch.arange(len(mine)) >= len(sequences)
    # The schedule divides by the number of micro-batches, to average over them.
    own_weights = num_microbatches * weights.double()[mine].masked_fill(is_padding, 0.0)
    batches = [_weighted(sequences[mine], own_weights, micro_batch_size) for _ in chunks]
    with _as_scored(chunks), torch.enable_grad():
        collected = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks),
            num_microbatches=num_microbatches,
            seq_length=sequences.shape[1] - 1,
            micro_batch_size=micro_batch_size,
            forward_only=False,
        )
    local = torch.zeros(len(mine), dtype=torch.float64, device=device())
    if parallel_state.is_pipeline_last_stage():
        local = torch.cat(collected)
    return gathered(local, data_ranks).cpu()[: len(sequences)]


def _weighted(
    sequences: torch.Tensor, weights: torch.Tensor, micro_batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    batches = micro_batches(sequences, micro_batch_size)
    for batch, mine in zip(batches, weights.split(micro_batch_size), strict=True):
        yield {**batch, "weights": mine.to(device())}


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], chunk: torch.nn.Module) -> Any:
    batch = next(batches)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def weighted(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        summed = losses.double().sum(dim=1)
        return (summed * batch["weights"]).sum(), summed.detach()

    return output, weighted


def _is_fused_attention(module: torch.nn.Module) -> bool:
    """Return whether a module is TransformerEngine's attention, which need not be installed."""
    return any(
        kind.__name__ == "DotProductAttention" and kind.__module__.startswith("transformer_engine")
        for kind in type(module).__mro__
    )


@contextmanager
def _as_scored(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put the chunks into eval mode with nothing of training left, and back as they were."""
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.utils import get_model_config

    modules = [module for chunk in chunks for module in chunk.modules()]
    modes = [module.training for module in modules]
    # Routers with biases count tokens whenever gradients are on.
    buffers = [(b, b.clone()) for chunk in chunks for b in unwrap(chunk).buffers()]
    configs: dict[int, Any] = {id(c): c for c in map(get_model_config, chunks)}
    before = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name in _NOT_OURS
        if hasattr(config, name)
    ]
    for chunk in chunks:
        chunk.eval()
    for module in modules:
        if isinstance(module, TransformerBlock):
            # To the block itself the mode says only whether it may recompute activations, where
            # the launch asks for it; its layers stay in eval mode.
            module.training = True
        if _is_fused_attention(module) and not getattr(module, "attention_dropout", 0.0):
            # In eval mode it may take a kernel that has no backward pass.
            module.training = True
    for config, name, _ in before:
        setattr(config, name, _NOT_OURS[name])
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
