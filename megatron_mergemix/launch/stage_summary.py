"""Tables that end a hierarchical search: what each stage found, and what was composed of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron_mergemix.config import Config
from megatron_mergemix.console import console
from megatron_mergemix.launch.numbers import with_error


def print_stages(config: Config, result: Mapping[str, Any], norms: Mapping[str, float]) -> None:
    """Print what each stage found, then the candidates, with domains as rows: there are many.

    Args:
        config: the experiment.
        result: of the search.
        norms: of the merge weights of every candidate.
    """
    terminal = console()
    terminal.print(_stages(config, result))
    for stage in result["stages"]:
        for note in stage.get("notes", ()):
            terminal.print(f"note on stage {stage['stage']}: {note}")
    terminal.print(_candidates(config, result, norms))


def _stages(config: Config, result: Mapping[str, Any]) -> Table:
    table = Table(title=f"search {config.search.hierarchy}: what each stage found")
    for column in ("stage", "mixture over what it mixes", "candidate"):
        table.add_column(column)
    for column in ("share", "trials", "reused", "measured U"):
        table.add_column(column, justify="right")
    for stage in result["stages"]:
        if "skipped" in stage:
            table.add_row(stage["stage"], "not searched, see the notes")
            continue
        found = "every domain alone"
        if "mixture" in stage:
            found = "  ".join(f"{name} {share:.3f}" for name, share in stage["mixture"].items())
        table.add_row(
            stage["stage"],
            found,
            stage.get("source", ""),
            f"{stage['share']:.3f}",
            str(stage["trials"]),
            str(stage["reused"]),
            with_error(stage["utility"], stage["stderr"]) if "utility" in stage else "",
        )
    return table


def _candidates(config: Config, result: Mapping[str, Any], norms: Mapping[str, float]) -> Table:
    alternatives = result["alternatives"]
    table = Table(title="candidates, each scored by a real merge")
    table.add_column("group")
    table.add_column("domain")
    for name in alternatives:
        taken = name == result["source"]
        table.add_column(f"{name} <- taken" if taken else name, justify="right")
    for group, leaves in config.leaves_by_group().items():
        for place, leaf in enumerate(leaves):
            table.add_row(
                group if place == 0 else "",
                leaf if len(leaves) > 1 else "",
                *(f"{candidate['mixture'][leaf]:.3f}" for candidate in alternatives.values()),
                end_section=place == len(leaves) - 1,
            )
    for what, numbers in {
        "norm of alpha": [f"{norms[name]:.2f}" for name in alternatives],
        "predicted U": [f"{each['predicted']:.4f}" for each in alternatives.values()],
        "measured U": [f"{each['observed']:.4f}" for each in alternatives.values()],
        "behind by": [
            "" if name == result["source"] else with_error(each["gain"], each["gain_stderr"])
            for name, each in alternatives.items()
        ],
    }.items():
        table.add_row(what, "", *numbers)
    return table
