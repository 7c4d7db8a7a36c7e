"""References on two ranks: one that diverges holds up no other; scores are those of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.training_runs.experiment_runs import requested_run
from tests.distributed.test_search_layouts import overrides
from tests.distributed.test_trainer_diverges import poison
from tests.support.run_distributed import run_distributed

NAMES = ["uniform", "odd", "learned-by-hand"]
REFERENCES = (
    "references={uniform: uniform, odd: {math: 0.7, code: 0.3}, "
    "learned-by-hand: {math: 0.2, code: 0.2, prose: 0.6}}"
)
LAYOUTS: dict[str, dict[str, int]] = {
    "alone": {"processes": 1, "tensor": 1},
    "tensor": {"processes": 2, "tensor": 2},
    "data": {"processes": 2, "tensor": 1},
}


def validate_twice(config_path: Path, changes: list[str], diverging: str | None) -> str:
    """Validate, the gradients of one reference being NaN on rank 0, and once more without that.

    Returns:
        Why the first validation failed.
    """
    from megatron_mergemix.errors import MergeMixError
    from megatron_mergemix.jobs.validate import validate
    from megatron_mergemix.megatron import parallel, trainer

    config = load_config(config_path, changes)
    parallel.start(config.parallel)
    set_up, message = trainer._set_up, ""

    def poisoned(run: Any, config: Any) -> Any:
        trainee = set_up(run, config)
        if run.name == f"references/{diverging}":
            poison(trainee, "gradients", 7)
        return trainee

    if diverging is not None:
        trainer._set_up = poisoned
        with pytest.raises(MergeMixError) as caught:
            validate(config, NAMES)
        message = str(caught.value)
        trainer._set_up = set_up
    validate(config, NAMES)
    return message


def score_checkpoints(config_path: Path, changes: list[str], words: list[str]) -> None:
    from megatron_mergemix.jobs.evaluate import evaluate
    from megatron_mergemix.megatron import parallel

    config = load_config(config_path, changes)
    parallel.start(config.parallel)
    evaluate(config, words)


def values(scores: dict[str, Any]) -> np.ndarray:
    return np.array([part[metric]["value"] for part in scores.values() for metric in part])


class Story:
    """The run_dirs by layout, and why the first validation on two ranks failed."""

    def __init__(self, config_path: Path, home: Path) -> None:
        self.home, self.messages = home, {}
        for layout, sizes in LAYOUTS.items():
            changes = [*overrides(config_path, home / layout, 0.25, **sizes), REFERENCES]
            diverging = "odd" if layout == "tensor" else None
            told = run_distributed(
                validate_twice, sizes["processes"], config_path, changes, diverging
            )
            self.messages[layout] = told

    def trained(self, layout: str) -> dict[str, np.ndarray]:
        folder = self.home / layout / "references"
        records = {name: json.loads((folder / name / "scores.json").read_text()) for name in NAMES}
        return {name: values(record["scores"]) for name, record in records.items()}

    def merges(self, layout: str) -> dict[str, np.ndarray]:
        found = [
            json.loads(p.read_text()) for p in (self.home / layout / "evaluate").glob("*.json")
        ]
        return {
            record["name"].removeprefix("mixture "): values(record["scores"])
            for record in found
            if record["checkpoint"] is None
        }


@pytest.fixture(scope="module")
def story(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(trained_experiment, tmp_path_factory.mktemp("validate"))


def test_a_reference_that_diverges_on_one_rank_is_named_on_both_and_alone_left(
    story: Story,
) -> None:
    first, second = story.messages["tensor"]
    assert first == second
    lines = first.splitlines()
    assert lines[0].endswith("1 of 3 references are not measured, so nothing is compared yet: odd.")
    assert lines[1].startswith("references/odd: the norm of the gradients is nan at step 7.")
    assert lines[-1].startswith("Start it again to try them alone")
    assert "remove odd from references" in lines[-1]


@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_two_ranks_measure_what_one_rank_does(story: Story, layout: str) -> None:
    assert set(story.merges(layout)) == set(NAMES)
    for name in NAMES:
        # A merge is the same model to the last bits; training adds the rounding of every step.
        ours, alone = story.merges(layout)[name], story.merges("alone")[name]
        np.testing.assert_allclose(ours, alone, rtol=1e-5)
        ours, alone = story.trained(layout)[name], story.trained("alone")[name]
        np.testing.assert_allclose(ours, alone, rtol=1e-3)
    spread = np.ptp(list(story.trained("alone").values()), axis=0)
    assert (spread > 3e-3 * story.trained("alone")["odd"]).any()  # references are told apart


def test_recorded_scores_are_those_of_the_trained_checkpoints(
    story: Story, trained_experiment: Path
) -> None:
    """Scored again on one rank, as any other checkpoint."""
    changes = overrides(trained_experiment, story.home / "tensor", 0.25, **LAYOUTS["alone"])
    config = load_config(trained_experiment, [*changes, REFERENCES])
    paths = {n: requested_run(config, f"references/{n}").final_checkpoint() for n in NAMES}
    again = [f"run_dir={story.home / 'again'}", *changes[1:], REFERENCES]
    words = [f"checkpoint:{path}" for path in paths.values()]
    run_distributed(score_checkpoints, 1, trained_experiment, again, words)
    records = [json.loads(p.read_text()) for p in (story.home / "again/evaluate").glob("*.json")]
    scored = {Path(record["checkpoint"]): values(record["scores"]) for record in records}
    for name, path in paths.items():
        np.testing.assert_allclose(scored[path], story.trained("tensor")[name], rtol=1e-5)
