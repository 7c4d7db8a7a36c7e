"""Tables that end a stage: what was found, and where the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_mergemix.config import Config
from megatron_mergemix.console import console
from megatron_mergemix.data.blend import epochs
from megatron_mergemix.experiment.strategy import merge_weights_of
from megatron_mergemix.launch.numbers import number, with_error
from megatron_mergemix.launch.stage_summary import print_stages
from megatron_mergemix.mixtures.components import norm, weights_text
from megatron_mergemix.run_dir import RunDir


def print_search(config: Config, result: Mapping[str, Any]) -> None:
    """Print the candidates for the optimum and which one was taken."""
    domains, terminal = list(config.domains), console()
    norms = {
        name: norm(merge_weights_of(config)(candidate["mixture"]).values())
        for name, candidate in result["alternatives"].items()
    }
    if "stages" in result:
        print_stages(config, result, norms)
    else:
        terminal.print(_candidates(result, domains, norms))
    if alpha := weights_text(result["mixture"], result["merge_weights"]):
        terminal.print(f"merge weights of the mixture that was taken: {alpha}")
    for line in _confidence(result, domains):
        terminal.print(line, soft_wrap=True)
    if models := (result.get("held_out") or {}).get("models"):
        terminal.print(_held_out(models))
    if line := _ensemble(result["surrogates"]):
        terminal.print(line, soft_wrap=True)
    for note in result["notes"]:
        terminal.print(f"note: {note}")


def _candidates(
    result: Mapping[str, Any], domains: Sequence[str], norms: Mapping[str, float]
) -> Table:
    table = Table(title="search: candidates for the optimum, each scored by a real merge")
    table.add_column("candidate")
    for domain in domains:
        table.add_column(domain, justify="right")
    table.add_column("norm of alpha", justify="right")
    table.add_column("predicted U", justify="right")
    table.add_column("measured U", justify="right")
    table.add_column("behind by", justify="right")
    for name, candidate in result["alternatives"].items():
        taken = name == result["source"]
        table.add_row(
            f"{name} <- taken" if taken else name,
            *(f"{candidate['mixture'][domain]:.3f}" for domain in domains),
            f"{norms[name]:.2f}",
            number(candidate["predicted"]),
            number(candidate["observed"]),
            "" if taken else with_error(candidate["gain"], candidate["gain_stderr"]),
        )
    return table


def _held_out(models: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="on items that the search never saw, and by how much the recommended gains")
    table.add_column("mixture")
    for column in ("U searched", "U held out", "gain searched", "gain held out"):
        table.add_column(column, justify="right")
    for name, row in models.items():
        sides = [(row[side], row[f"{side}_stderr"]) for side in ("searched", "held_out")]
        gains = [
            with_error(row[gain], row[f"{gain}_stderr"]) if gain in row else ""
            for gain in ("gain_searched", "gain_held_out")
        ]
        table.add_row(name, *(with_error(*side) for side in sides), *gains)
    return table


def _confidence(result: Mapping[str, Any], domains: Sequence[str]) -> list[str]:
    """Return what is known of the recommended mixture's utility, in plain lines."""
    low, high = result["interval"]
    lines = [f"U {number(result['utility'])}, 95 % interval {low:.4f} to {high:.4f}"]
    if result["items"] != "new items":
        lines[0] += " on the items of this search"
    if result["better_than"]:
        chances = ", than ".join(
            f"{name} with probability {_probability(value)}"
            for name, value in result["better_than"].items()
        )
        lines.append(f"better than {chances}")
    good = result["as_good"]
    shares = (f"{n} {good['least'][n]:.2f} to {good['largest'][n]:.2f}" for n in domains)
    share = "less than 0.1" if good["share"] < 1e-3 else f"{100 * good['share']:.2g}"
    lines.append(f"as good within noise: {share} % of the possible mixtures: {', '.join(shares)}")
    for name, mixture in good["nearest"].items():
        text = ", ".join(f"{domain} {mixture[domain]:.3f}" for domain in domains)
        lines.append(f"  of these nearest to {name}: {text}")
    return lines


def _ensemble(surrogates: Mapping[str, Mapping[str, Any]]) -> str:
    """Return where the experts' averaged probabilities helped; empty without search.ensemble."""
    parts = [
        f"{name} {found['rmse_without']:.4g} -> {found['rmse']:.4g} "
        f"({'used' if found['used'] else 'not used'}, rho {found['rho']:.2f})"
        for name, evidence in surrogates.items()
        if (found := evidence.get("ensemble"))
    ]
    if not parts:
        return ""
    return f"ensemble of the experts, leave-one-out error without -> with it: {', '.join(parts)}"


def _probability(value: float) -> str:
    """Return it as far as the draws tell it."""
    return "above 0.99" if value > 0.99 else "below 0.01" if value < 0.01 else f"{value:.2f}"


def print_blend(config: Config, mixture: Mapping[str, float], directory: Path) -> None:
    """Print the line that goes into a Megatron launch, and how often it repeats each domain."""
    line = (directory / "data_path.txt").read_text().strip()
    print(f"\nlearned blend, ready for pretrain_gpt.py:\n{line}")
    tokens = config.blend.train_tokens
    if tokens is not None:
        counts = epochs(mixture, config.domains, config.blend.split.replace(" ", ""), tokens)
        times = ", ".join(f"{name} {count:.3g}" for name, count in counts.items())
        print(f"epochs over {tokens:.4g} tokens: {times}")
    print(f"the same as files: {directory}/\n")


def print_comparison(config: Config, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the really trained reference models side by side, best first.

    Args:
        config: the experiment.
        rows: of the result of the validation; see :mod:`megatron_mergemix.validation.fidelity`.
    """
    table = Table(title="reference models, really trained with the same tokens, best first")
    # Where there are many metrics, their headers give way, not what the table is about.
    table.add_column("mixture", min_width=max(len(row["name"]) for row in rows))
    for domain in config.domains:
        table.add_column(domain, justify="right")
    table.add_column("utility", justify="right")
    table.add_column("its merge", justify="right")
    table.add_column("behind by", justify="right", min_width=len("0.0000 +- 0.0000"))
    for capability, metrics in rows[0]["scores"].items():
        for metric in metrics:
            table.add_column(f"{capability} {metric}", justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            *(f"{row['mixture'][domain]:.3f}" for domain in config.domains),
            number(row["utility"]),
            number(row["proxy"]["utility"]),
            "" if row is rows[0] else with_error(row["behind"], row["behind_stderr"]),
            *(f"{value:.4f}" for each in row["scores"].values() for value in each.values()),
        )
    console().print(table)


def print_files(config: Config) -> None:
    """Print where everything is."""
    run_dir = RunDir(config.run_dir)
    print(f"trials:      {run_dir.trials}")
    print(f"result:      {run_dir.result}")
    print(f"blend:       {run_dir.blend}/")
    print(f"tensorboard: tensorboard --logdir {run_dir.root / 'tensorboard'}")
    print(f"all on one page: mergemix report {run_dir.root}")
