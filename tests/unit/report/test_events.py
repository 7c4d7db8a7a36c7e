"""TensorBoard has the numbers and drawings of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mergemix.report.gather import Run


@pytest.fixture
def events(finished: Path, page: str) -> Any:
    found = EventAccumulator(str(finished.parent / "run" / "tensorboard" / "report"))
    return found.Reload()


def test_every_trial_has_its_utility_at_its_own_step(run: Run, events: Any) -> None:
    assert run.scale is not None
    written = {event.step: event.value for event in events.Scalars("trials/utility")}
    expected = {t.index: run.utility.of_trial(t.scores, run.scale).value for t in run.scored}
    assert written == pytest.approx(expected, rel=1e-6)


def test_the_learned_mixture_and_what_speaks_for_it_are_there(run: Run, events: Any) -> None:
    assert run.result is not None
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    for name, share in run.result["mixture"].items():
        assert found[f"learned/mixture/{name}"] == pytest.approx(share, rel=1e-6)
    assert found["learned/epochs/math"] == pytest.approx(
        run.result["mixture"]["math"] * 1000 / 1000
    )
    assert found["learned/utility_low"] == pytest.approx(run.result["interval"][0], rel=1e-6)
    assert "surrogates/spearman/code-text" in found


def test_every_drawing_is_an_image(page: str, events: Any) -> None:
    tags = events.Tags()["images"]
    assert len(tags) == page.count("<svg ")
    assert "mixtures/plane" in tags
    assert events.Images("mixtures/plane")[0].encoded_image_string.startswith(b"\x89PNG")
