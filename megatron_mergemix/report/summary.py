"""What stands on top of a report: the learned mixture, its utility, and how sure both are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mergemix.report.gather import Run
from megatron_mergemix.report.page import Summary, Tile

MOST_DOMAINS = 8


def summary_of(run: Run) -> Summary:
    """Return the summary of a run, finished or not."""
    return Summary(
        title=f"mergemix: {run.run_dir.root.name}",
        lead=_lead(run),
        tiles=list(_tiles(run)),
        notes=list(run.result["notes"]) if run.result is not None else [],
        missing=run.missing,
    )


def _lead(run: Run) -> str:
    failed = sum(trial.error is not None for trial in run.trials)
    lost = f", {failed} of them failed" if failed else ""
    strategy: str = run.config.search.strategy
    if run.config.search.hierarchy is not None:
        strategy += f", {run.config.search.hierarchy}"
    return (
        f"{len(run.domains)} domains, {len(run.config.expert_names)} experts, {len(run.trials)} "
        f"trials{lost}, strategy {strategy}. In {run.run_dir.root.resolve()}."
    )


def _tiles(run: Run) -> Iterator[Tile]:
    result = run.result
    if result is None:
        return
    good: Mapping[str, Any] = result["as_good"]
    ordered = sorted(run.domains, key=lambda name: -result["mixture"][name])
    for name in ordered[:MOST_DOMAINS]:
        remark = f"{good['least'][name]:.2f} to {good['largest'][name]:.2f} is as good"
        yield Tile(name, f"{result['mixture'][name]:.3f}", remark)
    if len(ordered) > MOST_DOMAINS:
        rest = sum(result["mixture"][name] for name in ordered[MOST_DOMAINS:])
        yield Tile(f"{len(ordered) - MOST_DOMAINS} more domains", f"{rest:.3f}", "in the tables")
    low, high = result["interval"]
    remark = f"95 %: {low:.3f} to {high:.3f}"
    if result["items"] != "new items":
        remark += ", these items"
    yield Tile(f"utility ({result['source']})", f"{result['utility']:.3f}", remark)
    for name, chance in result["better_than"].items():
        text = "above 0.99" if chance > 0.99 else "below 0.01" if chance < 0.01 else f"{chance:.2f}"
        yield Tile(f"better than {name}", text, "probability")
    share = "< 0.1" if good["share"] < 1e-3 else f"{100 * good['share']:.2g}"
    yield Tile("as good within noise", f"{share} %", "of all possible mixtures")
