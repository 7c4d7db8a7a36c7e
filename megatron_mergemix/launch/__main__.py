"""``torchrun ... -m megatron_mergemix.launch pretrain_gpt.py ARGS...``: Megatron-LM, unpatched.

Runs the script as ``python SCRIPT ARGS...`` would, with the plugin's hooks in place; with
``MERGEMIX_DEVICE=cpu`` in CPU mode. Without ``--mergemix-config`` it is exactly stock.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from megatron_mergemix.distributed import leave_process_groups
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.megatron import cpu_mode


def main() -> None:
    """Run the script that the command line names."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m megatron_mergemix.launch pretrain_gpt.py [ARGS...]")
    script = Path(sys.argv[1]).resolve()
    if not script.is_file():
        raise SystemExit(f"{script} does not exist or is not a file.")
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    try:
        if cpu_mode.wanted():
            cpu_mode.activate()
        from megatron_mergemix.megatron_lm.install import install

        install()
    except MergeMixError as error:
        raise SystemExit(f"mergemix: error: {error}") from None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise
    leave_process_groups()


if __name__ == "__main__":
    main()
