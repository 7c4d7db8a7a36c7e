"""A tiny Llama or Mixtral with random weights, for transformers and Megatron, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

LENGTH = 64
ROWS = 320
"""Of the embedding; more than the tokenizer has ids."""


EXPERTS, TOP = 4, 2
"""MoE experts of every layer of a Mixtral, and how many of them a token goes to."""

Kind = Literal["untied", "tied", "moe"]
"""A Llama whose embedding is its output layer or is not, or a Mixtral."""


class Shape(NamedTuple):
    """Sizes of the model."""

    layers: int = 4
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    width: int = 48
    length: int = LENGTH
    rows: int = ROWS


TINY = Shape()

TEXT = (
    "The cat sat on the mat and looked at the moon. Two and three are five, four and five are "
    "nine. A red fox runs over the green hill; the river is long and cold. Who knows the answer? "
)


def write_tokenizer(folder: Path, chat_begins: bool = False) -> None:
    """Train a byte-level BPE of 300 ids that puts ``<begin>`` before every text.

    Args:
        folder: for the tokenizer.
        chat_begins: whether its chat template writes ``<begin>``, too, as most templates do.
    """
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT] * 10, vocab_size=300, special_tokens=["<begin>", "<end>"])
    bpe.add_special_tokens(["<begin>", "<end>"])
    bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", bpe.token_to_id("<begin>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<begin>", eos_token="<end>"
    )
    fast.chat_template = ("{{ bos_token }}" if chat_begins else "") + (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(folder)


def hugging_face(kind: Kind = "untied", shape: Shape = TINY) -> Any:
    """Return a causal language model whose rows beyond the tokenizer's ids are zero."""
    import transformers

    torch.manual_seed(7)
    fields = {
        "vocab_size": shape.rows,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "max_position_embeddings": shape.length,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "tie_word_embeddings": kind == "tied",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "moe":
        config = transformers.MixtralConfig(
            **fields, num_local_experts=EXPERTS, num_experts_per_tok=TOP, rope_theta=10_000.0
        )
        model = transformers.MixtralForCausalLM(config).eval()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms that are all ones would hide a mistake
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            if name in ("lm_head.weight", "model.embed_tokens.weight"):
                parameter[300:] = 0.0
    return model


def settings(kind: Kind = "untied", shape: Shape = TINY) -> dict[str, Any]:
    """Return what Megatron's configuration needs for the same model."""
    moe = {
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP,
        "moe_ffn_hidden_size": shape.width,
        "moe_token_dispatcher_type": "alltoall",
    }
    return {
        **(moe if kind == "moe" else {}),
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "ffn_hidden_size": shape.width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "apply_rope_fusion": False,
    }


def model(shape: Shape = TINY) -> dict[str, Any]:
    """Return the arguments of Megatron's model."""
    return {
        "vocab_size": shape.rows,
        "max_sequence_length": shape.length,
        "position_embedding_type": "rope",
    }


def load(chunk: Any, weights: dict[str, torch.Tensor], shape: Shape = TINY) -> None:
    """Copy a Hugging Face state into a Megatron model that is whole on this rank."""
    own = dict(chunk.named_parameters())
    taken = set()

    def put(name: str, value: torch.Tensor) -> None:
        assert own[name].shape == value.shape, (name, own[name].shape, value.shape)
        with torch.no_grad():
            own[name].copy_(value)
        taken.add(name)

    put("embedding.word_embeddings.weight", weights["model.embed_tokens.weight"])
    put("decoder.final_layernorm.weight", weights["model.norm.weight"])
    if "output_layer.weight" in own:
        put("output_layer.weight", weights["lm_head.weight"])
    for number in range(shape.layers):
        theirs, ours = f"model.layers.{number}.", f"decoder.layers.{number}."

        def get(name: str, theirs: str = theirs) -> torch.Tensor:
            return weights[f"{theirs}{name}.weight"]

        put(f"{ours}input_layernorm.weight", get("input_layernorm"))
        put(f"{ours}pre_mlp_layernorm.weight", get("post_attention_layernorm"))
        put(f"{ours}self_attention.linear_proj.weight", get("self_attn.o_proj"))
        put(f"{ours}self_attention.linear_qkv.weight", _grouped(get, shape))
        if f"{ours}mlp.router.weight" in own:
            put(f"{ours}mlp.router.weight", get("mlp.gate"))
            for expert in range(EXPERTS):
                mine = f"{ours}mlp.experts.local_experts.{expert}."
                put(
                    f"{mine}linear_fc1.weight", weights[f"{theirs}mlp.experts.gate_up_proj"][expert]
                )
                put(f"{mine}linear_fc2.weight", weights[f"{theirs}mlp.experts.down_proj"][expert])
            continue
        gates = torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")])
        put(f"{ours}mlp.linear_fc1.weight", gates)
        put(f"{ours}mlp.linear_fc2.weight", get("mlp.down_proj"))
    assert taken == set(own), set(own) - taken


def _grouped(get: Any, shape: Shape) -> torch.Tensor:
    """Return queries, keys and values group by group, as Megatron keeps them."""
    parts = [get(f"self_attn.{kind}_proj").view(shape.groups, -1, shape.hidden) for kind in "qkv"]
    return torch.cat(parts, dim=1).reshape(-1, shape.hidden)
