"""The command line starts without anything heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("numpy", "yaml", "pydantic", "rich", "scipy", "sklearn", "torch", "megatron")

CODE = """
import contextlib, json, sys
from megatron_mergemix.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""


def loaded(*arguments: str) -> set[str]:
    """Return the top-level packages that are loaded after a command."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return {name.split(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["init"],
        ["plan", "--help"],
        ["train", "--help"],
        ["run", "--help"],
        ["search", "mix.yaml", "--sett"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_load_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(*arguments) & set(HEAVY) == set()


def test_a_stage_that_starts_does_load_something() -> None:
    """Otherwise the test above would see nothing whatever happens."""
    assert {"yaml", "pydantic"} <= loaded("plan", "/nowhere/mix.yaml")


def test_data_loads_neither_torch_nor_megatron_for_its_help() -> None:
    assert loaded("data", "--help") & {"torch", "megatron"} == set()
