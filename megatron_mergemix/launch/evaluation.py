"""``mergemix evaluate``: models side by side, on what the search scores candidates on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_mergemix.config import Config
from megatron_mergemix.console import console
from megatron_mergemix.errors import ConfigError, MergeMixError, SearchError
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.experiment.named_models import NamedModel, asked_of, recorded
from megatron_mergemix.experiment.search_record import measured_trials
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.launch.numbers import with_error
from megatron_mergemix.launch.verbs import experiment_on_record, start
from megatron_mergemix.model_facts import is_known, with_recorded_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.trials import scores_of


def models_asked_for(options: argparse.Namespace, experts: Sequence[str]) -> list[str]:
    """Return the words that name the models which the command line asks for, each once."""
    words: list[str] = []
    for what in options.what:
        words += [f"expert:{name}" for name in experts] if what == "experts" else [what]
    words += [f"mixture:{text}" for text in options.mixture]
    words += [f"alpha:{','.join(pairs)}" for pairs in options.alpha]
    words += [f"checkpoint:{path}" for path in options.checkpoint]
    return list(dict.fromkeys(words))


def evaluate(options: argparse.Namespace) -> None:
    """Score what is asked for and not on record, and show all of it.

    Raises:
        MergeMixError: nothing is asked for, a word names no model, or one cannot be scored.
    """
    to_terminal = options.json == "-"
    with experiment_on_record(options.config, options.overrides) as config:
        words = models_asked_for(options, config.expert_names)
        if not words:
            raise ConfigError(
                "nothing to evaluate: name base, experts or expert:NAME, or give --mixture, "
                "--alpha or --checkpoint."
            )
        config, failure = _score_missing(config, words, quiet=to_terminal)
        rows = _on_record_of(config, words, all_wanted=failure is None)
        if failure is not None and (to_terminal or not rows):
            raise failure
        missing = _add_utility(config, rows)
        if to_terminal:
            print(json.dumps(rows, indent=2, allow_nan=False))
            return
        _print(config, rows)
        if missing:
            print(f"note: {missing}")
        if failure is not None:
            raise failure
        if options.json is not None:
            publish_json(Path(options.json), rows)
            print(f"written to {options.json}")


def _score_missing(
    config: Config, words: Sequence[str], quiet: bool
) -> tuple[Config, MergeMixError | None]:
    """Score what is not on record; return the settings with what a launch has told, and an error.

    The error is that of the models that cannot be scored. Standard output is left alone if quiet.
    """
    missing = []
    for word in words:
        asked = asked_of(config, word)
        if _on_record(config, asked) is None:
            missing.append(word)
        else:
            said = sys.stderr if quiet else sys.stdout
            print(f"evaluate: {asked.name}: on record already", file=said)
    if not missing:
        return config, None
    try:
        return start(config, "evaluate", missing, quiet=quiet), None
    except MergeMixError as error:
        return with_recorded_launch(config), error


def _on_record_of(config: Config, words: Sequence[str], all_wanted: bool) -> list[dict[str, Any]]:
    """Return what is on record of the models.

    Raises:
        SearchError: nothing is of one of them, and all are wanted.
    """
    rows = []
    for asked in (asked_of(config, word) for word in words):
        record = _on_record(config, asked)
        if record is not None:
            rows.append({**record, "name": asked.name})
        elif all_wanted:
            raise SearchError(
                f"the scores of {asked.name} do not fit the checkpoints and datasets that are "
                "there now: they were changed while it was scored. Leave them alone and start it "
                "again."
            )
    return rows


def _on_record(config: Config, asked: NamedModel) -> dict[str, Any] | None:
    return recorded(config, asked) if is_known(config) else None


def _add_utility(config: Config, rows: Sequence[dict[str, Any]]) -> str | None:
    """Add the utility on the scale of the search; return why there is none."""
    utility = Utility(config.evaluate.utility, objective(config))
    scale: Scale | None = None
    why = None
    if config.evaluate.utility.normalize == "none" or RunDir(config.run_dir).trials.exists():
        try:
            scale = utility_scale(utility, measured_trials(config))
        except SearchError as error:
            why = f"no utility, because the search gives no scale: {error}"
    else:
        why = "no utility: 0 and 1 are what the search measures, which was not begun"
    for row in rows:
        row["utility"] = row["utility_stderr"] = None
        if scale is not None:
            measured = utility.of_trial(scores_of(row["scores"]), scale)
            row["utility"], row["utility_stderr"] = measured
    return why


def _print(config: Config, rows: Sequence[Mapping[str, Any]]) -> None:
    metrics = [(c, metric) for c, each in objective(config).items() for metric in each]
    table = Table(title="scored as candidates of the search are")
    table.add_column("model")
    for capability, metric in metrics:
        unit = rows[0]["scores"][capability][metric]["unit"]
        table.add_column(f"{capability} {metric}" + (f"\n{unit}" if unit else ""), justify="right")
    has_utility = any(row["utility"] is not None for row in rows)
    if has_utility:
        table.add_column("utility", justify="right")
    for row in rows:
        found = [row["scores"][capability][metric] for capability, metric in metrics]
        cells = [with_error(score["value"], score["stderr"]) for score in found]
        if has_utility:
            cells.append(with_error(row["utility"], row["utility_stderr"]))
        table.add_row(row["name"], *cells)
    console().print(table)
