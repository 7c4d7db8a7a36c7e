"""The verdict says which limit is broken, and never more than is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mergemix.regime import (
    LARGEST_DISAGREEMENT,
    LARGEST_ERROR,
    LARGEST_GAP,
    LARGEST_UPDATE,
    is_pure,
    verdict,
)
from megatron_mergemix.simplex import component_matrix, uniform


def loss(**changes: Any) -> dict[str, Any]:
    fine = {"expansion_error": 0.1, "disagreements": [0.001, 0.002], "gap": {"spread_ratio": 0.05}}
    return {**fine, **changes}


def judged(
    *, pure: bool = False, share: float | None = 0.25, delta: float = 0.03, **changes: Any
) -> tuple[str, str]:
    found = verdict(
        is_pure=pure,
        general_share=share,
        experts=["math", "code"],
        delta=[0.01, delta],
        losses={"math": loss(), "code": loss(**changes)},
    )
    return found.regime, "\n".join(found.reasons)


def test_within_means_that_no_known_limit_is_broken() -> None:
    regime, reasons = judged()
    assert regime == "within"
    assert "No known limit is broken: delta is 3.0% at most" in reasons


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"delta": LARGEST_UPDATE + 0.01}, "larger than any that was studied"),
        ({"expansion_error": LARGEST_ERROR + 0.01}, "The loss of code is not quadratic"),
        ({"gap": {"spread_ratio": LARGEST_GAP + 0.01}}, "gap of code between trained and merged"),
    ],
)
def test_beyond_names_the_limit_and_who_broke_it(broken: dict[str, Any], reason: str) -> None:
    regime, reasons = judged(**broken)
    assert regime == "beyond"
    assert reason in reasons.splitlines()[0]
    assert "No known limit is broken" not in reasons
    assert "code" in reasons.splitlines()[0]
    assert "math" not in reasons.splitlines()[0]


def test_at_the_limit_nothing_is_broken() -> None:
    regime, _ = judged(
        delta=LARGEST_UPDATE,
        expansion_error=LARGEST_ERROR,
        gap={"spread_ratio": LARGEST_GAP},
        disagreements=[0.0, LARGEST_DISAGREEMENT],
    )
    assert regime == "within"


def test_open_where_the_measurement_is_not_to_be_trusted() -> None:
    regime, reasons = judged(disagreements=[0.0, LARGEST_DISAGREEMENT + 0.01])
    assert regime == "open"
    assert "Curvature of code is not measured well" in reasons
    unknown = {"other": loss(gap=None)}
    found = verdict(is_pure=False, general_share=0.1, experts=["a"], delta=[0.0], losses=unknown)
    assert found.regime == "open"


@pytest.mark.parametrize("broken", [{}, {"delta": 0.5}, {"disagreements": [1.0]}])
def test_every_verdict_says_that_it_is_not_calibrated(broken: dict[str, Any]) -> None:
    assert "Not calibrated beyond that" in judged(**broken)[1]


def test_pure_experts_are_beyond_what_the_study_saw_ranked_well() -> None:
    regime, reasons = judged(pure=True)
    assert regime == "beyond"
    assert "such proxies had a rank correlation of 0.52" in reasons.splitlines()[0]
    assert "These experts share general data" in judged(pure=False)[1]
    of_your_own = judged(pure=False, share=None)[1]
    assert "share general data" not in of_your_own
    assert "such experts were not in them" in of_your_own
    assert is_pure(np.eye(3))
    assert not is_pure(component_matrix(3, 0.25, uniform(3)))
