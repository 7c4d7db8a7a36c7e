"""What ``mergemix validate`` and ``diagnose`` leave beside a search, by formulas, not models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.validation import is_filling
from megatron_mergemix.diagnosis.record import (
    diagnosed_losses,
    diagnosis_digests,
    diagnosis_of,
    merges_to_check,
    source_of,
)
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.experiment.search_record import finished_search, measured_trials
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.training_runs.mixtures import component_matrix, named_mixture
from megatron_mergemix.trials import Scores
from megatron_mergemix.validation.bootstrap import resampled
from megatron_mergemix.validation.fidelity import LEVELS, fidelity_of
from megatron_mergemix.validation.references import values_of
from tests.support.searched import scores_of_mixture, searched

VALIDATED: Mapping[str, Any] = {
    "references": {
        "learned": "learned",
        "uniform": "uniform",
        "proportional": "proportional",
    },
    "validation": {"space_filling": 24},
}
"""Settings of as many references as the documentation recommends: 27."""


def validated(home: Path, domains: list[str], changes: Mapping[str, Any] | None = None) -> Path:
    """Return the ``mix.yaml`` of a finished search with references, their proxies and a diagnosis.

    Args:
        home: where everything goes.
        domains: as for a search.
        changes: sections that replace those of the settings, beside ``VALIDATED``.
    """
    path = searched(home, domains, {**VALIDATED, **(changes or {})})
    config = load_config(path)
    put_validation(config)
    put_diagnosis(config)
    return path


def put_validation(config: Config) -> None:
    """Write what the references of an experiment say, as ``mergemix validate`` would."""
    result = finished_search(config)
    utility = Utility(config.evaluate.utility, objective(config))
    scale = utility_scale(utility, measured_trials(config))
    mixtures = {
        name: result["mixture"] if given == "learned" else named_mixture(config, given)
        for name, given in config.references.items()
    }
    scored = {
        name: (
            scores_of_mixture(config, mixture, 500 + place),
            scores_of_mixture(config, mixture, 900 + place, luck=0.02),
        )
        for place, (name, mixture) in enumerate(mixtures.items())
    }
    real = {name: utility.of_trial(trained, scale).value for name, (_, trained) in scored.items()}
    order = sorted(real, key=lambda name: -real[name])
    best = scored[order[0]][1]
    rows = []
    for name in order:
        proxy, trained = scored[name]
        behind = utility.gain(best, trained, scale)
        of_proxy = utility.of_trial(proxy, scale).value
        rows.append(
            {
                "name": name,
                "mixture": dict(mixtures[name]),
                "utility": real[name],
                "behind": behind.value,
                "behind_stderr": behind.stderr,
                "scores": values_of(utility, trained),
                "proxy": {"utility": of_proxy, "scores": values_of(utility, proxy)},
                "predicted": _predicted(of_proxy + 0.01) | {"is_trial": not is_filling(name)},
            }
        )
    sides: list[list[Scores]] = [[scored[name][side] for name in order] for side in (0, 1)]
    drawn = resampled(*sides, utility, scale, seed=0, num=50)
    record = {
        "references": rows,
        "fidelity": fidelity_of(rows, *sides, utility, drawn),
        "costs": {
            "proxies": {"tokens": 300.0, "seconds": 7.0, "runs": len(rows)},
            "references": {"tokens": 330.0 * len(rows), "seconds": 90.0, "runs": len(rows)},
        },
        "notes": ["These models are formulas."],
        "digests": result["digests"],
    }
    publish_json(RunDir(config.run_dir).validation, record)


def _predicted(value: float) -> dict[str, Any]:
    intervals = {str(level): [value - level / 10, value + level / 10] for level in LEVELS}
    return {"utility": value, "interval": intervals["0.95"], "intervals": intervals}


def put_diagnosis(config: Config) -> None:
    """Write a diagnosis of losses that are parabolas around the base."""
    count = len(config.expert_names)
    bent = 0.05 * np.eye(count) + 0.01
    alphas = np.array(
        [
            list(alpha.values())
            for alpha in merges_to_check(component_matrix(config), config.expert_names)
        ]
    )
    losses = {}
    for place, name in enumerate(diagnosed_losses(config)):
        slope = np.full(count, -0.02)
        slope[place % count] = -0.3
        at = 3 + alphas @ slope + np.einsum("ni,ij,nj->n", alphas, bent, alphas) / 2
        losses[name] = {
            "source": source_of(config, name),
            "windows": 4,
            "loss": 3.0,
            "first_order": slope.tolist(),
            "second_order": bent.tolist(),
            "lengths": np.diag(bent).tolist(),
            "steps": [0.1] * count,
            "disagreements": [1e-3] * count,
            "merges": {"alpha": alphas.tolist(), "losses": at.tolist()},
        }
    record = {
        "products": (4 * (np.eye(count) + 0.3 * (1 - np.eye(count)))).tolist(),
        "base_norm": 50.0,
        "delta": [0.01] * count,
        "losses": losses,
        "digests": diagnosis_digests(config),
    }
    publish_json(RunDir(config.run_dir).diagnosis, diagnosis_of(config, record))
