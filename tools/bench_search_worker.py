"""The processes that ``tools/bench_search.py`` measures; each starts as any rank of a job does.

    python tools/bench_search_worker.py make MIX WINDOWS     write checkpoints, and Llama's twins
    python tools/bench_search_worker.py search MIX           one job, candidates on standard input
    python tools/bench_search_worker.py score MIX SAVE       one candidate that lies on disk

``search`` and ``score`` answer in lines of JSON that begin with ``@``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLOCK = time.process_time if os.environ.get("BENCH_CLOCK") == "cpu" else time.perf_counter
START = CLOCK()


def main() -> None:
    """Do what the first argument says."""
    job, mix, *rest = sys.argv[1:]
    {"make": make, "search": search, "score": score}[job](Path(mix), *rest)


def make(mix: Path, windows: str) -> None:
    """Write base and experts, the same weights as Llama models, and the windows as an array."""
    import numpy as np
    from bench_models import start_alone, write_checkpoints, write_llama

    from megatron_mergemix.config import load_config
    from megatron_mergemix.evaluate.windows import loss_windows
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    start_alone()
    chunks, config = write_checkpoints(mix), load_config(mix)
    assert config.model is not None
    saves = {"base": base_checkpoint(config), **expert_checkpoints(config)}
    for name, save in saves.items():
        load_model(save, chunks)
        write_llama(mix.parent / "llama" / name, chunks[0], config.model)
    task = config.evaluate.losses["text"]
    np.save(windows, loss_windows(task, config.model.seq_length).tokens)


def search(mix: Path) -> None:
    """Hold base and experts, and merge and score whatever merge weights are asked for."""
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config, chunks, evaluator = _started(mix)
    proxy = ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
    answer({"ready": CLOCK() if CLOCK is time.process_time else CLOCK() - START})
    for line in sys.stdin:
        begun = CLOCK()
        proxy.apply(json.loads(line))
        merged = CLOCK()
        scores = evaluator.evaluate(proxy)
        seconds = {"merge": merged - begun, "evaluate": CLOCK() - merged}
        answer({"loss": scores["text"]["loss"].value, "seconds": seconds})


def score(mix: Path, save: str) -> None:
    """Score one save, as ``mergemix validate`` scores a reference model."""
    from megatron_mergemix.checkpoint.saves import resolve
    from megatron_mergemix.megatron.resident import ResidentProxy

    _, chunks, evaluator = _started(mix)
    ends = {"start": CLOCK() - START}
    proxy = ResidentProxy(chunks, resolve(Path(save)), {})
    ends["load"] = CLOCK() - START
    scores = evaluator.evaluate(proxy)
    ends["evaluate"] = CLOCK() - START
    answer({"loss": scores["text"]["loss"].value, "ends": ends})


def answer(record: Mapping[str, Any]) -> None:
    """Tell the parent."""
    print("@" + json.dumps(record), flush=True)


def _started(mix: Path) -> tuple[Any, Any, Any]:
    """Start the only rank; return configuration, model and evaluator."""
    from bench_models import start_alone

    from megatron_mergemix.config import load_config
    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.model_facts import vocab_size

    start_alone()
    config = load_config(mix)
    assert config.model is not None
    size = vocab_size(config)
    chunks = build_model(config, size, seed=0)
    return config, chunks, make_evaluator(config, config.model.padded_vocab(size))


if __name__ == "__main__":
    main()
