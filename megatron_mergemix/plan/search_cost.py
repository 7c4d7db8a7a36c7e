"""How long a candidate takes, and the search: bytes over bandwidth, operations over peak. No torch.

A merge reads the shards of the experts and writes the live one, as fast as the memory gives them
that holds them; where they are held is decided by the rule of the search itself. A forward pass
takes its matrix products at a share of the peak, and reads and writes its activations once.
``tools/bench_plan.py`` compares this with measured searches.

Not counted: starting the job and reading the checkpoints, once per search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mergemix.config import Model, Parallel
from megatron_mergemix.merge.placement import KEPT_FREE, PLACES, Place, Room, choose_place
from megatron_mergemix.plan.cost import (
    count_parameters,
    forward_flops,
    position_parameters,
    training_flops,
)
from megatron_mergemix.plan.hardware import Gpu
from megatron_mergemix.plan.memory import (
    data_ranks,
    layer_activation_bytes,
    logit_bytes,
    search_bytes,
)

RUNTIME_BYTES = 2e9
"""On the device before the first tensor: the CUDA context, the libraries, NCCL's buffers."""

HOUR = 3600.0


@dataclass(frozen=True)
class Efficiency:
    """Shares of what the data sheet promises that are reached.

    Attributes:
        matmul: of the peak FLOP/s, by the matrix products of a forward pass, with the gaps between
            kernels and the communication of tensor parallelism in it.
        training: of the peak FLOP/s, by ``6 N D`` over the whole time of a training step.
        merge: of the memory's bandwidth, by the sum of the copies.
        activations: of the memory's bandwidth, by what runs between matrix products.
        link: of the bandwidth between host and device.
    """

    matmul: float = 0.50
    training: float = 0.40
    merge: float = 0.70
    activations: float = 0.60
    link: float = 0.80


ON_GPUS = Efficiency()
"""Assumed, not measured by this project:

- ``matmul``: large bf16 products reach 0.6 to 0.75 of the dense peak on these GPUs; the rest is
  left for all-reduces that nothing overlaps and for short products of a shard.
- ``training``: Megatron-LM's README tells 41 % to 48 % for GPT models of 2B to 462B on H100.
- ``merge``: a copy within the device reaches about 0.9 of the data sheet, and the resident merge
  is held to 0.85 of a copy; 0.9 x 0.85 = 0.77, less what small tensors cost.
- ``activations``: softmax, normalisations and activation functions run in several passes where
  Transformer Engine does not fuse them.
- ``link``: pinned copies reach 25 of 32 GB/s on PCIe Gen4 and 52 of 64 on Gen5.
"""


@dataclass(frozen=True)
class Workload:
    """A search, and the training of its experts, as far as time depends on it.

    Attributes:
        model: what is merged and scored; ``seq_length`` is that of the windows.
        vocab_size: before padding.
        parallel: the layout; ``processes`` GPUs.
        experts: that are merged.
        models: that are scored in all.
        sequences: windows of one model's evaluation.
        micro_batch_size: windows per forward pass.
        resident: ``search.resident``.
        expert_tokens: training tokens of all experts together; 0 where they are given.
        differentiates: whether scores are differentiated too, which takes memory of training.
        keeps_keys: whether keys and values may be kept, of texts or of contexts that are shared.
    """

    model: Model
    vocab_size: int
    parallel: Parallel
    experts: int
    models: int
    sequences: int
    micro_batch_size: int
    resident: str
    expert_tokens: float
    differentiates: bool = False
    keeps_keys: bool = False

    @property
    def replicas(self) -> int:
        """Return how many whole models there are; ranks that share MoE experts are one."""
        return data_ranks(self.parallel) // self.parallel.expert


@dataclass(frozen=True)
class SearchCost:
    """What a search takes. Bytes are those of the fullest rank, seconds those of one replica.

    Attributes:
        parameters: of the model.
        experts: that are merged.
        gpus: of all replicas.
        tensor: ranks that share a layer.
        pipeline: stages.
        replicas: whole models.
        live: bytes of the live weights.
        copies: bytes of base and experts.
        place: where the copies lie.
        activations: bytes of a forward pass; with gradients and what is kept for a backward pass
            where there is one, and the keys and values of texts that are generated.
        fits: whether all that is on the device has room there.
        merge_seconds: of one candidate.
        evaluate_seconds: of one candidate, on as many replicas as share its windows.
        at_once: candidates that are scored at the same time: one per replica, or 1 where all
            replicas share the windows of one.
        candidate_seconds: from one candidate to the next, all replicas together.
        search_hours: of all models.
        experts_hours: of training all experts one after the other on all GPUs; None where they
            are given.
    """

    parameters: int
    experts: int
    gpus: int
    tensor: int
    pipeline: int
    replicas: int
    live: int
    copies: int
    place: Place
    activations: int
    fits: bool
    merge_seconds: float
    evaluate_seconds: float
    at_once: int
    candidate_seconds: float
    search_hours: float
    experts_hours: float | None


def search_cost(work: Workload, gpu: Gpu, efficiency: Efficiency = ON_GPUS) -> SearchCost:
    """Return what a search takes on these GPUs.

    Replicas score different candidates, or share the windows of one, whatever ends first. The
    first needs a strategy that asks for as many candidates at a time.

    Raises:
        MergeMixError: ``resident`` names a place that is too small.
    """
    memory = search_bytes(
        work.model,
        work.parallel,
        work.vocab_size,
        work.experts,
        work.micro_batch_size,
        work.differentiates,
        work.keeps_keys,
    )
    beside = memory.total - memory.base_and_experts
    place = choose_place(work.resident, memory.base_and_experts, room_of(gpu, beside), "cuda")
    on_device = RUNTIME_BYTES + (memory.total if place == "device" else beside)
    merge = merge_seconds(memory.live, work.experts, place, gpu, efficiency)
    # Ranks that share MoE experts are one replica, and each has windows of its own.
    alone = merge + evaluate_seconds(work, gpu, efficiency, work.parallel.expert)
    shared = merge + evaluate_seconds(work, gpu, efficiency, data_ranks(work.parallel))
    rounds = -(-work.models // work.replicas)
    apart = rounds * alone <= work.models * shared
    total = rounds * alone if apart else work.models * shared
    return SearchCost(
        parameters=count_parameters(work.model, work.vocab_size).total,
        experts=work.experts,
        gpus=work.parallel.processes,
        tensor=work.parallel.tensor,
        pipeline=work.parallel.pipeline,
        replicas=work.replicas,
        live=memory.live,
        copies=memory.base_and_experts,
        place=place,
        activations=memory.activations + memory.gradients + memory.kv_cache,
        fits=on_device <= gpu.memory,
        merge_seconds=merge,
        evaluate_seconds=(alone if apart else shared) - merge,
        at_once=work.replicas if apart else 1,
        candidate_seconds=total / work.models,
        search_hours=total / HOUR,
        experts_hours=_experts_hours(work, gpu, efficiency) if work.expert_tokens else None,
    )


def room_of(gpu: Gpu, taken: int) -> Room:
    """Return what a rank may fill with copies, as the search itself reckons it.

    Args:
        gpu: the hardware.
        taken: bytes of the live weights and of a pass, which the search measures before.
    """
    device = gpu.memory * (1 - KEPT_FREE) - RUNTIME_BYTES - taken
    return Room(int(max(0.0, device)), int(gpu.host_memory * (1 - KEPT_FREE)))


def merge_seconds(
    live: int, experts: int, place: Place, gpu: Gpu, efficiency: Efficiency = ON_GPUS
) -> float:
    """Return the seconds of one merge of all experts on one rank; nothing is communicated.

    The weights of a mixture sum to one, so that the base is not read. Copies that lie elsewhere
    come over the link, or from the disk, into a buffer beside the live weights first.

    Args:
        live: bytes of the live weights of the rank.
        experts: with a weight.
        place: where the copies lie.
        gpu: the hardware.
        efficiency: what is reached of it.
    """
    passing = 0 if place == "device" else experts * live
    seconds = ((experts + 1) * live + passing) / (efficiency.merge * gpu.bandwidth)
    if place == "host":
        seconds += passing / (efficiency.link * gpu.host_link)
    elif place == "file":
        seconds += passing / gpu.file_read
    return seconds


def evaluate_seconds(
    work: Workload, gpu: Gpu, efficiency: Efficiency = ON_GPUS, sharing: int = 1
) -> float:
    """Return the seconds of scoring one candidate, its windows dealt to so many data ranks.

    Micro-batches follow each other through the stages of the pipeline; the last one waits for as
    many as there are stages before it. Windows are padded to whole micro-batches.
    """
    model, parallel = work.model, work.parallel
    micro_batches = -(-work.sequences // (work.micro_batch_size * sharing))
    tokens = work.micro_batch_size * model.seq_length
    layers = model.num_layers / parallel.pipeline
    flops = forward_flops(_multiplied_parameters(model, work.vocab_size), tokens)
    flops += attention_flops(model, tokens)
    ranks = parallel.tensor * parallel.pipeline
    moved = 2 * tokens * layers * layer_activation_bytes(model, parallel)
    moved += 2 * tokens * logit_bytes(model, parallel, work.vocab_size) / parallel.pipeline
    stage = flops / (ranks * efficiency.matmul * gpu.peak(model.precision))
    stage += moved / (efficiency.activations * gpu.bandwidth)
    return (micro_batches + parallel.pipeline - 1) * stage


def attention_flops(model: Model, tokens: float) -> float:
    """Return the operations of queries with keys and of weights with values in a forward pass.

    Counted for whole rows of ``seq_length``, the masked half too, as kernels that are not fused
    multiply it.
    """
    return 4.0 * model.num_layers * model.hidden_size * model.seq_length * tokens


def _multiplied_parameters(model: Model, vocab_size: int) -> int:
    """Return the parameters that a token is multiplied with; rows of tables are looked up."""
    active = count_parameters(model, vocab_size).active - position_parameters(model)
    if not model.tie_embeddings:
        active -= model.padded_vocab(vocab_size) * model.hidden_size
    return active


def _experts_hours(work: Workload, gpu: Gpu, efficiency: Efficiency) -> float:
    active = count_parameters(work.model, work.vocab_size).active
    flops = training_flops(active, work.expert_tokens)
    rate = work.parallel.processes * efficiency.training * gpu.peak(work.model.precision)
    return flops / rate / HOUR


def sensible_layout(work: Workload, gpu: Gpu) -> Parallel | None:
    """Return the layout with the fewest ranks per replica that holds the copies on the device.

    Tensor parallelism up to eight ranks, which share a machine, before pipeline parallelism;
    ``work.parallel.processes`` GPUs in all. Where no layout holds them on the device, the copies of
    a machine are spread over its ranks: tensor parallelism of eight, or what the model takes. None
    where not even the live weights and a pass of the model have room in any layout.
    """
    model, gpus = work.model, work.parallel.processes
    groups = model.num_query_groups or model.num_attention_heads
    found: list[tuple[tuple[int, int, int], Parallel]] = []
    for tensor in (1, 2, 4, 8):
        for pipeline in range(1, model.num_layers + 1):
            if gpus % (tensor * pipeline) or groups % tensor or model.num_layers % pipeline:
                continue
            layout = Parallel(processes=gpus, tensor=tensor, pipeline=pipeline)
            cost = search_cost(replace(work, parallel=layout, resident="auto"), gpu)
            if cost.fits:
                ranks = tensor * pipeline if cost.place == "device" else -tensor
                found.append(((PLACES.index(cost.place), ranks, pipeline), layout))
    return min(found, key=lambda each: each[0])[1] if found else None
