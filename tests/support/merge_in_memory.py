"""Launch ``pretrain_gpt.py`` in CPU mode and merge experts into the live model once it is loaded.

An oracle for merges on disk: Megatron itself loads every checkpoint, under the layout of the run,
and the arithmetic is done on live parameters in float64. ``MERGE_IN_MEMORY`` holds the experts as
JSON: iteration folder -> weight.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any


def merge(model: list[Any], experts: dict[str, float]) -> None:
    """Make the live model ``base + sum_k w_k (expert_k - base)``."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    (chunk,) = model
    base = [p.detach().double().clone() for p in chunk.parameters()]
    total = [p.clone() for p in base]
    for path, weight in experts.items():
        if (Path(path) / "metadata.json").exists():
            state = {"model": chunk.sharded_state_dict(metadata=metadata)}
            loaded = dist_checkpointing.load(state, path)
        else:
            loaded = torch.load(legacy_file(Path(path)), weights_only=False)
        chunk.load_state_dict(loaded["model"])
        for merged, origin, live in zip(total, base, chunk.parameters(), strict=True):
            merged += weight * (live.detach().double() - origin)
    with torch.no_grad():
        for merged, live in zip(total, chunk.parameters(), strict=True):
            live.copy_(merged)


def legacy_file(folder: Path) -> str:
    """Return this rank's file of a legacy checkpoint."""
    from megatron.training.checkpointing import get_checkpoint_name

    return str(get_checkpoint_name(str(folder.parent), int(folder.name.removeprefix("iter_"))))


def main() -> None:
    from megatron_mergemix.megatron import cpu_mode

    cpu_mode.activate()
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    import megatron.training.training as training

    load = training.load_checkpoint

    @functools.wraps(load)
    def load_and_merge(model: list[Any], *args: Any, **kwargs: Any) -> Any:
        result = load(model, *args, **kwargs)
        merge(model, json.loads(os.environ["MERGE_IN_MEMORY"]))
        return result

    training.load_checkpoint = load_and_merge
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
