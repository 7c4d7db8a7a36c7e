"""Run a script as ``python SCRIPT ARGS...`` would, after something has been prepared for it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path


def run_script(module: str, prepare: Callable[[], None]) -> None:
    """Run the script that this command line names, and return if it succeeded.

    Args:
        module: what was started with ``python -m``, for the usage message.
        prepare: called before the script, when ``sys.argv`` and ``sys.path`` are its own.

    Raises:
        SystemExit: no script is named, there is none, or it ended with an error.
    """
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: python -m {module} SCRIPT [ARGS...]")
    script = Path(sys.argv[1]).resolve()
    if not script.is_file():
        raise SystemExit(f"{script} does not exist or is not a file.")
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    prepare()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise
