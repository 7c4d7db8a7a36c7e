"""``mergemix diagnose``: whether these experts are where merging was seen to work."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from megatron_mergemix.config import Config
from megatron_mergemix.console import console
from megatron_mergemix.diagnosis.record import diagnosis_of, is_complete, on_record
from megatron_mergemix.diagnosis.regime import REGIMES
from megatron_mergemix.errors import SearchError
from megatron_mergemix.experiment.checks import check_checkpoints
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.launch.verbs import experiment_on_record, start
from megatron_mergemix.model_facts import is_known
from megatron_mergemix.run_dir import RunDir


def diagnose(options: argparse.Namespace) -> None:
    """Measure what is not on record, write ``diagnose/result.json`` and show it.

    Raises:
        MergeMixError: base or experts are missing, or cannot be differentiated.
    """
    to_terminal = options.json == "-"
    with experiment_on_record(options.config, options.overrides) as config:
        record, config = _measured(config, quiet=to_terminal)
        diagnosis = diagnosis_of(config, record)
        path = RunDir(config.run_dir).diagnosis
        publish_json(path, diagnosis)
        if to_terminal:
            print(json.dumps(diagnosis, indent=2, allow_nan=False))
            return
        print_diagnosis(diagnosis)
        if options.json is not None:
            publish_json(Path(options.json), diagnosis)
        print(f"written to {options.json or path}")


def _measured(config: Config, quiet: bool) -> tuple[dict[str, Any], Config]:
    """Return what is on record in the end; standard output is left alone if quiet."""
    record = on_record(config) if is_known(config) else None
    if record is not None and is_complete(config, record):
        print("diagnose: on record already", file=sys.stderr if quiet else sys.stdout)
        return record, config
    check_checkpoints(config)
    config = start(config, "diagnose", quiet=quiet)
    record = on_record(config)
    if record is None or not is_complete(config, record):
        raise SearchError(
            f"{RunDir(config.run_dir).diagnosis_measured} does not fit the checkpoints and "
            "datasets that are there now: they were changed while they were diagnosed. Leave them "
            "alone and start it again."
        )
    return record, config


def print_diagnosis(diagnosis: Mapping[str, Any]) -> None:
    """Print a diagnosis as tables, the verdict last."""
    terminal = console()
    tables = {
        "task vectors: size, update size (delta), cosines": _task_vectors(diagnosis),
        "norm of the applied task vector along the simplex": _norms(diagnosis),
        "change of a loss at the base along task vectors, nats per token": _curvature(diagnosis),
        "predicted gap, in theory and without Adam: loss of a trained model minus its proxy's, "
        "nats per token": _gaps(diagnosis["curvature"]),
    }
    for title, table in tables.items():
        terminal.print(title, style="bold")
        terminal.print(table)
    verdict = diagnosis["verdict"]
    terminal.print(f"verdict: {REGIMES[verdict['regime']]}", style="bold")
    for reason in verdict["reasons"]:
        terminal.print(f"- {reason}")


def _task_vectors(diagnosis: Mapping[str, Any]) -> Table:
    experts = diagnosis["experts"]
    table = _table("expert", "norm", "delta", *experts)
    rows = zip(experts, diagnosis["norms"], diagnosis["delta"], diagnosis["cosines"], strict=True)
    for name, norm, delta, row in rows:
        table.add_row(name, f"{norm:.4g}", f"{delta:.2%}", *(f"{cosine:.3f}" for cosine in row))
    return table


def _norms(diagnosis: Mapping[str, Any]) -> Table:
    along = diagnosis["applied_norm_along"]
    mean = sum(along["vertices"].values()) / len(along["vertices"])
    table = _table("mixture", "norm", "of the mean corner")
    named = {name: n for name, n in diagnosis["applied_norm"].items() if n is not None}
    for group in (along["vertices"], along["edges"], named):
        for name, norm in group.items():
            table.add_row(name, f"{norm:.4g}", f"{norm / mean:.2f}" if mean > 0 else "-")
        table.add_section()
    return table


def _curvature(diagnosis: Mapping[str, Any]) -> Table:
    experts: Sequence[str] = diagnosis["experts"]
    table = _table("loss", "order", *experts, "missed", "two steps disagree by")
    for name, loss in diagnosis["curvature"].items():
        bent = [row[place] / 2 for place, row in enumerate(loss["second_order"])]
        error, differ = f"{loss['expansion_error']:.0%}", f"{max(loss['disagreements']):.2%}"
        table.add_row(name, "first", *(f"{v:+.4f}" for v in loss["first_order"]), error, differ)
        table.add_row(f"  {loss['source']}", "second", *(f"{value:+.4f}" for value in bent))
        if loss["gamma"] is not None:
            table.add_row("", "gamma", *(f"{value:.3f}" for value in loss["gamma"]))
        table.add_section()
    return table


def _gaps(curvature: Mapping[str, Any]) -> Table:
    named = ("uniform", "proportional", "learned", "largest")
    table = _table("domain", *named, "spread, of the loss's", "rank correlation in theory")
    for name, loss in curvature.items():
        if (gap := loss["gap"]) is not None:
            cells = ["-" if gap[at] is None else f"{gap[at]:+.5f}" for at in named]
            ratio, ranks = f"{gap['spread_ratio']:.1%}", f"{gap['rank_correlation']:.3f}"
            table.add_row(name, *cells, ratio, ranks)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table
