"""The files that hand a blend to Megatron-LM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix import __version__, config
from megatron_mergemix.data.blend import Blend, blend_arguments, blend_of, check_parts, epochs
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.errors import BlendError
from megatron_mergemix.files.publishing import publish_text, sync_folder

_EPOCH_TOLERANCE = 1e-6
_WHOLE = "1,0,0"

_HEADER = """\
# The learned mixture for Megatron-LM; this file is written last. Use one of:
#   --data-args-path {folder}/data_args.txt --split {split}
#   $(cat {folder}/data_path.txt)
#   --per-split-data-args-path {folder}/per_split_data_args.json     without --split
# The first two validate on Megatron's split of the training datasets. The third trains on whole
# datasets and validates on the held-out ones of evaluate.capabilities, weighted by tokens;
# without any its "valid" is null, which Megatron only accepts with --eval-iters 0.
"""


def write_blend(
    directory: Path,
    mixture: Mapping[str, float],
    settings: config.Config,
    *,
    utility: float | None = None,
    utility_stderr: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the files that hand a mixture to Megatron-LM, and return their folder.

    ``data_args.txt``, ``data_path.txt`` and ``per_split_data_args.json`` are three ways to give
    the same blend to Megatron; ``blend.yaml`` says what it is, how to use it and where it came
    from. ``blend.yaml`` goes first and comes last, so a folder that has it is complete. The
    same arguments and datasets give the same bytes.

    Args:
        directory: made where it is missing; the four files in it are replaced.
        mixture: domain -> share, sums to one.
        settings: the experiment: its domains, ``blend`` and held-out datasets.
        utility: what the mixture reached in the search.
        utility_stderr: standard error of ``utility``.
        provenance: plain values that tell what the mixture was learned from.

    Raises:
        BlendError: Megatron cannot express the mixture or would never finish reading it, or a
            domain would be repeated more often than its ``max_epochs``.
        DataError: a dataset is missing or damaged.
    """
    split = settings.blend.split.replace(" ", "")
    blend = blend_of(mixture, settings.domains, split)
    check_parts([prefix for _, prefix in blend], split)
    words = " ".join(blend_arguments(blend))
    description = {
        "mixture": {name: float(mixture.get(name, 0.0)) for name in settings.domains},
        "weights": {prefix: weight for weight, prefix in blend},
        "split": split,
        **_epoch_entries(mixture, blend, settings, split),
        "utility": utility,
        "utility_stderr": utility_stderr,
        "provenance": {
            **(provenance or {}),
            "datasets": {prefix: IndexedDataset(prefix).fingerprint() for _, prefix in blend},
            "megatron_mergemix": __version__,
        },
    }
    header = _HEADER.format(folder=directory, split=split)
    marker = directory / "blend.yaml"
    if marker.exists():
        marker.unlink()
        sync_folder(directory)
    publish_text(directory / "data_args.txt", f"{words}\n")
    publish_text(directory / "data_path.txt", f"--data-path {words} --split {split}\n")
    publish_text(directory / "per_split_data_args.json", _per_split(mixture, settings))
    publish_text(marker, header + _yaml(description))
    return directory


def current_blend(
    directory: Path, mixture: Mapping[str, float], settings: config.Config
) -> dict[str, Any] | None:
    """Return the ``blend.yaml`` of a folder that holds what :func:`write_blend` would write today.

    None where it holds something else, or nothing whole. The epochs that it tells of are of no
    matter: they depend on the tokens of the big run.

    Raises:
        BlendError: Megatron cannot express the mixture.
        DataError: a dataset is missing or damaged.
    """
    import yaml

    marker, per_split = directory / "blend.yaml", directory / "per_split_data_args.json"
    if not marker.exists() or not per_split.exists():
        return None
    written: dict[str, Any] = yaml.safe_load(marker.read_text(encoding="utf-8"))
    split = settings.blend.split.replace(" ", "")
    weights = [(weight, prefix) for prefix, weight in written["weights"].items()]
    is_current = (
        written["split"] == split
        and weights == blend_of(mixture, settings.domains, split)
        and per_split.read_text(encoding="utf-8") == _per_split(mixture, settings)
    )
    return written if is_current else None


def _epoch_entries(
    mixture: Mapping[str, float], blend: Blend, settings: config.Config, split: str
) -> dict[str, Any]:
    train_tokens = settings.blend.train_tokens
    if train_tokens is None:
        return {}
    per_domain = epochs(mixture, settings.domains, split, train_tokens)
    for name, count in per_domain.items():
        most = settings.domains[name].max_epochs
        if most is not None and count > most * (1 + _EPOCH_TOLERANCE):
            raise BlendError(
                f"share {mixture[name]:.6g} of {train_tokens:g} training tokens repeats domain "
                f"{name} {count:.4g} times, expected at most {most:g} (domains.{name}.max_epochs). "
                "Search again with this limit, or lower blend.train_tokens."
            )
    per_prefix = {
        prefix: weight
        * train_tokens
        / max(IndexedDataset(prefix).tokens_in_split(split, "train"), 1)
        for weight, prefix in blend
    }
    return {"train_tokens": train_tokens, "epochs": per_domain, "epochs_per_prefix": per_prefix}


def _per_split(mixture: Mapping[str, float], settings: config.Config) -> str:
    """Return Megatron's per-split JSON: it wants all three keys and no ``--split``."""
    held_out = dict.fromkeys(
        prefix for task in settings.evaluate.losses.values() for prefix in task.prefixes
    )
    valid = None
    if held_out:
        # With weights Megatron repeats a small dataset when it needs to; without them it ends.
        domain = config.Domain(prefixes=list(held_out))
        valid = blend_arguments(blend_of({"held out": 1.0}, {"held out": domain}, _WHOLE))
    train = blend_arguments(blend_of(mixture, settings.domains, _WHOLE))
    return json.dumps({"train": train, "valid": valid, "test": None}, indent=2) + "\n"


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=10**6)
