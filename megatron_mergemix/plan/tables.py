"""Print a plan: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from rich import box
from rich.table import Table

from megatron_mergemix.console import console
from megatron_mergemix.plan.make import Plan
from megatron_mergemix.plan.memory import SearchMemory, TrainingMemory
from megatron_mergemix.plan.outlook import Outlook
from megatron_mergemix.plan.part_costs import OF_A_SEARCH, Cost
from megatron_mergemix.plan.search_cost import SearchCost
from megatron_mergemix.plan.task_vectors import TaskVectors


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
    terminal = console()
    tables = {"domains": _domains(plan)}
    if plan.general_share != 0:
        given = "experts.components"
        source = given if plan.general_share is None else f"general share {plan.general_share:g}"
        tables[f"what experts are trained on ({source})"] = _components(plan)
    if len(plan.stages) > 1:
        tables["stages of the search, each over what it mixes"] = _stages(plan)
    tables["training runs"] = _runs(plan)
    tables["cost: 6 FLOP per active parameter and token, forward only 2"] = _costs(plan)
    if plan.training_memory is not None and plan.search_memory is not None:
        title = "memory on the fullest rank; activations are a rough estimate"
        tables[title] = _memory(plan.training_memory, plan.search_memory)
    if plan.outlook is not None:
        tables[_outlook_title(plan.outlook)] = _outlook(plan.outlook)
    if plan.task_vectors is not None:
        tables["task vectors of the experts, on record"] = _task_vectors(plan.task_vectors)
    for title, table in tables.items():
        terminal.print(title, style="bold")
        terminal.print(table)
    total, active = plan.parameters.total, plan.parameters.active
    terminal.print(f"model: {total:,} parameters, {active:,} active per token")
    if plan.amplification is not None:
        (where, largest), equal = plan.amplification.largest, plan.amplification.uniform
        terminal.print(
            "norm of merge weights (alpha), by which the noise of experts enters the search: at "
            f"most {largest:.2f} (vertex of {where}), {equal:.2f} at equal shares"
        )
    if plan.outlook is not None:
        terminal.print(_assumptions(plan.outlook))
    terminal.print(f"everything is written to {plan.run_dir}")
    terminal.print(
        "alternatives: after the cost table of the MergeMix paper (arXiv 2601.17858, Table 6)"
    )
    for note in plan.notes:
        terminal.print(f"note: {note}")
    for warning in plan.warnings:
        terminal.print(f"warning: {warning}", style="yellow")


def _domains(plan: Plan) -> Table:
    table = _table("domain, datasets")
    _numbers(table, "documents", "tokens", "share", "expert epochs", "least", "largest")
    for domain in plan.domains:
        epochs = "-" if domain.expert_epochs is None else f"{domain.expert_epochs:.2f}"
        table.add_row(
            domain.name,
            "-" if domain.documents is None else f"{domain.documents:,}",
            "-" if domain.train_tokens is None else amount(domain.train_tokens),
            "-" if domain.proportional is None else f"{domain.proportional:.3f}",
            epochs,
            f"{domain.low:.3f}",
            "-" if domain.high is None else f"{domain.high:.3f}",
        )
        for count in domain.prefixes:
            table.add_row(f"  {count.prefix}", f"{count.documents:,}", amount(count.train_tokens))
    return table


def _components(plan: Plan) -> Table:
    table = _table("expert")
    _numbers(table, *(domain.name for domain in plan.domains))
    for name, mixture in plan.components.items():
        shares = ["-"] * len(plan.domains)
        if mixture is not None:
            shares = [f"{share:.3f}" for share in mixture.values()]
        table.add_row(name, *shares)
    return table


def _stages(plan: Plan) -> Table:
    table = _table("stage", "mixes")
    _numbers(table, "models at most")
    for stage in plan.stages:
        table.add_row(stage.name, ", ".join(stage.variables), f"{stage.models:,}")
    return table


def _runs(plan: Plan) -> Table:
    table = _table("run")
    _numbers(table, "steps", "saves in its mean", "tokens", "most epochs")
    for run in plan.runs:
        epochs = "-" if run.epochs is None else f"{run.epochs:.2f}"
        steps = "-" if run.steps is None else f"{run.steps:,}"
        averaged = "-" if run.averaged is None else f"{run.averaged:,}"
        table.add_row(run.name, steps, averaged, amount(run.tokens), epochs)
    return table


def _costs(plan: Plan) -> Table:
    table = _table("what")
    _numbers(table, "runs or models", "tokens", "FLOP", "x this search")
    _cost_rows(table, plan, plan.costs)
    table.add_section()
    own = [cost for cost in plan.costs if cost.what in OF_A_SEARCH]
    tokens = sum(cost.tokens for cost in own)
    whole = Cost("this search: experts and search", 1, tokens, plan.search_flops)
    _cost_rows(table, plan, [whole])
    table.add_section()
    _cost_rows(table, plan, plan.alternatives)
    return table


def _cost_rows(table: Table, plan: Plan, costs: Iterable[Cost]) -> None:
    for cost in costs:
        times = plan.times_search(cost)
        table.add_row(
            cost.what,
            f"{cost.runs:,}",
            amount(cost.tokens),
            f"{cost.flops:.2e}",
            "-" if times is None else f"{times:.3g}",
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
        *([("", "gradients", search.gradients)] if search.gradients else []),
        ("", "activations", search.activations),
        *([("", "KV cache of tasks", search.kv_cache)] if search.kv_cache else []),
        ("", "total", search.total),
    )
    for stage, what, size in rows:
        table.add_row(stage, what, binary(size), end_section=what == "total")
    return table


def _outlook_title(outlook: Outlook) -> str:
    return (
        f"hours on {outlook.gpu.name}: {outlook.models:,} models scored on {outlook.windows:,} "
        f"windows of {outlook.seq_length:,} tokens, experts of {amount(outlook.expert_tokens)} "
        "tokens"
    )


def _outlook(outlook: Outlook) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    _numbers(table, "K", "GPUs", "TP", "PP", "DP", "live", "copies")
    table.add_column("held in")
    _numbers(table, "forward", "at once", "merge", "evaluate", "each", "search", "experts")
    if outlook.own is not None:
        _outlook_row(table, "yours", outlook.own)
        table.add_section()
    for row in outlook.scale:
        if row.cost is None:
            table.add_row(
                row.model, str(row.experts), str(row.gpus), *("-",) * 5, "no room", *("-",) * 7
            )
        else:
            _outlook_row(table, row.model, row.cost)
    return table


def _outlook_row(table: Table, name: str, cost: SearchCost) -> None:
    numbers = (cost.experts, cost.gpus, cost.tensor, cost.pipeline, cost.replicas)
    gib = [f"{size / 2**30:.2f}" for size in (cost.live, cost.copies, cost.activations)]
    seconds = (cost.merge_seconds, cost.evaluate_seconds, cost.candidate_seconds)
    table.add_row(
        name,
        *map(str, numbers),
        *gib[:2],
        cost.place if cost.fits else "no room",
        gib[2],
        str(cost.at_once),
        *map(_short, (*seconds, cost.search_hours, cost.experts_hours)),
    )


def _short(number: float | None) -> str:
    """Return three digits of a number of seconds or hours."""
    if number is None:
        return "-"
    if number < 0.0005:
        return "<0.001"
    return f"{number:,.0f}" if number >= 100 else f"{number:.{2 if number >= 1 else 3}f}"


def _assumptions(outlook: Outlook) -> str:
    reached = outlook.efficiency
    return (
        "live weights, copies of base and experts, and a forward pass in GiB of the fullest rank; "
        "merge, evaluate and from one candidate to the next (each) in seconds, search and experts "
        "in hours. Replicas (DP) score different candidates at once, or share the windows of one, "
        "whatever ends first.\n"
        f"Assumed: {reached.matmul:.0%} of the peak FLOP/s in a forward pass and "
        f"{reached.training:.0%} in training, {reached.merge:.0%} of memory bandwidth in a merge, "
        f"{reached.activations:.0%} between matrix products, {reached.link:.0%} of the host link; "
        "starting and reading the checkpoints come on top, once per search"
    )


def _task_vectors(vectors: TaskVectors) -> Table:
    table = _table("expert")
    _numbers(table, "norm", "delta", *(f"cosine {name}" for name in vectors.experts))
    sizes = ["-"] * len(vectors.experts)
    if vectors.delta is not None:
        sizes = [f"{update:.2%}" for update in vectors.delta]
    rows = zip(vectors.experts, vectors.norms, sizes, vectors.cosines, strict=True)
    for name, norm, size, row in rows:
        table.add_row(name, f"{norm:.4g}", size, *(f"{cosine:.3f}" for cosine in row))
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
