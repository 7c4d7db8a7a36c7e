"""What the reference models say: measured scores of really trained mixtures, side by side.

Beside each reference stands its proxy, the merge of the experts for the same mixture. Both are
scored on all the items that the search used, with none of ``evaluate.held_out``, so what the items
do to every model alike cancels. The learned mixture was chosen on these very items: its proxy
looks better there than it is, its really trained model does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.digests import capability_digests, objective
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.experiment.digests import model_digests
from megatron_mergemix.experiment.named_models import asked_of, check_unchanged, recorded
from megatron_mergemix.experiment.search_record import measured_trials
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.training_runs.experiment_runs import requested_run
from megatron_mergemix.trials import Scores, record_of, scores_of


def reference_digests(config: Config, name: str) -> dict[str, str]:
    """Return what the scores of a trained reference model depend on."""
    run = requested_run(config, f"references/{name}")
    digests = {"checkpoint": fingerprint_of(run.final_checkpoint()), **model_digests(config)}
    return digests | capability_digests(config)


def reference_record(config: Config, name: str) -> dict[str, Any] | None:
    """Return what is on record of a reference model, None when it has to be trained or scored."""
    run = requested_run(config, f"references/{name}")
    path = run.directory / "scores.json"
    if not run.is_finished() or not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["digests"] == reference_digests(config, name) else None


def scored_reference(config: Config, name: str) -> Scores | None:
    """Return the scores of a reference model, or None when it has to be trained or scored."""
    record = reference_record(config, name)
    return None if record is None else scores_of(record["scores"])


def publish_scores(
    config: Config, name: str, digests: Mapping[str, str], scores: Scores, seconds: float
) -> Path:
    """Write the scores of a trained reference model beside it; rank 0 only. Return the file.

    Args:
        config: the experiment.
        name: of the reference.
        digests: what its scores depend on, taken before anything was scored.
        scores: on the items of the search.
        seconds: that the scoring took.

    Raises:
        SearchError: something that the scores depend on was changed meanwhile.
    """
    check_unchanged(f"references/{name}", digests, reference_digests(config, name))
    run = requested_run(config, f"references/{name}")
    path = run.directory / "scores.json"
    publish_json(
        path,
        {
            "mixture": dict(run.mixture),
            "scores": record_of(scores),
            "seconds": seconds,
            "digests": dict(digests),
        },
    )
    return path


def proxy_word(name: str) -> str:
    """Return how ``experiment/named_models.py`` calls the merge for a reference's mixture."""
    return f"mixture:{name}"


def proxy_record(config: Config, name: str) -> dict[str, Any] | None:
    """Return what is on record of the proxy of a reference, or None when it has to be scored."""
    return recorded(config, asked_of(config, proxy_word(name)))


def is_measured(config: Config, name: str) -> bool:
    """Return whether a reference is trained and scored, and its proxy is scored."""
    return reference_record(config, name) is not None and proxy_record(config, name) is not None


def values_of(utility: Utility, scores: Scores) -> dict[str, dict[str, float]]:
    """Return capability -> metric -> the numbers that enter the utility."""
    return {
        capability: {metric: scores[capability][metric].value for metric in metrics}
        for capability, metrics in utility.objective.items()
    }


def comparison(config: Config) -> list[dict[str, Any]]:
    """Return one row per reference model, best utility first.

    The utility is scaled as it was in the search. A row has ``name``, ``mixture``, ``utility``,
    ``behind`` and ``behind_stderr`` (by how much the best one exceeds it, paired over items) and
    ``scores``, capability -> metric -> the numbers that enter the utility.
    """
    utility = Utility(config.evaluate.utility, objective(config))
    scale = utility_scale(utility, measured_trials(config))
    scored = {}
    for name in config.references:
        scores = scored_reference(config, name)
        assert scores is not None, f"{name} was scored by the validation job"
        scored[name] = scores
    ordered = sorted(scored, key=lambda name: -utility.of_trial(scored[name], scale).value)
    rows = []
    for name in ordered:
        behind = utility.gain(scored[ordered[0]], scored[name], scale)
        rows.append(
            {
                "name": name,
                "mixture": dict(requested_run(config, f"references/{name}").mixture),
                "utility": utility.of_trial(scored[name], scale).value,
                "behind": behind.value,
                "behind_stderr": behind.stderr,
                "scores": values_of(utility, scored[name]),
            }
        )
    return rows
