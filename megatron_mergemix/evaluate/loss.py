"""Held-out loss on fixed windows, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron_mergemix.config import LossTask
from megatron_mergemix.errors import DataError, EvaluationError
from megatron_mergemix.evaluate.proxy import Proxy
from megatron_mergemix.evaluate.windows import loss_windows
from megatron_mergemix.journal import Score, Scores


class LossEvaluator:
    """Scores a proxy on the held-out datasets of every capability with a ``loss`` task."""

    def __init__(
        self,
        tasks: Mapping[str, LossTask],
        *,
        seq_length: int,
        vocab_size: int,
        micro_batch_size: int,
    ):
        """Cut the windows of every capability once; all candidates see the same ones.

        Args:
            tasks: capability -> its loss task.
            seq_length: tokens per window, as the model was trained.
            vocab_size: rows of the embedding; larger token ids are refused.
            micro_batch_size: sequences per forward pass.

        Raises:
            DataError: a dataset is too small, or was made with another tokenizer.
        """
        self._micro_batch_size = micro_batch_size
        self._seq_length = seq_length
        self._windows = {name: loss_windows(task, seq_length) for name, task in tasks.items()}
        for name, windows in self._windows.items():
            largest = int(windows.tokens.max())
            if largest >= vocab_size:
                raise DataError(
                    f"token {largest} in {', '.join(tasks[name].prefixes)} (capability {name}) "
                    f"is outside the model's vocabulary of {vocab_size} rows; the dataset was "
                    "made with another tokenizer."
                )
        self._tokens = torch.cat([torch.from_numpy(w.tokens) for w in self._windows.values()])

    def evaluate(self, proxy: Proxy) -> Scores:
        """Collective: return ``{capability: {"loss": ..., "bpb": ...}}``.

        The standard error is over windows. ``bpb`` is there where every dataset's sidecar tells
        its bytes; it converts with the datasets' mean bytes per token.

        Raises:
            EvaluationError: a loss is not finite.
        """
        losses = proxy.sequence_losses(self._tokens, self._micro_batch_size) / self._seq_length
        sizes = [len(windows.tokens) for windows in self._windows.values()]
        scores: dict[str, dict[str, Score]] = {}
        for (name, windows), mine in zip(self._windows.items(), losses.split(sizes), strict=True):
            if not bool(torch.isfinite(mine).all()):
                raise EvaluationError(
                    f"the held-out loss of capability {name} is not finite; the merged model is "
                    "broken for these merge weights."
                )
            scores[name] = _scores(mine, windows.bytes_per_token)
        return scores

    def digest(self) -> Mapping[str, str]:
        """Return, per capability, what its scores depend on: metric, windows and data."""
        return {f"evaluate.{name}": windows.digest for name, windows in self._windows.items()}


def _scores(losses: torch.Tensor, bytes_per_token: float | None) -> dict[str, Score]:
    scores = {"loss": _score(losses, "nats/token")}
    if bytes_per_token is not None:
        scores["bpb"] = _score(losses / (math.log(2.0) * bytes_per_token), "bits/byte")
    return scores


def _score(values: torch.Tensor, unit: str) -> Score:
    count = len(values)
    return Score(
        value=values.mean().item(),
        stderr=values.std().item() / math.sqrt(count) if count > 1 else None,
        num_samples=count,
        unit=unit,
        higher_is_better=False,
        # Seven digits are what fp32 losses carry; more would only make the journal longer.
        items=tuple(float(f"{value:.7g}") for value in values.tolist()),
    )
