"""The stage train: the user's own run, with the learned blend in place of its data.

The run keeps the blend that it began with, beside its saves: a search that is begun anew while it
trains must not change what it sees when it is started again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_mergemix.checkpoint.saves import TRACKER
from megatron_mergemix.config import Config
from megatron_mergemix.data.indexed import share_of_split
from megatron_mergemix.errors import BlendError
from megatron_mergemix.experiment.search_record import learned_blend, search_result
from megatron_mergemix.files.publishing import publish_text
from megatron_mergemix.megatron_lm.rewriting import NO_OTHER_DATA
from megatron_mergemix.megatron_lm.stage import Stage, is_rank_0
from megatron_mergemix.run_dir import RunDir

_PER_SPLIT = "per_split_data_args.json"
_BLEND = "data_args.txt"
_KEPT = "mergemix_"
"""In front of a blend file's name where it lies beside the saves."""


class TrainStage(Stage):
    """Replaces the data arguments, nothing else."""

    name = "train"
    lock_name = "train"

    def __init__(self, config: Config, blend: str | None) -> None:
        """Prepare; ``blend`` is a file or folder in place of the learned one."""
        super().__init__(config)
        self._blend = Path(blend) if blend is not None else None

    def before_validation(self, args: argparse.Namespace) -> None:
        """Set the data: one blend and ``--split``, or per split, which validates on held-out data.

        The latter where the launch gave its data so, or where ``blend.split`` leaves nothing to
        validate on and the launch validates.
        """
        own = ("per_split_data_args_path", "train_data_path", "valid_data_path", "test_data_path")
        nothing_left = share_of_split(self.config.blend.split, "valid") == 0 and args.eval_iters
        per_split = nothing_left or any(getattr(args, name, None) for name in own)
        name = _PER_SPLIT if per_split else _BLEND
        path = self._begun_with(args, name) or self._file(name)
        if self._blend is None and args.save and is_rank_0() and not _has_save(args.save):
            for each in (_PER_SPLIT, _BLEND):  # a later start may give its data in the other way
                text = path.with_name(each).read_text(encoding="utf-8")
                publish_text(Path(args.save) / f"{_KEPT}{each}", text)
        if path.suffix == ".json":
            chosen = {"per_split_data_args_path": str(path), "split": None}
        else:
            chosen = {"data_args_path": str(path), "split": self.config.blend.split}
        self.rewriting.apply(args, data_path=None, **{**NO_OTHER_DATA, **chosen})

    def _begun_with(self, args: argparse.Namespace, name: str) -> Path | None:
        """Return the blend that this run has begun with; None at its first start.

        A run that loads what another has saved is a run of its own.
        """
        if self._blend is not None or not _has_save(args.load) or args.finetune:
            return None
        if not args.save or os.path.realpath(args.load) != os.path.realpath(args.save):
            return None
        kept = Path(args.load) / f"{_KEPT}{name}"
        if not kept.is_file():
            return None
        learned = RunDir(self.config.run_dir).blend / name
        if is_rank_0() and learned.is_file() and learned.read_bytes() != kept.read_bytes():
            print(
                f"mergemix: warning: this run goes on with the blend that it began with, {kept}. "
                f"{learned} is another one by now; to change over, give --mergemix-blend {learned}",
                flush=True,
            )
        return kept

    def _file(self, name: str) -> Path:
        """Return the blend file to use.

        Raises:
            BlendError: it is not there; says what to run.
        """
        if self._blend is None:
            return self._learned(name)
        path = self._blend / name if self._blend.is_dir() else self._blend
        if not path.is_file():
            raise BlendError(
                f"--mergemix-blend {self._blend}: {path} is no file, expected {_BLEND}, "
                f"{_PER_SPLIT} or a folder with them."
            )
        return path

    def _learned(self, name: str) -> Path:
        folder = RunDir(self.config.run_dir).blend
        if not is_rank_0():  # which reads checkpoints and datasets to be sure, and fails for all
            return folder / name
        result = search_result(self.config) if self.config.launched is not None else None
        if result is None:
            raise BlendError(
                f"there is no learned mixture in {self.config.run_dir} for these settings. Run the "
                "stage expert for every expert and the stage search with this launch first, or "
                "give --mergemix-blend."
            )
        if learned_blend(self.config, result) is None:
            raise BlendError(
                f"{folder} has no blend yet, or one of other datasets, weights or another split. "
                "Run `mergemix blend mix.yaml` first: the search is done."
            )
        return folder / name


def _has_save(load: str | None) -> bool:
    return load is not None and (Path(load) / TRACKER).is_file()
