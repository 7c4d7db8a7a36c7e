"""A command that measures how far a candidate is from the base, and misbehaves when it is told to.

``python distance_command.py HOME BASE CHECKPOINT OUTPUT``. It counts its calls in HOME; a file
``HOME/<call>`` holds what that call does wrong: ``hang``, ``exit``, ``no json``, ``no metric``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(home: Path, base: Path, checkpoint: Path, output: Path) -> None:
    """Write ``{"distance": {"l2": ...}, "tensors": ...}``."""
    count = home / "calls"
    call = int(count.read_text()) + 1 if count.exists() else 1
    count.write_text(str(call))
    wish = home / str(call)
    fault = wish.read_text() if wish.exists() else ""
    print(f"call {call} {fault}", flush=True)
    if fault == "hang":
        time.sleep(600)
    if fault == "exit":
        sys.exit(3)
    if fault == "no json":
        output.write_text("half of")
    elif fault == "no metric":
        output.write_text('{"other": 1}')
    else:
        output.write_text(json.dumps(measured(base, checkpoint / "release")))


def measured(base: Path, candidate: Path) -> dict[str, object]:
    """Return the norm of the difference of all weights."""
    from megatron_mergemix.checkpoint.metadata import read_index
    from megatron_mergemix.checkpoint.reader import CheckpointReader

    first, second = (CheckpointReader(read_index(path)) for path in (base, candidate))
    tensors = first.index.model_tensors()
    names = [name for name, tensor in tensors.items() if tensor.dtype in ("float32", "bfloat16")]
    square = 0.0
    for name in names:
        square += (second.read(name).double() - first.read(name).double()).square().sum().item()
    return {"distance": {"l2": square**0.5}, "tensors": len(names)}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
