"""What a search has put on record: its trials, its result and the learned blend. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix.config import Config
from megatron_mergemix.data.blend_files import current_blend, write_blend
from megatron_mergemix.errors import SearchError
from megatron_mergemix.experiment.digests import search_digests, trial_digests
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import changed_digests, read_journal
from megatron_mergemix.trials import Trial


def measured_trials(config: Config) -> list[Trial]:
    """Return the trials of this search, without opening its journal for writing.

    Raises:
        SearchError: there is no journal, it is damaged, or its trials were measured on something
            else.
    """
    path = RunDir(config.run_dir).trials
    digests, trials = read_journal(path)
    if digests != trial_digests(config):
        raise SearchError(
            f"the trials in {path} were measured on something else than these settings name. "
            "Run `mergemix search mix.yaml`: it says what differs."
        )
    return trials


def search_result(config: Config) -> dict[str, Any] | None:
    """Return the result of this very search, or None when it has not ended yet."""
    path = RunDir(config.run_dir).result
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["digests"] == search_digests(config) else None


def finished_search(config: Config) -> dict[str, Any]:
    """Return the result of this very search.

    Raises:
        SearchError: it has not ended yet, or what is there is of other settings; says which.
    """
    result = search_result(config)
    if result is None:
        raise SearchError(
            "there is no learned mixture for these settings yet. Run `mergemix search mix.yaml` "
            f"first.{_what_another_result_is_of(config)}"
        )
    return result


def _what_another_result_is_of(config: Config) -> str:
    """Return a sentence on the result that is there for other settings; empty without one."""
    path = RunDir(config.run_dir).result
    if not path.exists():
        return ""
    changed = changed_digests(json.loads(path.read_text())["digests"], search_digests(config))
    hint = ""
    if any(text.startswith("bounds:") for text in changed):
        hint = " The bounds depend on blend.train_tokens where a domain has max_epochs."
    return f" {path} is of other settings ({'; '.join(changed)}).{hint}"


def write_learned_blend(config: Config, result: Mapping[str, Any]) -> Path:
    """Write what the search recommends as Megatron blend files; return their folder.

    Raises:
        MergeMixError: another process is at it.
    """
    run_dir = RunDir(config.run_dir)
    with run_dir.lock("blend"):
        return write_blend(
            run_dir.blend,
            result["mixture"],
            config,
            utility=result["utility"],
            utility_stderr=result["utility_stderr"],
            provenance={"source": result["source"], "digests": result["digests"]},
        )


def learned_blend(config: Config, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``blend.yaml`` of this very search and of today's datasets; None without one.

    Raises:
        MergeMixError: they could not be written today; says why.
    """
    written = current_blend(RunDir(config.run_dir).blend, result["mixture"], config)
    is_own = written is not None and written["provenance"]["digests"] == result["digests"]
    return written if is_own else None
