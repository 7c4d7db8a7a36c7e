#!/usr/bin/env python3
"""Make the patch that calls megatron-mergemix's hooks from a Megatron-LM tree, or check it.

    tools/make_patch.py CHECKOUT [--output FILE]    print or write the patch for this tree
    tools/make_patch.py CHECKOUT --check            is the committed one this, and does it apply?

The patch only inserts lines. Where, is found by the text of one line each, which must be there
exactly once: in any other tree nothing is made. The checkout is only read.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).resolve().parents[1] / "patches"
MARK = "  # megatron-mergemix"
IMPORT = "from megatron_mergemix.megatron_lm import hooks as mergemix"


class Refusal(Exception):
    """This tree cannot be patched, or its patch is not right; the message says why."""


@dataclass(frozen=True)
class Insertion:
    """A call to insert ``above``, ``below`` or ``inside`` the block of the one line with a text."""

    anchor: str
    where: str
    call: str


ARGUMENTS = "megatron/training/arguments.py"
IN_ARGUMENTS = (
    Insertion("parser = _add_sft_args(parser)", "below", "parser = mergemix.add_arguments(parser)"),
    Insertion(
        "args.world_size = int(os.getenv(\"WORLD_SIZE\", '1'))",
        "below",
        "mergemix.after_parsing(args)",
    ),
    Insertion(
        "def validate_args(args, defaults={}):", "inside", "mergemix.before_validation(args)"
    ),
)
SCRIPT = "pretrain_gpt.py"
OTHER_SCRIPTS = "pretrain_*.py"
IN_SCRIPT = Insertion(
    "inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)",
    "above",
    "pretrain = mergemix.wrap_pretrain(pretrain)",
)


def make_patch(checkout: Path) -> str:
    """Return the patch for a tree.

    Raises:
        Refusal: it is no git checkout, patched already, or none that this tool knows.
    """
    header = f"megatron-mergemix in Megatron-LM {_commit(checkout)}, made by tools/make_patch.py\n"
    changes = {ARGUMENTS: IN_ARGUMENTS, SCRIPT: (IN_SCRIPT,)}
    for script in sorted(checkout.glob(OTHER_SCRIPTS)):
        if any(IN_SCRIPT.anchor in line for line in _lines(checkout, script.name)):
            changes[script.name] = (IN_SCRIPT,)
    return header + "".join(
        _difference(checkout, file, insertions) for file, insertions in changes.items()
    )


def check_patch(checkout: Path) -> Path:
    """Return the committed patch for a tree, which is what the tool makes and applies cleanly.

    Raises:
        Refusal: it is not, or there is none.
    """
    patch = make_patch(checkout)
    commit = _commit(checkout)
    for file in sorted(PATCHES.glob("*.patch")):
        if commit not in file.read_text(encoding="utf-8").partition("\n")[0]:
            continue
        if file.read_text(encoding="utf-8") != patch:
            raise Refusal(f"{file} is not what this tool makes for {checkout}. Make it again.")
        result = _git(checkout, "apply", "--check", str(file))
        if result.returncode:
            raise Refusal(f"{file} does not apply to {checkout}: {result.stderr.strip()}")
        return file
    raise Refusal(f"{PATCHES} has no patch for commit {commit} ({checkout}). Make one.")


def _difference(checkout: Path, file: str, insertions: Iterable[Insertion]) -> str:
    """Return the part of the patch for one file."""
    old = _lines(checkout, file)
    if any("megatron_mergemix" in line for line in old):
        raise Refusal(f"{checkout / file} is patched already; undo that with git apply -R.")
    new: list[str] = list(old)
    for insertion in insertions:
        at, indent = _place(new, insertion, checkout / file)
        new[at:at] = [f"{indent}{line}{MARK}\n" for line in (IMPORT, insertion.call)]
    # One line of context: this repository holds no more of Megatron-LM's text than it must.
    return "".join(difflib.unified_diff(old, new, f"a/{file}", f"b/{file}", n=1))


def _place(lines: list[str], insertion: Insertion, path: Path) -> tuple[int, str]:
    """Return before which line to insert, and how deep."""
    found = [number for number, line in enumerate(lines) if insertion.anchor in line]
    if len(found) != 1:
        raise Refusal(
            f"{path} has the line `{insertion.anchor}` {len(found)} times, expected once: this "
            "is none of the Megatron-LM trees that this tool knows."
        )
    anchor = lines[found[0]]
    indent = anchor[: len(anchor) - len(anchor.lstrip())]
    if insertion.where == "inside":
        indent += "    "
    return found[0] + (insertion.where != "above"), indent


def _lines(checkout: Path, file: str) -> list[str]:
    path = checkout / file
    if not path.is_file():
        raise Refusal(f"{path} does not exist: {checkout} is no Megatron-LM tree.")
    with path.open(encoding="utf-8", newline="\n") as stream:
        return list(stream)


def _commit(checkout: Path) -> str:
    result = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
    if result is None or result.returncode:
        raise Refusal(f"{checkout} is no git checkout: a patch says for which commit it is.")
    return result.stdout.strip()


def _git(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _write(text: str, path: Path) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main() -> None:
    """Do what the command line says."""
    summary = "Make or check the patch that calls megatron-mergemix's hooks from Megatron-LM."
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("checkout", type=Path, help="a git checkout of Megatron-LM; only read")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the one in patches/")
    action.add_argument("--output", type=Path, help="file to write; default: standard output")
    flags = parser.parse_args()
    try:
        if flags.check:
            print(f"{check_patch(flags.checkout)} is right and applies to {flags.checkout}")
        elif flags.output:
            _write(make_patch(flags.checkout), flags.output)
        else:
            sys.stdout.write(make_patch(flags.checkout))
    except (Refusal, OSError) as error:
        raise SystemExit(f"make_patch: {error}") from None


if __name__ == "__main__":
    main()
