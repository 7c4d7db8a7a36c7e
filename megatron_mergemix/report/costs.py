"""What an experiment was planned to cost, and the seconds that are on record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.experiment.named_files import check_files
from megatron_mergemix.plan.make import Plan, plan_of
from megatron_mergemix.report.gather import Run, read_json
from megatron_mergemix.report.table import Cell, Table


def planned_table(run: Run) -> Table | str:
    """Return tokens and floating-point operations by part and of alternatives, or why not."""
    try:
        plan = _plan(run)
    except MergeMixError as error:
        return f"The planned cost is not known: {error}"
    rows: list[list[Cell]] = [
        [cost.what, cost.runs, float(cost.tokens), cost.flops, plan.times_search(cost), cost.source]
        for cost in (*plan.costs, *plan.alternatives)
    ]
    columns = ["what", "runs or models", "tokens", "FLOP", "times this search", "from"]
    caption = "Cost by the settings, and of other ways to find a mixture"
    return Table("costs", caption, columns, rows)


def _plan(run: Run) -> Plan:
    try:
        return plan_of(run.config, check_files(run.config))
    except MergeMixError:
        # Without datasets or checkpoints the settings alone tell, but for a launch's model.
        if run.config.model is None:
            raise
        return plan_of(run.config, None)


def measured_table(run: Run) -> Table:
    """Return the seconds of every part that are on record."""
    rows: list[list[Cell]] = [
        [name, 1, found.get("tokens"), found.get("seconds")] for name, found in _trained(run)
    ]
    for phase in ("merge", "evaluate"):
        seconds = [t.seconds[phase] for t in run.trials if phase in t.seconds]
        if seconds:
            rows.append([f"search: {phase} candidates", len(seconds), None, float(sum(seconds))])
    if run.result is not None:
        rows.append(["search: its last start, all in all", 1, None, run.result["seconds"]])
    costs = {} if run.validation is None else run.validation.get("costs") or {}
    for name, found in costs.items():
        rows.append([f"in all: {name}", found.get("runs"), found["tokens"], found["seconds"]])
    columns = ["what", "runs or models", "tokens", "seconds"]
    return Table("seconds", "Time on record", columns, rows)


def _trained(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    root: Path = run.run_dir.root
    for kind in ("base", "experts/*", "references/*"):  # beside a run lies its lock
        for path in sorted(root.glob(f"{kind}/finished.json")):
            yield str(path.parent.relative_to(root)), read_json(path)
