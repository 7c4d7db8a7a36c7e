"""``torchrun ... -m megatron_mergemix.launch pretrain_gpt.py ARGS...``: Megatron-LM, unpatched.

Runs the script as ``python SCRIPT ARGS...`` would, with the plugin's hooks in place; with
``MERGEMIX_DEVICE=cpu`` in CPU mode. Without ``--mergemix-config`` it is exactly stock.
"""

from __future__ import annotations

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.megatron import cpu_mode
from megatron_mergemix.megatron.script import run_script
from megatron_mergemix.processes.distributed import leave_process_groups


def main() -> None:
    """Run the script that the command line names, with the hooks in place."""
    run_script("megatron_mergemix.launch", _prepare)
    if cpu_mode.wanted():
        # NCCL would wait for the CUDA graphs of a launch, which keep its communicators.
        leave_process_groups()


def _prepare() -> None:
    try:
        if cpu_mode.wanted():
            cpu_mode.activate()
        from megatron_mergemix.megatron_lm.install import install

        install()
    except MergeMixError as error:
        raise SystemExit(f"mergemix: error: {error}") from None


if __name__ == "__main__":
    main()
