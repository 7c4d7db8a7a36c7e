"""How large a model is and what training and scoring it cost, from the settings alone.

Floating-point operations follow the usual rule: 6 per active parameter and token for training, 2
for a forward pass (Kaplan et al., arXiv 2001.08361, section 2.1). Attention scores are left out;
they add less than ``seq_length / (6 * hidden_size)`` of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mergemix.config import Model


@dataclass(frozen=True)
class Layer:
    """Parameters of one transformer layer of the built-in model, by how they are sharded.

    Attributes:
        attention: query, key, value and output projections.
        norms: two normalisations.
        mlp: dense feed-forward layer; 0 in a MoE layer.
        router: MoE router; 0 in a dense layer.
        moe_expert: one MoE expert; 0 in a dense layer.
    """

    attention: int
    norms: int
    mlp: int
    router: int
    moe_expert: int


@dataclass(frozen=True)
class Parameters:
    """Parameters of the whole model.

    Attributes:
        total: everything a checkpoint holds.
        active: what one token passes: ``moe_top_k`` of the MoE experts instead of all.
    """

    total: int
    active: int


def layer_parameters(model: Model) -> Layer:
    """Return the parameters of one layer. Linear layers have no bias."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    key_value = (model.num_query_groups or heads) * (hidden // heads)
    moe = model.num_moe_experts is not None
    return Layer(
        attention=hidden * (hidden + 2 * key_value) + hidden * hidden,
        norms=2 * norm_parameters(model),
        mlp=0 if moe else mlp_parameters(model, model.ffn_width()),
        router=hidden * (model.num_moe_experts or 0),
        moe_expert=(
            mlp_parameters(model, model.moe_ffn_hidden_size or model.ffn_width()) if moe else 0
        ),
    )


def mlp_parameters(model: Model, width: int) -> int:
    """Return the parameters of a feed-forward layer; swiglu has a gate beside the up projection."""
    return (3 if model.activation == "swiglu" else 2) * model.hidden_size * width


def norm_parameters(model: Model) -> int:
    """Return the parameters of one normalisation: scales, and shifts with LayerNorm."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def position_parameters(model: Model) -> int:
    """Return the parameters of the table of positions; rope has none."""
    learned = model.position_embedding == "learned_absolute"
    return model.seq_length * model.hidden_size if learned else 0


def count_parameters(model: Model, vocab_size: int) -> Parameters:
    """Return the parameters of the model.

    Args:
        model: the architecture.
        vocab_size: of the tokenizer; padded here as the embedding is.
    """
    layer = layer_parameters(model)
    tables = model.padded_vocab(vocab_size) * model.hidden_size
    shared = (
        tables * (1 if model.tie_embeddings else 2)
        + position_parameters(model)
        + norm_parameters(model)
        + model.num_layers * (layer.attention + layer.norms + layer.mlp + layer.router)
    )
    experts = model.num_moe_experts or 0
    active = min(model.moe_top_k, experts)
    return Parameters(
        total=shared + model.num_layers * experts * layer.moe_expert,
        active=shared + model.num_layers * active * layer.moe_expert,
    )


def training_flops(active_parameters: float, tokens: float) -> float:
    """Return the operations of training on ``tokens`` tokens: ``6 N D``."""
    return 6.0 * active_parameters * tokens


def forward_flops(active_parameters: float, tokens: float) -> float:
    """Return the operations of scoring ``tokens`` tokens: ``2 N D``."""
    return 2.0 * active_parameters * tokens


@dataclass(frozen=True)
class PaperCost:
    """A row of the cost table of the MergeMix paper (arXiv 2601.17858, Table 6).

    Attributes:
        method: whose search it is.
        runs: training runs.
        parameters: per run, summed over sizes where the paper does so.
        tokens: per run.
    """

    method: str
    runs: int
    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        """Return the operations of all runs."""
        return self.runs * training_flops(self.parameters, self.tokens)


PAPER_COSTS = (
    PaperCost("CLIMB", 112, 350e6, 40e9),
    PaperCost("scaling laws", 40, 1e9, 30e9),
)
"""Alternatives whose size does not depend on the model at hand."""

PAPER_FULL_RUNS = 10
"""Full runs of a manual search or of adapted RegMix in the paper."""
