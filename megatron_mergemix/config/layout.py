"""Rules of model shapes and parallel layouts, as Megatron Core enforces them later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_mergemix.config.problems import Problem

if TYPE_CHECKING:
    from megatron_mergemix.config import Config, Model, Parallel

BYTE_VOCAB = 257
"""Tokens of the byte tokenizer: 256 bytes and the end of a document."""


NEEDED = {
    "moe_top_k": "num_moe_experts",
    "moe_ffn_hidden_size": "num_moe_experts",
    "moe_aux_loss_coeff": "num_moe_experts",
    "rotary_base": "position_embedding: rope",
}
"""Setting of the model -> that without which it means nothing."""


def layout_problems(config: Config) -> Iterator[Problem]:
    """Yield what keeps this model from being cut over these ranks."""
    parallel, training = config.parallel, config.training
    inner = parallel.tensor * parallel.pipeline
    if parallel.processes % inner:
        yield Problem(
            ("parallel", "processes"),
            f"is {parallel.processes}, expected a multiple of {inner} "
            f"(tensor {parallel.tensor} x pipeline {parallel.pipeline})",
        )
    else:
        data = parallel.processes // inner
        if data % parallel.expert:
            yield Problem(
                ("parallel", "expert"),
                f"is {parallel.expert}, expected a divisor of the {data} data-parallel ranks",
            )
        share = training.micro_batch_size * data
        if config.launch.kind == "builtin" and training.global_batch_size % share:
            yield Problem(
                ("training", "global_batch_size"),
                f"is {training.global_batch_size}, expected a multiple of {share} "
                f"(micro_batch_size {training.micro_batch_size} x {data} data-parallel ranks)",
            )
    if config.model is not None:
        yield from _model_shape(config.model)
        yield from _needless(config.model)
        yield from _model_on_ranks(config.model, parallel)
        yield from _vocabulary_on_ranks(config, config.model)


def _model_shape(model: Model) -> Iterator[Problem]:
    heads = model.num_attention_heads
    if model.hidden_size % heads:
        yield Problem(
            ("model", "hidden_size"),
            f"is {model.hidden_size}, expected a multiple of num_attention_heads {heads}",
        )
    elif model.position_embedding == "rope" and (model.hidden_size // heads) % 2:
        yield Problem(
            ("model", "hidden_size"),
            f"gives heads of {model.hidden_size // heads} channels, expected an even number "
            "for rope",
        )
    groups = model.num_query_groups
    if groups is not None and heads % groups:
        yield Problem(
            ("model", "num_query_groups"),
            f"is {groups}, expected a divisor of num_attention_heads {heads}",
        )
    if model.num_moe_experts is not None and model.moe_top_k > model.num_moe_experts:
        yield Problem(
            ("model", "moe_top_k"),
            f"is {model.moe_top_k}, expected at most num_moe_experts {model.num_moe_experts}",
        )


def _needless(model: Model) -> Iterator[Problem]:
    """Find settings that would change nothing, but make experts be trained again."""
    because = {
        "num_moe_experts": model.num_moe_experts is None,
        "position_embedding: rope": model.position_embedding != "rope",
    }
    for key, needed in NEEDED.items():
        if because[needed] and getattr(model, key) != type(model).model_fields[key].default:
            yield Problem(("model", key), f"is given without {needed}; leave it away")


def _model_on_ranks(model: Model, parallel: Parallel) -> Iterator[Problem]:
    tensor = parallel.tensor
    divided = (
        ("num_attention_heads", model.num_attention_heads, "tensor"),
        ("ffn_hidden_size", model.ffn_width(), "tensor"),
        ("num_layers", model.num_layers, "pipeline"),
    )
    for name, value, axis in divided:
        ranks = getattr(parallel, axis)
        if value is not None and value % ranks:
            yield Problem(
                ("model", name), f"is {value}, expected a multiple of parallel.{axis} {ranks}"
            )
    groups = model.num_query_groups
    if groups is not None and groups % tensor and tensor % groups:
        yield Problem(
            ("model", "num_query_groups"),
            f"is {groups}, expected a multiple or a divisor of parallel.tensor {tensor}",
        )
    experts = model.num_moe_experts
    if experts is None and parallel.expert > 1:
        yield Problem(
            ("parallel", "expert"),
            f"is {parallel.expert}, but model.num_moe_experts is not set: a dense model has no "
            "MoE experts to spread",
        )
    if experts is not None and tensor > 1:
        yield Problem(
            ("parallel", "tensor"),
            f"is {tensor}, expected 1 with model.num_moe_experts: Megatron wants sequence "
            "parallelism for MoE layers cut over tensor-parallel ranks, which the built-in trainer "
            "does not have. Use parallel.expert instead",
        )
    if experts is not None and experts % parallel.expert:
        yield Problem(
            ("model", "num_moe_experts"),
            f"is {experts}, expected a multiple of parallel.expert {parallel.expert}",
        )


def _vocabulary_on_ranks(config: Config, model: Model) -> Iterator[Problem]:
    tensor, multiple = config.parallel.tensor, model.make_vocab_size_divisible_by
    size = model.vocab_size or (BYTE_VOCAB if config.tokenizer.kind == "byte" else None)
    rows = multiple if size is None else model.padded_vocab(size)
    if rows % tensor:
        yield Problem(
            ("model", "make_vocab_size_divisible_by"),
            f"is {multiple}, which pads the vocabulary to {'multiples of ' * (size is None)}{rows} "
            f"rows, expected a multiple of parallel.tensor {tensor}",
        )
