"""The stage train: the user's own run, with the learned blend in place of its data."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mergemix.config import Config
from megatron_mergemix.data.indexed import share_of_split
from megatron_mergemix.errors import BlendError
from megatron_mergemix.experiment import learned_blend, search_result
from megatron_mergemix.megatron_lm.stage import Stage
from megatron_mergemix.megatron_lm.training_stage import NO_OTHER_DATA
from megatron_mergemix.run_dir import RunDir

_PER_SPLIT = "per_split_data_args.json"
_BLEND = "data_args.txt"


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
        path = self._file(_PER_SPLIT if per_split else _BLEND)
        if path.suffix == ".json":
            chosen = {"per_split_data_args_path": str(path), "split": None}
        else:
            chosen = {"data_args_path": str(path), "split": self.config.blend.split}
        self.rewriting.apply(args, data_path=None, **{**NO_OTHER_DATA, **chosen})

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
