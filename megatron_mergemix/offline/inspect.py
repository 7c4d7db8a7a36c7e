"""``mergemix inspect``: what is in a checkpoint, and how several differ from a base."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.index import CheckpointIndex, TensorEntry, is_model_entry

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "world_size",
)
"""Arguments that tell the parallel layout of the run that saved."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mergemix inspect``."""
    add = parser.add_argument
    add(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        type=Path,
        help="root or iteration folder; of several the first is the base of the others",
    )
    add("--tensors", action="store_true", help="list every model tensor")
    add("--json", action="store_true", help="for machines")


def run(options: argparse.Namespace) -> None:
    """Print what the checkpoints contain, and of several how they differ.

    Raises:
        CheckpointError: one is missing, damaged, or does not fit the base.
    """
    from megatron_mergemix.checkpoint.checks import check_intact
    from megatron_mergemix.checkpoint.opening import open_checkpoint

    indexes = [open_checkpoint(path) for path in options.checkpoints]
    for index in indexes:
        check_intact(index)
    report: dict[str, Any] = {"checkpoints": [describe(index) for index in indexes]}
    if len(indexes) > 1:
        from megatron_mergemix.merge.compare import compare

        report["differences"] = compare(indexes)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for description in report["checkpoints"]:
        _print(description, options.tensors)
    if "differences" in report:
        _print_differences(report["differences"])


def describe(index: CheckpointIndex) -> dict[str, Any]:
    """Return what a checkpoint contains, as plain JSON values."""
    from megatron_mergemix.checkpoint.common_state import arguments
    from megatron_mergemix.checkpoint.opening import common_of

    common = common_of(index)
    args = arguments(common)
    model = index.model_tensors()
    rest = {name: tensor for name, tensor in index.tensors.items() if name not in model}
    return {
        "path": str(index.path),
        **_format(index),
        "iteration": common.get("iteration", index.iteration),
        "checkpoint_version": common.get("checkpoint_version"),
        "saved_under": {name: args[name] for name in SIZES if args.get(name) is not None},
        "files": len({c.file for tensor in index.tensors.values() for c in tensor.chunks}),
        "parameters": _parameters(index),
        "model": _totals(model),
        "optimizer_and_rest": _totals(rest),
        "bytes_entries": {
            "model": sum(is_model_entry(name) for name in index.bytes_entries),
            "rest": sum(not is_model_entry(name) for name in index.bytes_entries),
        },
        "merged_by": common.get("mergemix"),
        "tensors": {
            name: {"shape": list(t.shape), "dtype": t.dtype, "chunks": len(t.chunks)}
            for name, t in sorted(model.items())
        },
    }


def _format(index: CheckpointIndex) -> dict[str, Any]:
    from megatron_mergemix.checkpoint.common_state import ENTRY
    from megatron_mergemix.checkpoint.legacy import LegacyIndex

    if isinstance(index, LegacyIndex):
        return {"format": "torch", "layout": "mp_rank", "ranks": dict(index.sizes)}
    layout = "common_state" if ENTRY in index.bytes_entries else "common.pt"
    return {"format": "torch_dist", "layout": layout}


def _parameters(index: CheckpointIndex) -> int:
    """Count the elements of the model; in a legacy checkpoint, copies on several ranks once."""
    from megatron_mergemix.checkpoint.legacy import LegacyIndex

    if not isinstance(index, LegacyIndex):
        return index.num_parameters()
    from megatron_mergemix.merge.copies import copies

    counted_already = copies([index])
    model = index.model_tensors().items()
    return sum(tensor.numel for name, tensor in model if name not in counted_already)


def _totals(tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    per_dtype: dict[str, int] = defaultdict(int)
    for tensor in tensors.values():
        per_dtype[tensor.dtype] += tensor.num_bytes
    return {
        "tensors": len(tensors),
        "bytes": sum(per_dtype.values()),
        "bytes_by_dtype": dict(per_dtype),
        "chunks": sum(len(tensor.chunks) for tensor in tensors.values()),
    }


def _print(report: Mapping[str, Any], tensors: bool) -> None:
    print(report["path"])
    if report["format"] == "torch":
        sizes = ", ".join(f"{axis} {size}" for axis, size in report["ranks"].items())
        print(f"  legacy torch, {report['files']} rank files ({sizes})")
    else:
        print(f"  torch_dist, common state in {report['layout']}, {report['files']} data files")
    version = report["checkpoint_version"]
    print(f"  iteration {report['iteration']}, checkpoint version {version}")
    if report["saved_under"]:
        print("  saved under " + ", ".join(f"{k} {v}" for k, v in report["saved_under"].items()))
    for what in ("model", "optimizer_and_rest"):
        part = report[what]
        dtypes = ", ".join(f"{d} {b / 1e9:.3f} GB" for d, b in part["bytes_by_dtype"].items())
        print(
            f"  {what.replace('_', ' ')}: {part['tensors']} tensors in {part['chunks']} chunks"
            + (f" ({dtypes})" if dtypes else "")
        )
    print(f"  {report['parameters']:,} parameters")
    if report["merged_by"]:
        print(f"  merged by mergemix: {json.dumps(report['merged_by'])}")
    if tensors:
        for name, tensor in report["tensors"].items():
            print(f"    {name}  {tuple(tensor['shape'])}  {tensor['dtype']}")


def _print_differences(differences: Mapping[str, Any]) -> None:
    names = differences["names"]
    print("\nTask vectors, norm per group:")
    groups = list(differences["norms"][0])
    width = max(map(len, groups))
    for group in groups:
        row = "  ".join(f"{norms[group]:12.6g}" for norms in differences["norms"])
        print(f"  {group:{width}}  {row}")
    print("\nCosines between task vectors:")
    for name, row in zip(names, differences["cosines"], strict=True):
        cells = "  ".join("     -" if c is None else f"{c:6.3f}" for c in row)
        print(f"  {cells}  {name}")
    print("\nUpdate size delta (DeMix):")
    for name, delta in zip(names, differences["delta"], strict=True):
        print(f"  {delta:8.4%}  {name}")
