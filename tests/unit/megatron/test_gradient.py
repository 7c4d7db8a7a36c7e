"""What a backward pass leaves as it was, without ranks."""

from __future__ import annotations

import torch

from megatron_mergemix.megatron.gradient import _as_scored, main_gradients


def test_gradients_are_let_go_even_where_their_dictionary_is_kept() -> None:
    chunk = torch.nn.Linear(3, 2)
    with main_gradients([chunk]) as gradients:
        assert {gradient.shape for gradient in gradients.values()} == {(2, 3), (2,)}
    assert gradients == {}
    assert not hasattr(chunk.weight, "main_grad")


class DotProductAttention(torch.nn.Module):
    """Stands for that of TransformerEngine, which needs CUDA."""

    __module__ = "transformer_engine.pytorch.attention"

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention_dropout = dropout


class Attention(DotProductAttention):
    """What Megatron makes of it."""


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = object()
        self.plain, self.noisy = Attention(0.0), Attention(0.1)
        self.dropout = torch.nn.Dropout(0.1)


def test_fused_attention_takes_a_kernel_with_a_backward_pass_and_nothing_draws_noise() -> None:
    model = Model().train()
    with _as_scored([model]):
        assert model.plain.training
        assert not model.noisy.training
        assert not model.dropout.training
    assert all(module.training for module in model.modules())
    model.eval()
    with _as_scored([model]):
        assert model.plain.training
    assert not model.plain.training
