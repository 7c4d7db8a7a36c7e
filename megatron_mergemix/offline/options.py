"""Arguments that ``mergemix merge`` and ``mergemix average`` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mergemix.merge.checkpoints import Settings, Summary


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the result goes, what is checked, and how many hands there are."""
    add = parser.add_argument
    add("--output", metavar="ROOT", type=Path, required=True, help="checkpoint root to write")
    add("--overwrite", action="store_true", help="replace ROOT, in one step, if mergemix wrote it")
    add(
        "--layout",
        choices=("common.pt", "common_state"),
        default="common.pt",
        help="common.pt: read by Megatron Core 0.16 to main (default); common_state: 0.19 to main",
    )
    add(
        "--from-master-weights",
        action="store_true",
        help="read fp32 master weights where the optimizer state holds them per parameter",
    )
    add("--allow-non-finite", action="store_true", help="publish NaN and infinities too")
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="trust the inputs: compare neither integrity.json nor the CRC-32 of what is read; "
        "what would execute code when Megatron loads it is refused all the same",
    )
    add("--write-integrity", action="store_true", help="write integrity.json (SHA-256) too")
    add("--workers", type=_positive, default=1, help="processes (default: 1)")
    add("--threads", type=_positive, help="per process (default: processors, 2 to 8)")


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that the arguments stand for."""
    from megatron_mergemix.merge.checkpoints import Settings

    known = ("layout", "overwrite", "allow_non_finite", "verify", "write_integrity", "workers")
    values = {name: getattr(options, name) for name in (*known, "from_master_weights")}
    if options.threads is not None:
        values["threads"] = options.threads
    return Settings(**values, vocab_size=getattr(options, "vocab_size", None))


def show(summary: Summary) -> None:
    """Print what was done."""
    from megatron_mergemix.merge import kernel

    if slower := kernel.missing("cpu"):
        print(f"warning: {slower}")
    for (file, name), count in sorted(summary.non_finite.items()):
        print(f"warning: {file}: {name}: {count} NaN or infinite elements")
    gigabytes = (summary.read + summary.written) / 1e9
    print(
        f"wrote {summary.folder}  ({gigabytes:.2f} GB read and written in "
        f"{summary.seconds:.2f} s, {gigabytes / max(summary.seconds, 1e-9):.1f} GB/s)"
    )
    print(f"load it with: --load {summary.folder.parent} --finetune")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return number
