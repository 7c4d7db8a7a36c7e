#!/usr/bin/env python
"""How far the hours of ``mergemix plan`` are from measured ones: three sizes on this machine's CPU.

    python tools/bench_plan.py --folder /tmp/bench-plan [--rounds 5] [--cpu-clock]

What the plan takes from a data sheet is measured here instead, in the same rounds as the searches:
the peak by a matrix product, the bandwidth by ``Tensor.copy_``, and the rate of what runs between
matrix products by a softmax. Two constants are then fitted on ONE size: the share of the peak that
a forward pass reaches, and the share of the bandwidth that a merge reaches. With them the cost
model of the plan predicts the other two. Candidates are really merged and scored, by the resident
proxy and the loss evaluator of the search, in one process.

With ``--cpu-clock`` seconds are those that the processor spent on this process, on one thread: on
a machine that others use, they are what an idle machine would show on the wall.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_models import candidates, start_alone, write_checkpoints, write_experiment

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.evaluate.make import make_evaluator
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.model_facts import vocab_size
from megatron_mergemix.plan.cost import count_parameters
from megatron_mergemix.plan.hardware import Gpu
from megatron_mergemix.plan.memory import search_memory
from megatron_mergemix.plan.search_cost import Efficiency, Workload, evaluate_seconds, merge_seconds
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

EXPERTS = 4
MICRO_BATCH = 8
SEQ_LENGTH = 128
SIDE = 1024
"""Of the square matrices whose product is the peak."""
COPIED = 1 << 25
"""Elements that ``copy_`` copies, more than any cache holds."""

SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}, 16),
    "1M": ({"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4}, 64),
    "8M": ({"num_layers": 8, "hidden_size": 288, "num_attention_heads": 8}, 32),
    "40M": ({"num_layers": 12, "hidden_size": 512, "num_attention_heads": 8}, 16),
}
"""Name -> model and windows that are scored."""


@dataclass
class Measured:
    """Seconds of one size, one entry per round."""

    config: Config
    merge: list[float] = field(default_factory=list)
    evaluate: list[float] = field(default_factory=list)


def main() -> None:
    """Measure, fit, predict, and print all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="made if missing, and kept")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1M", "8M", "40M"])
    parser.add_argument("--fit", choices=SIZES, default="8M", help="size the constants come from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-clock", action="store_true", help="processor seconds, one thread")
    args = parser.parse_args()
    if args.fit not in args.sizes:
        parser.error(f"--fit {args.fit} is not among --sizes {' '.join(args.sizes)}")
    if args.cpu_clock:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_clock else time.perf_counter
    start_alone()
    load_before = os.getloadavg()[0]
    machine, measured = measure(args.folder, args.sizes, args.rounds, clock)
    print(
        f"{torch.get_num_threads()} threads, medians of {args.rounds} rounds, "
        f"{'processor' if args.cpu_clock else 'wall'} seconds, load {load_before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after"
    )
    gpu, between = machine
    print(
        f"this machine: {gpu.fp32 / 1e9:.1f} GFLOP/s in a product of {SIDE} x {SIDE} matrices, "
        f"copy_ {gpu.bandwidth / 1e9:.1f} GB/s, softmax {between / 1e9:.1f} GB/s"
    )
    reached = fitted(measured[args.fit], gpu, between)
    print(
        f"fitted on {args.fit} alone: a forward pass reaches {reached.matmul:.2f} of the peak, a "
        f"merge {reached.merge:.2f} of copy_"
    )
    print_errors(measured, gpu, reached, args.fit)


def measure(
    folder: Path, sizes: list[str], rounds: int, clock: Callable[[], float]
) -> tuple[tuple[Gpu, float], dict[str, Measured]]:
    """Return the machine with the rate of a softmax, and the seconds of every size."""
    searches, measured = {}, {}
    for name in sizes:
        model, windows = SIZES[name]
        path = write_experiment(
            folder / name, {**model, "seq_length": SEQ_LENGTH}, EXPERTS, windows, MICRO_BATCH
        )
        chunks = write_checkpoints(path)
        config = load_config(path)
        proxy = ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
        assert config.model is not None
        rows = config.model.padded_vocab(vocab_size(config))
        searches[name] = proxy, make_evaluator(config, rows)
        measured[name] = Measured(config)
    left, right = torch.randn(2, SIDE, SIDE)
    source = torch.randn(COPIED)
    target = torch.zeros(COPIED)
    scores = torch.randn(MICRO_BATCH * SEQ_LENGTH, 512)
    products, copies, softmaxes = [], [], []
    for number, alpha in enumerate(candidates([f"domain{k}" for k in range(EXPERTS)], rounds + 1)):
        for name, (proxy, evaluator) in searches.items():
            merge = seconds(partial(proxy.apply, alpha), clock)
            evaluate = seconds(partial(evaluator.evaluate, proxy), clock)
            if number > 0:  # the first round warms up
                measured[name].merge.append(merge)
                measured[name].evaluate.append(evaluate)
            products.append(seconds(partial(torch.mm, left, right), clock))
            copies.append(seconds(partial(target.copy_, source), clock))
            softmaxes.append(seconds(partial(torch.softmax, scores, -1), clock))
    peak = 2.0 * SIDE**3 / statistics.median(products)
    bandwidth = 2.0 * 4 * COPIED / statistics.median(copies)
    between = 2.0 * 4 * scores.numel() / statistics.median(softmaxes)
    gpu = Gpu("this machine", peak, peak, bandwidth, 0, bandwidth, 0, bandwidth)
    return (gpu, between), measured


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the seconds of one call."""
    start = clock()
    work()
    return clock() - start


def workload(config: Config) -> Workload:
    """Return the search of one candidate as the plan sees it."""
    assert config.model is not None
    return Workload(
        model=config.model,
        vocab_size=vocab_size(config),
        parallel=config.parallel,
        experts=EXPERTS,
        models=1,
        sequences=config.evaluate.losses["text"].sequences,
        micro_batch_size=config.evaluate.micro_batch_size,
        resident="auto",
        expert_tokens=0.0,
    )


def predicted(config: Config, gpu: Gpu, reached: Efficiency) -> tuple[float, float]:
    """Return the seconds of a merge and of an evaluation that the cost model of the plan gives."""
    work, live = workload(config), search_memory(config, vocab_size(config)).live
    merge = merge_seconds(live, EXPERTS, "device", gpu, reached)
    return merge, evaluate_seconds(work, gpu, reached)


def fitted(measured: Measured, gpu: Gpu, between: float) -> Efficiency:
    """Return the shares that make the prediction of this size right."""
    share = between / gpu.bandwidth
    whole = Efficiency(matmul=1.0, merge=1.0, activations=share)
    merge, _ = predicted(measured.config, gpu, whole)
    nothing = Efficiency(matmul=float("inf"), merge=1.0, activations=share)
    _, activations = predicted(measured.config, gpu, nothing)
    _, both = predicted(measured.config, gpu, whole)
    left = statistics.median(measured.evaluate) - activations
    if left <= 0:
        raise SystemExit(
            f"softmax alone would take {activations:.3f} s of a forward pass that took "
            f"{activations + left:.3f} s; the machine was disturbed. Measure again."
        )
    return Efficiency(
        matmul=(both - activations) / left,
        merge=merge / statistics.median(measured.merge),
        activations=share,
    )


def print_errors(
    measured: dict[str, Measured], gpu: Gpu, reached: Efficiency, fitted_on: str
) -> None:
    """Print predicted and measured seconds per candidate, and the error, for every size."""
    print(f"{'size':>5} {'parameters':>11} {'tokens':>7}  {'part':10}", end="")
    print(f" {'predicted s':>12} {'measured s':>11} {'error':>7}")
    for name, found in measured.items():
        work = workload(found.config)
        parameters = count_parameters(work.model, work.vocab_size).total
        tokens = work.sequences * work.model.seq_length
        merge, evaluate = predicted(found.config, gpu, reached)
        rows = {
            "merge": (merge, statistics.median(found.merge)),
            "evaluate": (evaluate, statistics.median(found.evaluate)),
        }
        rows["candidate"] = tuple(sum(pair) for pair in zip(*rows.values(), strict=True))  # type: ignore[assignment]
        for part, (guess, truth) in rows.items():
            note = "  fitted" if name == fitted_on else ""
            print(
                f"{name:>5} {parameters:>11,} {tokens:>7,}  {part:10} {guess:12.4f} {truth:11.4f} "
                f"{guess / truth - 1:+7.1%}{note}"
            )


if __name__ == "__main__":
    main()
