"""A proxy that answers from what a model said elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Replay:
    """Log-probabilities, greedy flags and generated tokens, as they were returned."""

    def __init__(
        self, log_probs: Sequence[float], greedy: Sequence[bool], generated: Sequence[Any] = ()
    ) -> None:
        self.log_probs = torch.tensor(log_probs, dtype=torch.float64)
        self.greedy = torch.tensor(greedy, dtype=torch.bool)
        self.generated = [list(tokens) for tokens in generated]

    def continuation_log_probs(self, continuations: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert continuations.num_requests == len(self.log_probs)
        return self.log_probs, self.greedy

    def generate(self, prompts: Sequence[Any], is_done: Any, **_: Any) -> list[list[int]]:
        assert len(prompts) == len(self.generated)
        return self.generated
