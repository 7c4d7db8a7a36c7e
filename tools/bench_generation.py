#!/usr/bin/env python
"""What writing an answer costs: from a KV cache, by whole passes, and by transformers.

    python tools/bench_generation.py [--prompts 32] [--new 64] [--hidden 256] [--layers 6]

A random Llama is held by Megatron and by transformers, on this machine's CPU. Prompts of 32 to 128
tokens are continued greedily by as many tokens each, in three ways that take turns. The texts have
to be the same but for near ties; rates count new tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_models import start_alone  # noqa: E402

from tests.support import bare_gpt, llama  # noqa: E402

SHORTEST, LONGEST = 32, 128
Texts = list[list[int]]


def main() -> None:
    """Print one row per way, and the ratios of the first to the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=64, help="tokens behind every prompt")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    start_alone()
    torch.set_num_threads(1)
    ways = made(args)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, Texts] = {}
    for _ in range(args.rounds):
        for name, write in ways.items():
            start = time.perf_counter()
            texts[name] = write()
            seconds[name].append(time.perf_counter() - start)
    own, *others = ways
    for name, each in seconds.items():
        same = sum(a == b for a, b in zip(texts[name], texts[own], strict=True))
        rate = args.prompts * args.new / statistics.median(each)
        print(f"{name:26s} {rate:8.0f} new tokens/s   {same} of {args.prompts} texts alike")
    for name in others:
        pairs = zip(seconds[name], seconds[own], strict=True)
        print(f"{own} / {name}: {statistics.median(a / b for a, b in pairs):.2f} times the rate")


def made(args: argparse.Namespace) -> dict[str, Callable[[], Texts]]:
    """Return the ways of writing the same answers."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_mergemix.evaluate.continuations import Prompt
    from megatron_mergemix.megatron import decoding, generation
    from megatron_mergemix.megatron.replicas import all_data_ranks

    model_parallel_cuda_manual_seed(1)
    length = LONGEST + args.new
    shape = llama.Shape(args.layers, args.hidden, 8, 4, 8 * args.hidden // 3, length, 8192)
    theirs = llama.hugging_face(shape=shape)
    chunks = bare_gpt.build(llama.settings(shape=shape), {}, False, llama.model(shape))
    llama.load(chunks[0], dict(theirs.state_dict()), shape)
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, args.prompts)
    prompts = [Prompt(draw.integers(2, 300, count).tolist(), args.new) for count in lengths]
    how = (lambda number, tokens: False), args.micro_batch_size, 300, all_data_ranks()

    def by_transformers() -> Texts:
        return [behind(theirs, list(prompt.tokens), args.new) for prompt in prompts]

    return {
        "KV cache": lambda: decoding.generate(chunks, prompts, *how) or [],
        "whole passes": lambda: generation.by_whole_passes(chunks, prompts, *how) or [],
        "transformers, one by one": by_transformers,
    }


def behind(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Return what transformers writes behind a prompt, of the ids that a tokenizer has."""
    written = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        max_new_tokens=count,
        eos_token_id=8191,  # never written, so that no answer ends early
        do_sample=False,
        suppress_tokens=list(range(300, 8192)),
    )
    found: list[int] = written[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    main()
