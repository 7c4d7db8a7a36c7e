"""What a search takes on given GPUs: this experiment, and models of 8B and 70B. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_mergemix.config import Config, Model, Parallel
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.model_facts import is_known, model_facts, vocab_size
from megatron_mergemix.plan.hardware import Gpu
from megatron_mergemix.plan.memory import may_keep_keys
from megatron_mergemix.plan.search_cost import (
    ON_GPUS,
    Efficiency,
    SearchCost,
    Workload,
    search_cost,
    sensible_layout,
)

SCALE_GPUS = 64
"""Eight machines; of the models of ``SCALE`` where the number of GPUs is not given."""

SCALE_EXPERTS = (4, 16)

_LLAMA = {
    "num_query_groups": 8,
    "vocab_size": 128256,
    "activation": "swiglu",
    "normalization": "RMSNorm",
    "position_embedding": "rope",
    "rotary_base": 500000,
    "tie_embeddings": False,
    "precision": "bf16",
}
SCALE = {
    name: Model.model_validate(
        {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "ffn_hidden_size": ffn,
            **_LLAMA,
        }
    )
    for name, layers, hidden, heads, ffn in (
        ("8B", 32, 4096, 32, 14336),
        ("70B", 80, 8192, 64, 28672),
    )
}
"""The shapes of Llama 3 (arXiv 2407.21783, Table 3): 8.03B and 70.6B parameters."""


@dataclass(frozen=True)
class Hardware:
    """What a plan is asked to reckon with.

    Attributes:
        gpu: of every rank.
        gpus: how many; None: ``parallel.processes``, for the models of ``SCALE`` 64.
        scale: also reckon models of 8B and 70B.
    """

    gpu: Gpu
    gpus: int | None = None
    scale: bool = False


@dataclass(frozen=True)
class ScaleRow:
    """A model of ``SCALE`` with the candidates, windows and expert tokens of this experiment.

    Attributes:
        model: its name.
        experts: that are merged.
        gpus: in all.
        cost: of the search; None where the model does not fit on the GPUs in any layout.
    """

    model: str
    experts: int
    gpus: int
    cost: SearchCost | None


@dataclass(frozen=True)
class Outlook:
    """What searches take on some hardware.

    Attributes:
        gpu: of every rank.
        efficiency: what is assumed to be reached of it.
        windows: of one candidate's evaluation.
        seq_length: tokens of a window.
        models: that are scored.
        expert_tokens: of one expert.
        own: this experiment; None where a launch brings its model and layout.
        scale: models of 8B and 70B; empty unless asked for.
    """

    gpu: Gpu
    efficiency: Efficiency
    windows: int
    seq_length: int
    models: int
    expert_tokens: float
    own: SearchCost | None
    scale: tuple[ScaleRow, ...]


def make_outlook(
    config: Config, hardware: Hardware, *, models: int, windows: int, trained_tokens: float
) -> Outlook:
    """Return what the search of this experiment, and of larger ones, takes.

    Args:
        config: the experiment.
        hardware: what it would run on.
        models: that are scored in all.
        windows: of one model's evaluation.
        trained_tokens: of all experts together; 0 where they are given.

    Raises:
        ConfigError: neither this experiment nor a larger one can be reckoned, or its layout does
            not fit on so many GPUs.
        MergeMixError: ``search.resident`` names a place that is too small.
    """
    if not is_known(config):
        raise ConfigError(
            "--gpu: the windows that are scored have the sequence length of your launch, which is "
            "not known before its first start. Run the expert stage first."
        )
    if config.model is None and not hardware.scale:
        raise ConfigError(
            "--gpu: with launch.kind command the model and its layout come from your launch; "
            "expected --scale beside it, for models of 8B and 70B."
        )
    own = None
    if config.model is not None:
        work = Workload(
            model=config.model,
            vocab_size=vocab_size(config),
            parallel=_layout(config.parallel, hardware.gpus),
            experts=len(config.expert_names),
            models=models,
            sequences=windows,
            micro_batch_size=config.evaluate.micro_batch_size,
            resident=config.search.resident,
            expert_tokens=trained_tokens,
            differentiates=config.search.strategy == "gradient",
            keeps_keys=may_keep_keys(config),
        )
        own = search_cost(work, hardware.gpu)
    return Outlook(
        gpu=hardware.gpu,
        efficiency=ON_GPUS,
        windows=windows,
        seq_length=model_facts(config).seq_length,
        models=models,
        expert_tokens=config.experts.tokens,
        own=own,
        scale=tuple(_scale(config, hardware, models, windows)) if hardware.scale else (),
    )


def _layout(parallel: Parallel, gpus: int | None) -> Parallel:
    """Return the layout of the experiment on other GPUs, with more or fewer replicas.

    Raises:
        ConfigError: they are not whole replicas.
    """
    if gpus is None:
        return parallel
    multiple = parallel.tensor * parallel.pipeline * parallel.expert
    if gpus % multiple:
        raise ConfigError(
            f"--gpus is {gpus}, expected a multiple of {multiple} (parallel: tensor "
            f"{parallel.tensor} x pipeline {parallel.pipeline} x expert {parallel.expert})."
        )
    return parallel.model_copy(update={"processes": gpus})


def _scale(config: Config, hardware: Hardware, models: int, windows: int) -> Iterator[ScaleRow]:
    gpus = hardware.gpus or SCALE_GPUS
    for name, shape in SCALE.items():
        assert shape.vocab_size is not None
        model = shape.model_copy(update={"seq_length": model_facts(config).seq_length})
        for experts in SCALE_EXPERTS:
            work = Workload(
                model=model,
                vocab_size=shape.vocab_size,
                parallel=Parallel(processes=gpus),
                experts=experts,
                models=models,
                sequences=windows,
                micro_batch_size=config.evaluate.micro_batch_size,
                resident="auto",
                expert_tokens=experts * config.experts.tokens,
                differentiates=config.search.strategy == "gradient",
                keeps_keys=may_keep_keys(config),
            )
            layout = sensible_layout(work, hardware.gpu)
            cost = None
            if layout is not None:
                cost = search_cost(replace(work, parallel=layout), hardware.gpu)
            yield ScaleRow(name, experts, gpus, cost)


def does_not_fit(outlook: Outlook | None) -> Iterator[str]:
    """Yield a warning where a rank of this experiment's search has no room."""
    if outlook is not None and outlook.own is not None and not outlook.own.fits:
        yield (
            f"a rank of the search has no room on {outlook.gpu.name}: live weights, activations "
            "and what is held beside them exceed its memory. Use more tensor or pipeline ranks, "
            "search.resident: host, or a smaller evaluate.micro_batch_size."
        )
