#!/usr/bin/env python
"""What scoring lm-eval's tasks costs beside bare forward passes, and beside lm-eval's own backend.

    python tools/bench_eval.py [--documents 40] [--hidden 256] [--layers 6] [--rounds 5]

A random Llama is held by Megatron and by transformers, on this machine's CPU. Local tasks (multiple
choice with worked examples, letters, last words, whole texts) are scored in four ways that take
turns: by the evaluator of the search, tokens prepared once as there, metrics and errors included;
by the same with every choice run by itself, context included; by bare forward passes of those
micro-batches with all their logits; and by lm-eval's Hugging Face backend from the same requests.
Rates count the tokens of rows without padding, so a row that answers several requests counts once
for all. Ratios are of rounds, their median is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_models import start_alone  # noqa: E402

from tests.support import bare_gpt, llama, lm_eval_tasks  # noqa: E402

Ways = dict[str, Callable[[], object]]

OTHERS = ("every choice by itself", "bare forward passes", "lm-eval, Hugging Face")


class Live:
    """The proxy's part of a live model: scores its present weights."""

    def __init__(self, chunks: list[torch.nn.Module], shares: bool) -> None:
        self.chunks, self.shares = chunks, shares

    def continuation_log_probs(self, continuations: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Score continuations; see the contract of a proxy."""
        from megatron_mergemix.megatron.continuations import continuation_log_probs

        asked = continuations if self.shares else replace(continuations, shared=None)
        return continuation_log_probs(self.chunks, asked)


def main() -> None:
    """Print the rates and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=40, help="per task")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192, help="rows of the embedding")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    start_alone()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    torch.set_num_threads(args.threads)
    shape = llama.Shape(args.layers, args.hidden, 8, 4, 8 * args.hidden // 3, 256, args.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        evaluator, ways = made(Path(folder), shape, args)
        seconds = timed(ways, args.rounds)
    continuations = evaluator._search.asked.continuations
    layouts = {"every choice by itself": continuations}
    if continuations.shared:
        layouts["contexts shared"] = continuations.shared.continuations
    print(f"CPU, {args.threads} threads: {continuations.num_requests} requests")
    for name, layout in layouts.items():
        padded = layout.work(at_once=1, is_uniform=False, least=0)
        print(f"{name}: {layout.num_tokens} tokens, {padded} with padding")
    for name, each in seconds.items():
        rate = continuations.num_tokens / statistics.median(each)
        print(f"{name:28s} {rate:10.0f} tokens/s  {statistics.median(each):8.3f} s")
    own = seconds["evaluator"]
    for name in OTHERS:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], own, strict=True))
        print(f"evaluator's rate / {name}: {ratio:.2f}")


def made(folder: Path, shape: llama.Shape, args: argparse.Namespace) -> tuple[Any, Ways]:
    """Return the evaluator and the ways of scoring what it scores."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from megatron_mergemix.config.evaluate import LmEvalTask
    from megatron_mergemix.data.tokenizers import HuggingFaceTokenizer
    from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator
    from megatron_mergemix.megatron.passes import micro_batches_of

    llama.write_tokenizer(folder / "tokenizer")
    files = lm_eval_tasks.write(folder / "tasks", args.documents)
    evaluator = LmEvalEvaluator(
        {"own": LmEvalTask(tasks=[name for name in files if "written" not in name])},
        tokenizer=HuggingFaceTokenizer(folder / "tokenizer"),
        seq_length=shape.length,
        micro_batch_size=args.micro_batch_size,
    )
    theirs = llama.hugging_face(shape=shape)
    chunks = bare_gpt.build(llama.settings(shape=shape), {}, False, llama.model(shape))
    llama.load(chunks[0], dict(theirs.state_dict()), shape)
    backend = HFLM(
        pretrained=theirs,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        batch_size=args.micro_batch_size,
    )
    asked = evaluator._search.asked
    by_kind: dict[str, list[Any]] = {}
    for instance in asked.instances:
        by_kind.setdefault(instance.request_type, []).append(instance)

    def by_backend() -> None:
        for kind, instances in by_kind.items():
            getattr(backend, kind)(instances, disable_tqdm=True)

    def forward() -> None:
        chunks[0].eval()
        with torch.no_grad():
            for group in asked.continuations.groups:
                for tokens in micro_batches_of(group, chunks[0]):
                    chunks[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)

    shared: Any = Live(chunks, shares=True)
    by_rows: Any = Live(chunks, shares=False)
    return evaluator, {
        "evaluator": lambda: evaluator.evaluate(shared),
        "every choice by itself": lambda: evaluator.evaluate(by_rows),
        "bare forward passes": forward,
        "lm-eval, Hugging Face": by_backend,
    }


def timed(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every way in every round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
