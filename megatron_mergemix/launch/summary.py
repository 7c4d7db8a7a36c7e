"""Tables that end a stage: what was found, and where the files are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mergemix.config import Config
from megatron_mergemix.data.blend import epochs
from megatron_mergemix.run_dir import RunDir


def print_search(config: Config, result: Mapping[str, Any]) -> None:
    """Print the candidates for the optimum and which one was taken."""
    domains = list(config.domains)
    table = Table(title="search: candidates for the optimum, each scored by a real merge")
    table.add_column("candidate")
    for domain in domains:
        table.add_column(domain, justify="right")
    table.add_column("predicted U", justify="right")
    table.add_column("measured U", justify="right")
    table.add_column("behind by", justify="right")
    for name, candidate in result["alternatives"].items():
        taken = name == result["source"]
        table.add_row(
            f"{name} <- taken" if taken else name,
            *(f"{candidate['mixture'][domain]:.3f}" for domain in domains),
            _number(candidate["predicted"]),
            _number(candidate["observed"]),
            "" if taken else _with_error(candidate["gain"], candidate["gain_stderr"]),
        )
    console = _console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False)


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
    """Print the really trained reference models side by side, best first."""
    table = Table(title="reference models, really trained with the same tokens, best first")
    table.add_column("mixture")
    for domain in config.domains:
        table.add_column(domain, justify="right")
    table.add_column("utility", justify="right")
    table.add_column("behind by", justify="right")
    for capability in rows[0]["scores"]:
        metric = config.evaluate.capabilities[capability].loss.metric
        table.add_column(f"{capability} {metric}", justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            *(f"{row['mixture'][domain]:.3f}" for domain in config.domains),
            _number(row["utility"]),
            "" if row is rows[0] else _with_error(row["behind"], row["behind_stderr"]),
            *(f"{value:.4f}" for value in row["scores"].values()),
        )
    _console().print(table)


def print_files(config: Config) -> None:
    """Print where everything is."""
    run_dir = RunDir(config.run_dir)
    print(f"trials:      {run_dir.trials}")
    print(f"result:      {run_dir.result}")
    print(f"blend:       {run_dir.blend}/")
    print(f"tensorboard: tensorboard --logdir {run_dir.root / 'tensorboard'}")


def _console() -> Console:
    """Return the terminal, or in a log a width at which no table has to fold its words."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _with_error(value: float, stderr: float | None) -> str:
    return _number(value) if stderr is None else f"{value:.4f} +- {stderr:.4f}"
