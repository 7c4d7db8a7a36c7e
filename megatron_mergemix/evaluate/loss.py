"""Held-out loss on fixed windows, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from megatron_mergemix.config.evaluate import LossTask
from megatron_mergemix.errors import DataError, EvaluationError
from megatron_mergemix.evaluate.evaluator import Slopes
from megatron_mergemix.evaluate.first_items import first_count, joined
from megatron_mergemix.evaluate.proxy import DifferentiableProxy, Proxy
from megatron_mergemix.evaluate.windows import (
    Windows,
    drawn,
    first_ones_first,
    held_out_windows,
    loss_windows,
)
from megatron_mergemix.trials import Minibatch, Score, Scores


class LossEvaluator:
    """Scores a proxy on the held-out datasets of every capability with a ``loss`` task."""

    def __init__(
        self,
        tasks: Mapping[str, LossTask],
        *,
        seq_length: int,
        vocab_size: int,
        micro_batch_size: int,
        held_out: float = 0.0,
        first_share: float = 1.0,
        seed: int = 0,
    ):
        """Cut the windows of every capability once; all candidates see the same ones.

        Args:
            tasks: capability -> its loss task.
            seq_length: tokens per window, as the model was trained.
            vocab_size: rows of the embedding; larger token ids are refused.
            micro_batch_size: sequences per forward pass.
            held_out: share of the windows that :meth:`evaluate` does not score.
            first_share: share of the other windows that :meth:`evaluate_first` scores.
            seed: which those are.

        Raises:
            DataError: a dataset is too small, or was made with another tokenizer.
        """
        self._micro_batch_size = micro_batch_size
        self._seq_length = seq_length
        self._windows = {
            name: first_ones_first(loss_windows(task, seq_length), first_share, seed)
            for name, task in tasks.items()
        }
        apart = {name: held_out_windows(t, seq_length, held_out) for name, t in tasks.items()}
        self._apart = {name: windows for name, windows in apart.items() if windows is not None}
        for name, windows in [*self._windows.items(), *self._apart.items()]:
            largest = int(windows.tokens.max())
            if largest >= vocab_size:
                raise DataError(
                    f"token {largest} in {', '.join(tasks[name].prefixes)} (capability {name}) "
                    f"is outside the model's vocabulary of {vocab_size} rows; the dataset was "
                    "made with another tokenizer."
                )
        self._tokens = _joined(self._windows)
        self._first, self._others = {}, {}
        for name, windows in self._windows.items():
            count = first_count(len(windows.tokens), first_share)
            self._first[name] = replace(windows, tokens=windows.tokens[:count])
            if count < len(windows.tokens):
                self._others[name] = replace(windows, tokens=windows.tokens[count:])

    def evaluate(self, proxy: Proxy) -> Scores:
        """Collective: return ``{capability: {"loss": ..., "bpb": ...}}``.

        The standard error is over windows. ``bpb`` is there where every dataset's sidecar tells
        its bytes; it converts with the datasets' mean bytes per token.

        Raises:
            EvaluationError: a loss is not finite.
        """
        return self._scored(proxy, self._windows, self._tokens)

    def evaluate_first(self, proxy: Proxy) -> Scores:
        """Collective: return the same on the first share of the windows.

        Raises:
            EvaluationError: a loss is not finite.
        """
        return self._scored(proxy, self._first, _joined(self._first))

    def evaluate_others(self, proxy: Proxy, first: Scores) -> Scores:
        """Collective: return the same on all windows; only those that are not first are scored.

        Raises:
            EvaluationError: a loss is not finite.
        """
        found = self._scored(proxy, self._others, _joined(self._others)) if self._others else {}
        return {
            name: {
                metric: joined(score, found[name][metric]) if name in found else score
                for metric, score in first[name].items()
            }
            for name in self._windows
        }

    def evaluate_held_out(self, proxy: Proxy) -> Scores:
        """Collective: return the same on windows that :meth:`evaluate` does not score.

        Capabilities without any such windows are left out.

        Raises:
            EvaluationError: a loss is not finite.
        """
        return self._scored(proxy, self._apart, _joined(self._apart)) if self._apart else {}

    def _scored(
        self, proxy: Proxy, chosen: Mapping[str, Windows], tokens: torch.Tensor
    ) -> dict[str, dict[str, Score]]:
        losses = proxy.sequence_losses(tokens, self._micro_batch_size) / self._seq_length
        sizes = [len(windows.tokens) for windows in chosen.values()]
        scores: dict[str, dict[str, Score]] = {}
        for (name, windows), mine in zip(chosen.items(), losses.split(sizes), strict=True):
            if not bool(torch.isfinite(mine).all()):
                raise _broken(name)
            scores[name] = _scores(mine, windows.bytes_per_token)
        return scores

    def gradients(self, proxy: DifferentiableProxy, minibatch: Minibatch) -> tuple[Scores, Slopes]:
        """Collective: differentiate the held-out losses; see ``evaluate/evaluator.py``.

        One backward pass per capability over its own windows, so that whoever knows how the
        capabilities are weighed can do so afterwards.
        """
        scores: dict[str, dict[str, Score]] = {}
        slopes: dict[str, dict[str, dict[str, float]]] = {}
        for name in minibatch.capabilities:
            windows = self._windows[name]
            rows = drawn(len(windows.tokens), minibatch)
            tokens = torch.from_numpy(windows.tokens[rows])
            weights = torch.full((len(rows),), 1 / (len(rows) * self._seq_length)).double()
            losses, slope = proxy.loss_gradient(tokens, weights, self._micro_batch_size)
            if not all(map(math.isfinite, [*losses.tolist(), *slope.values()])):
                raise _broken(name)
            scores[name] = _scores(losses / self._seq_length, windows.bytes_per_token)
            slopes[name] = {"loss": dict(slope)}
            if windows.bytes_per_token is not None:
                bits = math.log(2.0) * windows.bytes_per_token
                slopes[name]["bpb"] = {expert: value / bits for expert, value in slope.items()}
        return scores, slopes

    def token_log_likelihoods(self, proxy: Proxy) -> dict[str, np.ndarray]:
        """Collective: return capability -> log-likelihood of every token in nats ``(N, S)``.

        On the windows that :meth:`evaluate` scores.

        Raises:
            EvaluationError: one is not finite.
        """
        losses = proxy.token_losses(self._tokens, self._micro_batch_size)
        if not bool(torch.isfinite(losses).all()):
            raise EvaluationError("the loss of a held-out token is not finite.")
        sizes = [len(windows.tokens) for windows in self._windows.values()]
        parts = zip(self._windows, losses.split(sizes), strict=True)
        return {name: -part.numpy() for name, part in parts}

    def digest(self) -> Mapping[str, str]:
        """Return, per capability, what its scores depend on: metric, windows and data."""
        return {f"evaluate.{name}": windows.digest for name, windows in self._windows.items()}


def _joined(windows: Mapping[str, Windows]) -> torch.Tensor:
    return torch.cat([torch.from_numpy(each.tokens) for each in windows.values()])


def _broken(capability: str) -> EvaluationError:
    return EvaluationError(
        f"the held-out loss of capability {capability} is not finite; this model is broken (a "
        "merge by its merge weights)."
    )


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
