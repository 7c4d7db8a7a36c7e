"""The verdict says what the study saw of such experts, and never more than is known."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.diagnosis.regime import (
    LARGEST_DISAGREEMENT,
    RANKED,
    SHARES,
    UPDATES,
    WELL,
    of_training,
    verdict,
)
from megatron_mergemix.mixtures.merge_weights import component_matrix
from megatron_mergemix.mixtures.simplex import uniform

TABLES = Path(__file__).parents[3] / "docs" / "fidelity"


def judged(
    *, share: float | None = 0.25, delta: float = 0.03, disagreement: float = 0.001
) -> tuple[str, list[str]]:
    matrix = component_matrix(4, 0.25 if share is None else share, uniform(4))
    found = verdict(
        matrix=matrix,
        general_share=share,
        experts=["math", "code"],
        delta=[0.01, delta],
        losses={"math": {"disagreements": [0.0]}, "code": {"disagreements": [0.0, disagreement]}},
    )
    return found.regime, found.reasons


def test_experts_as_those_that_ranked_well_are_within() -> None:
    regime, reasons = judged()
    assert regime == "within"
    assert "experts.general_share is 0.25, and merges ranked well from 0.1 to 0.75" in reasons[0]
    assert "went as far as those that ranked well: 3.0%" in reasons[1]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("delta", UPDATES)
def test_at_the_limits_they_are_within(share: float, delta: float) -> None:
    assert judged(share=share, delta=delta)[0] == "within"


@pytest.mark.parametrize(
    ("changes", "regime", "reason"),
    [
        ({"share": 0.0}, "beyond", "Every expert is of one domain alone"),
        ({"share": 0.9}, "open", "experts.general_share is 0.9, which"),
        ({"delta": UPDATES[1] + 0.01}, "open", "went further than any that ranked well"),
        ({"share": 0.05}, "open", "experts.general_share is 0.05, which"),
        ({"share": None}, "open", "mixtures of your own choice"),
        ({"delta": 0.009}, "open", "went less far than any that ranked well"),
    ],
)
def test_what_is_otherwise_is_named_first(
    changes: dict[str, Any], regime: str, reason: str
) -> None:
    found, reasons = judged(**changes)
    assert found == regime
    assert reason in reasons[0]


def test_who_went_too_far_is_named() -> None:
    _, reasons = judged(delta=0.2)
    assert "code 20.0%" in reasons[0]
    assert "math" not in reasons[0]


def test_what_is_well_is_not_a_reason_where_something_else_decides() -> None:
    assert len(judged(share=0.9)[1]) == 2  # and that the study is of a toy
    assert len(judged()[1]) == 3


def test_what_ranked_worse_outweighs_what_is_not_known() -> None:
    regime, reasons = judged(share=0.0, delta=0.009)
    assert regime == "beyond"
    assert "one domain alone" in reasons[0]
    assert "less far" in reasons[1]


def test_curvature_that_is_not_measured_well_is_said_and_decides_nothing() -> None:
    regime, reasons = judged(disagreement=LARGEST_DISAGREEMENT + 0.01)
    assert regime == "within"
    assert "Curvature of code is not measured well" in reasons[2]
    assert not any("Curvature of" in text for text in judged(disagreement=0.1)[1])


@pytest.mark.parametrize("share", [None, 0.0, 0.05, 0.25, 0.75])
def test_every_verdict_says_that_the_study_is_of_a_toy(share: float | None) -> None:
    assert "That study is of a toy" in judged(share=share)[1][-1]


def test_components_of_one_domain_each_are_pure_however_they_were_given() -> None:
    assert of_training(np.eye(3), None).regime == "beyond"
    assert of_training(np.eye(3), 0.0).regime == "beyond"


# ---- the numbers are those of the study's tables ----


def rows_of(name: str) -> list[dict[str, str]]:
    with (TABLES / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def ranked() -> dict[str, float]:
    """Return the mean rank correlation of every variant's affine merges."""
    found = defaultdict(list)
    for row in rows_of("agreement"):
        what = row["domains"], row["references"], row["merge"]
        if what == ("4", "same", "affine"):
            found[row["variant"]].append(float(row["spearman"]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_the_rank_correlations_are_the_study_s() -> None:
    found = ranked()
    for share, rho in RANKED.items():
        name = "default" if share == 0.25 else f"share-{share:g}"
        assert round(found[name], 2) == rho, name


def test_pure_experts_ranked_badly_however_little_they_were_trained() -> None:
    pure = [rho for name, rho in ranked().items() if f"{name}-".startswith("share-0-")]
    assert len(pure) == 4
    assert round(max(pure), 2) == RANKED[0.0]


def test_the_limits_hold_what_ranked_well_in_the_study() -> None:
    found = ranked()
    shares = [share for share, rho in RANKED.items() if rho >= WELL]
    assert (min(shares), max(shares)) == SHARES
    deltas = [
        float(row["delta"])
        for row in rows_of("diagnoses")
        if SHARES[0] <= float(row["share"]) <= SHARES[1] and found[row["variant"]] >= WELL
    ]
    outward = math.floor(1000 * min(deltas)) / 1000, math.ceil(1000 * max(deltas)) / 1000
    assert outward == UPDATES
