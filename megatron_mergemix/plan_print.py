"""Print a plan: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_mergemix.memory import SearchMemory, TrainingMemory
from megatron_mergemix.plan import Cost, Plan


def print_json(plan: Plan) -> None:
    """Print the plan as one JSON object; bytes, tokens and operations as plain numbers."""
    record = asdict(plan)
    record["run_dir"] = str(plan.run_dir)
    for memory in ("training_memory", "search_memory"):
        if record[memory] is not None:
            record[memory]["total"] = getattr(plan, memory).total
    print(json.dumps(record, indent=2, allow_nan=False))


def print_tables(plan: Plan) -> None:
    """Print the plan as tables."""
    # A log or a pipe has no width; folded paths would be of no use in it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    tables = {"domains": _domains(plan)}
    if plan.general_share > 0:
        tables[f"what experts are trained on (general share {plan.general_share:g})"] = _components(
            plan
        )
    tables["training runs"] = _runs(plan)
    tables["cost: 6 FLOP per active parameter and token, forward only 2"] = _costs(plan)
    if plan.training_memory is not None and plan.search_memory is not None:
        title = "memory on the fullest rank; activations are a rough estimate"
        tables[title] = _memory(plan.training_memory, plan.search_memory)
    for title, table in tables.items():
        console.print(Text(title, style="bold"))
        console.print(table)
    total, active = plan.parameters.total, plan.parameters.active
    console.print(f"model: {total:,} parameters, {active:,} active per token")
    console.print(Text(f"everything is written to {plan.run_dir}"))
    console.print(
        "alternatives: after the cost table of the MergeMix paper (arXiv 2601.17858, Table 6)"
    )
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}"), style="yellow")


def _domains(plan: Plan) -> Table:
    table = _table("domain, datasets")
    _numbers(table, "documents", "tokens", "share", "expert epochs", "least", "largest")
    for domain in plan.domains:
        epochs = "-" if domain.expert_epochs is None else f"{domain.expert_epochs:.2f}"
        table.add_row(
            domain.name,
            f"{domain.documents:,}",
            amount(domain.train_tokens),
            f"{domain.proportional:.3f}",
            epochs,
            f"{domain.low:.3f}",
            f"{domain.high:.3f}",
        )
        for count in domain.prefixes:
            table.add_row(
                Text(f"  {count.prefix}"), f"{count.documents:,}", amount(count.train_tokens)
            )
    return table


def _components(plan: Plan) -> Table:
    table = _table("expert")
    _numbers(table, *(domain.name for domain in plan.domains))
    for name, mixture in plan.components.items():
        table.add_row(name, *(f"{share:.3f}" for share in mixture.values()))
    return table


def _runs(plan: Plan) -> Table:
    table = _table("run")
    _numbers(table, "steps", "tokens", "most epochs")
    for run in plan.runs:
        epochs = "-" if run.epochs is None else f"{run.epochs:.2f}"
        steps = "-" if run.steps is None else f"{run.steps:,}"
        table.add_row(run.name, steps, amount(run.tokens), epochs)
    return table


def _costs(plan: Plan) -> Table:
    table = _table("what")
    _numbers(table, "runs or models", "tokens", "FLOP", "x this search")
    _cost_rows(table, plan.costs, plan.search_flops)
    table.add_section()
    own = [cost for cost in plan.costs if cost.what in ("experts", "search")]
    _cost_rows(
        table,
        [Cost("this search: experts and search", 1, sum(c.tokens for c in own), plan.search_flops)],
        plan.search_flops,
    )
    table.add_section()
    _cost_rows(table, plan.alternatives, plan.search_flops)
    return table


def _cost_rows(table: Table, costs: Iterable[Cost], unit: float) -> None:
    for cost in costs:
        table.add_row(
            Text(cost.what),
            f"{cost.runs:,}",
            amount(cost.tokens),
            f"{cost.flops:.2e}",
            f"{cost.flops / unit:.3g}",
        )


def _memory(training: TrainingMemory, search: SearchMemory) -> Table:
    table = _table("stage", "what")
    _numbers(table, "bytes")
    rows = (
        ("training", "weights", training.weights),
        ("", "gradients", training.gradients),
        ("", "optimizer states", training.optimizer),
        ("", "activations", training.activations),
        ("", "total", training.total),
        ("search", "live weights", search.live),
        ("", "base and experts", search.base_and_experts),
        ("", "activations", search.activations),
        ("", "total", search.total),
    )
    for stage, what, size in rows:
        table.add_row(stage, what, binary(size), end_section=what == "total")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _numbers(table: Table, *columns: str) -> None:
    for column in columns:
        table.add_column(column, justify="right")


def amount(number: float) -> str:
    """Return a count in thousands, millions, billions or trillions: ``5.00B``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"


def binary(size: float) -> str:
    """Return bytes in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
