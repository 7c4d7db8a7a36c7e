"""How much memory a rank needs for training and for the search, from the settings alone.

Weights, gradients, optimizer states and resident copies are exact for the built-in trainer.
Activations are an estimate within about a factor of two: they count the tensors that a layer
keeps for its backward pass, without recomputation and without fused attention. Not counted are
the framework itself, communication buffers and fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mergemix.config import Config, Model, Parallel
from megatron_mergemix.plan.cost import layer_parameters, norm_parameters, position_parameters

GRADIENT_BYTES = 4
"""Megatron's gradient buffer is reduced in fp32 whatever the precision."""
ADAM_BYTES = 8
"""Two fp32 moments."""
MASTER_BYTES = 4
"""An fp32 copy of each bf16 parameter."""
LOSS_BYTES = 8
"""Per logit: its fp32 copy and its softmax."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the rank that needs the most while training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class SearchMemory:
    """Bytes on the rank that needs the most while searching.

    Attributes:
        live: the weights that candidates are merged into.
        base_and_experts: the copies beside them.
        activations: of a forward pass, and what is kept for a backward one.
        gradients: where the search differentiates.
        kv_cache: keys and values of texts and contexts, where tasks may keep them.
    """

    live: int
    base_and_experts: int
    activations: int
    gradients: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.live + self.base_and_experts + self.gradients + self.activations + self.kv_cache


def training_memory(config: Config, vocab_size: int) -> TrainingMemory:
    """Return what training needs on the pipeline stage that needs the most."""
    model, parallel = _model(config), config.parallel
    micro_batches = config.training.global_batch_size // (
        config.training.micro_batch_size * data_ranks(parallel)
    )
    return max(
        (
            _training_stage(config, model, vocab_size, stage, micro_batches)
            for stage in range(parallel.pipeline)
        ),
        key=lambda memory: memory.total,
    )


def search_memory(config: Config, vocab_size: int) -> SearchMemory:
    """Return what the search needs on the pipeline stage that needs the most.

    Every rank holds base and K experts as flat copies beside the live weights. The forward pass
    keeps one layer, or the logits, at a time. ``search.strategy: gradient`` needs fp32 gradients
    and the activations of training besides.
    """
    return search_bytes(
        _model(config),
        config.parallel,
        vocab_size,
        experts=len(config.expert_names),
        micro_batch_size=config.evaluate.micro_batch_size,
        differentiates=config.search.strategy == "gradient",
        keeps_keys=may_keep_keys(config),
    )


def may_keep_keys(config: Config) -> bool:
    """Return whether tasks may ask for texts, or for choices that share a context.

    Which of lm-eval's do is known by lm-eval alone.
    """
    return any(capability.lm_eval for capability in config.evaluate.capabilities.values())


def search_bytes(
    model: Model,
    parallel: Parallel,
    vocab_size: int,
    experts: int,
    micro_batch_size: int,
    differentiates: bool = False,
    keeps_keys: bool = False,
) -> SearchMemory:
    """Return what a search needs on the pipeline stage that needs the most.

    Args:
        model: what is merged.
        parallel: its layout.
        vocab_size: before padding.
        experts: held beside the base.
        micro_batch_size: windows per forward pass.
        differentiates: whether there are backward passes too.
        keeps_keys: whether keys and values may be kept, of texts as long as a window at most.
    """
    tokens, copies = micro_batch_size * model.seq_length, 1 + experts
    stages = []
    for stage in range(parallel.pipeline):
        parameters = sum(stage_parameters(model, parallel, vocab_size, stage))
        live = parameters * weight_bytes(model)
        if differentiates:
            kept = _kept_activations(model, parallel, vocab_size, stage, parallel.pipeline - stage)
        else:
            kept = layer_activation_bytes(model, parallel)
            if stage == parallel.pipeline - 1:
                kept = max(kept, logit_bytes(model, parallel, vocab_size))
        gradients = parameters * GRADIENT_BYTES if differentiates else 0
        at_once = 1 if parallel.pipeline == 1 else 2 * parallel.pipeline
        keys = at_once * tokens * kv_cache_bytes(model, parallel) if keeps_keys else 0
        stages.append(SearchMemory(live, copies * live, tokens * kept, gradients, keys))
    return max(stages, key=lambda memory: memory.total)


def data_ranks(parallel: Parallel) -> int:
    """Return the number of data-parallel ranks."""
    return parallel.processes // (parallel.tensor * parallel.pipeline)


def weight_bytes(model: Model) -> int:
    """Return the bytes of one parameter."""
    return 2 if model.precision == "bf16" else 4


def stage_parameters(
    model: Model, parallel: Parallel, vocab_size: int, stage: int
) -> tuple[int, int]:
    """Return the parameters of one rank of a pipeline stage: all but MoE experts, MoE experts.

    Tensor parallelism cuts projections, feed-forward layers and vocabulary rows; normalisations,
    router and positions are on every rank. Expert parallelism deals out the MoE experts, each
    of which tensor parallelism cuts too. Tied embeddings are on the first and the last stage.
    """
    layer, tensor = layer_parameters(model), parallel.tensor
    layers = model.num_layers // parallel.pipeline
    dense = layers * (
        _attention_on_rank(model, tensor) + layer.norms + layer.mlp // tensor + layer.router
    )
    moe = layers * (model.num_moe_experts or 0) // parallel.expert * layer.moe_expert // tensor
    table = model.padded_vocab(vocab_size) * model.hidden_size // tensor
    first, last = stage == 0, stage == parallel.pipeline - 1
    if first:
        dense += table + position_parameters(model)
    if last:
        dense += norm_parameters(model)
        if not (first and model.tie_embeddings):
            dense += table
    return dense, moe


def layer_activation_bytes(model: Model, parallel: Parallel) -> int:
    """Return the bytes per token that one layer keeps for its backward pass.

    The inputs of both normalisations and of both blocks, queries, keys, values, the attention
    weights of all heads before and after softmax, the attention output, and the feed-forward
    layer before and after its activation; a MoE layer adds the copies of tokens it sends around.
    """
    hidden, tensor = model.hidden_size, parallel.tensor
    heads = model.num_attention_heads
    attention = 2 * hidden + 2 * _key_value_on_rank(model, 1) + 2 * heads * model.seq_length
    width, copies = model.ffn_width(), 1
    if model.num_moe_experts is not None:
        width, copies = model.moe_ffn_hidden_size or width, model.moe_top_k
    feed_forward = copies * width * (3 if model.activation == "swiglu" else 2)
    sent = 2 * copies * hidden if model.num_moe_experts is not None else 0
    elements = 4 * hidden + sent + (attention + feed_forward) // tensor
    return elements * weight_bytes(model)


def kv_cache_bytes(model: Model, parallel: Parallel) -> int:
    """Return the bytes per token of the keys and values of one stage's layers.

    Decoding has as many micro-batches under way as there are stages, and each stage keeps its
    layers' part of all of them.
    """
    layers = model.num_layers // parallel.pipeline
    return layers * 2 * _key_value_on_rank(model, parallel.tensor) * weight_bytes(model)


def logit_bytes(model: Model, parallel: Parallel, vocab_size: int) -> int:
    """Return the bytes per token of the logits and the loss on the last stage."""
    rows = model.padded_vocab(vocab_size) // parallel.tensor
    return rows * (weight_bytes(model) + LOSS_BYTES)


def _training_stage(
    config: Config, model: Model, vocab_size: int, stage: int, micro_batches: int
) -> TrainingMemory:
    parallel, training = config.parallel, config.training
    dense, moe = stage_parameters(model, parallel, vocab_size, stage)
    state = ADAM_BYTES + (MASTER_BYTES if model.precision == "bf16" else 0)
    data = data_ranks(parallel) if parallel.distributed_optimizer else 1
    moe_data = max(data // parallel.expert, 1)
    tokens = training.micro_batch_size * model.seq_length
    # 1F1B: an early stage has started as many micro-batches as there are stages behind it.
    in_flight = min(parallel.pipeline - stage, micro_batches)
    kept = _kept_activations(model, parallel, vocab_size, stage, in_flight)
    return TrainingMemory(
        weights=(dense + moe) * weight_bytes(model),
        gradients=(dense + moe) * GRADIENT_BYTES,
        optimizer=-(-dense * state // data) - (-moe * state // moe_data),
        activations=tokens * kept,
    )


def _kept_activations(
    model: Model, parallel: Parallel, vocab_size: int, stage: int, in_flight: int
) -> int:
    """Return the bytes per token of a micro-batch that a stage keeps for its backward passes."""
    layers = model.num_layers // parallel.pipeline
    kept = in_flight * layers * layer_activation_bytes(model, parallel)
    if stage == parallel.pipeline - 1:
        kept += logit_bytes(model, parallel, vocab_size)
    return kept


def _attention_on_rank(model: Model, tensor: int) -> int:
    """Return a rank's share of the projections."""
    queries = model.hidden_size // tensor
    key_value = _key_value_on_rank(model, tensor)
    return model.hidden_size * (queries + 2 * key_value) + queries * model.hidden_size


def _key_value_on_rank(model: Model, tensor: int) -> int:
    """Return the width of a rank's keys, as of its values; with few groups each rank has one."""
    channels = model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return max(groups // tensor, 1) * channels


def _model(config: Config) -> Model:
    assert config.model is not None, "checked when the YAML was loaded"
    return config.model
