"""What is left of a search's gains on items that it never saw.

The winner among many candidates was chosen on the items that speak for it, so on those it looks
better than it is. Items that no candidate was chosen on have no such favourites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mergemix.config.evaluate import Evaluate
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.evaluate.windows import held_out_count
from megatron_mergemix.search.strategy import Recommendation
from megatron_mergemix.trials import Scores, Trial

RECOMMENDED = "recommended"
OTHERS = ("uniform", "proportional", "best observed")
"""Alternatives that the recommended mixture is compared with, beside the base."""

_SURELY = 2.0
"""Standard errors by which a gain shrinks before that is more than chance."""


def compared(advice: Recommendation, trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return name -> trial of the recommended mixture and of those that it is compared with.

    Only of those that were measured; what is the recommended mixture itself is left out.
    """
    by_index = {trial.index: trial for trial in trials}
    winner = by_index[advice.alternatives[advice.source]["trial"]]
    found = {RECOMMENDED: winner}
    for name in OTHERS:
        if name in advice.alternatives:
            found[name] = by_index[advice.alternatives[name]["trial"]]
    base = next((trial for trial in trials if not trial.mixture and not trial.error), None)
    if base is not None:
        found["base"] = base
    is_other = {name: trial.index != winner.index for name, trial in found.items()}
    return {n: trial for n, trial in found.items() if n == RECOMMENDED or is_other[n]}


def comparison(
    evaluate: Evaluate,
    utility: Utility,
    scale: Scale,
    trials: Mapping[str, Trial],
    held_out: Mapping[int, Scores],
) -> dict[str, Any]:
    """Return how the recommended mixture does on both kinds of items, as plain data.

    Args:
        evaluate: the section of the settings.
        utility: what was maximised.
        scale: of the search; the same for both kinds of items.
        trials: what :func:`compared` returns.
        held_out: index of the trial -> its scores on items that the search never saw. Capabilities
            that are missing there count with the search's own score.

    Returns:
        {"share", "items": capability -> how many, "as_searched": capability -> why it has none,
        "models": name -> {"trial", "searched" and "held_out" (the utility) with "..._stderr", and
        of the others "gain_searched" and "gain_held_out" (by how much the recommended mixture is
        better) with "..._stderr", paired over items where both have theirs}}. Without "models"
        where no capability that counts has such items.
    """
    first = next(iter(held_out.values()), {})
    items = {
        name: sum(first[name][metric].num_samples for metric in utility.objective[name])
        for name in utility.capabilities
        # A task of one item has none to hold out, and a capability is the mean of all its tasks.
        if set(utility.objective[name]) <= set(first.get(name, ()))
    }
    report: dict[str, Any] = {
        "share": evaluate.held_out,
        "items": items,
        "as_searched": {n: _why(evaluate, n) for n in utility.capabilities if n not in items},
    }
    counted = [n for n, w in zip(utility.capabilities, utility.weights, strict=True) if w > 0]
    if not set(counted) & set(items):
        return report
    both = {
        n: {**t.scores, **{name: held_out[t.index][name] for name in items}}
        for n, t in trials.items()
        if t.index in held_out
    }
    if RECOMMENDED not in both:
        return report
    models: dict[str, Any] = {}
    for name, scores in both.items():
        row: dict[str, Any] = {"trial": trials[name].index}
        models[name] = row
        sides = {"searched": trials[name].scores, "held_out": scores}
        best = {"searched": trials[RECOMMENDED].scores, "held_out": both[RECOMMENDED]}
        for side, measured in sides.items():
            row[side], row[f"{side}_stderr"] = utility.of_trial(measured, scale)
            if name != RECOMMENDED:
                gain = utility.gain(best[side], measured, scale)
                row[f"gain_{side}"], row[f"gain_{side}_stderr"] = gain
    return {**report, "models": models}


def notes(evaluate: Evaluate, report: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know of the comparison, one sentence each."""
    found = [
        f"Of the held-out items, capability {name} has {report['items'][name]}, where "
        f"evaluate.held_out {evaluate.held_out:g} asks for {wanted}: its datasets have no more."
        for name, task in evaluate.losses.items()
        if 0 < report["items"].get(name, 0) < (wanted := held_out_count(task, evaluate.held_out))
    ]
    if "models" not in report:
        reasons = "; ".join(f"{n}: {why}" for n, why in report["as_searched"].items())
        return [*found, f"The mixture was not checked on held-out items: {reasons or 'it failed'}."]
    found += [
        f"The comparison on held-out items takes {name} from the search: {why}."
        for name, why in report["as_searched"].items()
    ]
    for name, row in report["models"].items():
        if name != RECOMMENDED and name != "best observed" and _is_lost(row):
            found.append(
                f"The gain over {name} does not survive on items that the search never saw: "
                f"{_number(row, 'gain_searched')} on its own, {_number(row, 'gain_held_out')} on "
                "the others. Part of it was luck; give the search more items, or fewer choices."
            )
    return found


def _is_lost(row: Mapping[str, Any]) -> bool:
    """Return whether a gain is gone, or smaller by more than chance.

    Where an error is not known, chance is not either, and a gain that is halved counts as lost.
    """
    before, after = row["gain_searched"], row["gain_held_out"]
    errors = [row["gain_searched_stderr"], row["gain_held_out_stderr"]]
    if before <= 0:
        return False
    known = [error for error in errors if error is not None]
    chance = _SURELY * math.hypot(*known) if len(known) == 2 else before / 2
    return after <= 0 or before - after > chance


def _number(row: Mapping[str, Any], key: str) -> str:
    error = row[f"{key}_stderr"]
    return f"{row[key]:.4f}" + ("" if error is None else f" +- {error:.4f}")


def _why(evaluate: Evaluate, name: str) -> str:
    """Return why a capability has no items of its own for the comparison."""
    capability = evaluate.capabilities[name]
    if capability.command is not None:
        return "what a command scores cannot be split"
    if capability.loss is not None:
        return f"its datasets have no windows beside the {capability.loss.sequences} of the search"
    return "its tasks have no documents left beside those of the search"
