"""One rank of a test: the process that :mod:`tests.support.run_distributed` forks.

The fork server imports this module once per run of the tests, and Megatron with it: that takes five
seconds, most of what a small test would take, and every rank would pay for it anew.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from pathlib import Path

os.environ |= {"MERGEMIX_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from megatron_mergemix.megatron import cpu_mode

cpu_mode.activate()

import torch.distributed as dist  # noqa: E402

import megatron_mergemix.megatron.trainer  # noqa: E402, F401  what nearly every test needs


def run_rank(home: Path, rank: int, world_size: int) -> None:
    """Call the body of the test; leave its result, or the traceback and exit code 1."""
    os.setsid()  # whatever the body starts can be killed with it
    output = os.open(home / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    try:
        sys.path[:], module, name, args = pickle.loads((home / "job").read_bytes())
        dist.init_process_group(
            "gloo", init_method=f"file://{home}/store", rank=rank, world_size=world_size
        )
        result = getattr(importlib.import_module(module), name)(*args)
        if dist.is_initialized():  # a whole job takes them down by itself
            dist.destroy_process_group()
        (home / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (home / f"traceback-{rank}").write_text(traceback.format_exc())
        # A hard exit: an orderly one may wait for ranks that wait for this one.
        sys.stdout.flush()
        os._exit(1)
