"""The plugin's four hooks, in the order in which Megatron-LM comes by. Read this first.

The launcher wraps Megatron-LM's functions with them; ``patches/`` inserts the calls. Without
``--mergemix-config`` none of them does anything.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.experiment.named_files import check_files
from megatron_mergemix.megatron_lm.flags import add_flags, stage_of
from megatron_mergemix.megatron_lm.mixture_flag import with_reference
from megatron_mergemix.megatron_lm.stage import NothingToDo, Pretrain, Stage, is_rank_0
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.processes.error_file import ERROR_FILE, leave_error
from megatron_mergemix.processes.process_life import die_with_parent
from megatron_mergemix.run_dir import RunDir

P = ParamSpec("P")
R = TypeVar("R")

_SECONDS_FOR_RANK_0 = 5.0

_locks = ExitStack()
"""Never closed: the kernel releases a lock when its owner ends, however it ends."""


@functools.cache
def _stage() -> Stage | None:
    """Return what this process was launched for, None without ``--mergemix-config``.

    Read from the command line, because at 0.16 and 0.17 ``pretrain`` is called before Megatron-LM
    has parsed it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    flags, _ = parser.parse_known_args()
    if flags.mergemix_config is None:
        return None
    kind = stage_of(flags)
    config = with_recorded_launch(load_config(Path(flags.mergemix_config)))
    if config.launch.kind != "command":
        raise ConfigError(
            f"{flags.mergemix_config}: launch.kind is {config.launch.kind}, expected command: the "
            "model, its parallel layout and its optimizer come from this launch."
        )
    stage = _make_stage(kind, config, flags)
    if kind != "train":
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a shell that started Python alone may end first
            die_with_parent()
        if is_rank_0():
            check_files(config)
            _keep_others_out(config, stage)
            RunDir(config.run_dir).put_on_record(config.model_dump(mode="json"))
    return stage


def _make_stage(kind: str, config: Config, flags: argparse.Namespace) -> Stage:
    from megatron_mergemix.megatron_lm.diagnose_stage import DiagnoseStage
    from megatron_mergemix.megatron_lm.evaluate_stage import EvaluateStage
    from megatron_mergemix.megatron_lm.expert_stage import ExpertStage
    from megatron_mergemix.megatron_lm.search_stage import SearchStage
    from megatron_mergemix.megatron_lm.train_stage import TrainStage

    if kind == "train":
        return TrainStage(config, flags.mergemix_blend)
    if kind == "search":
        return SearchStage(config)
    if kind == "diagnose":
        return DiagnoseStage(config)
    if kind == "expert":
        return ExpertStage(config, f"experts/{flags.mergemix_expert}", kind)
    name = flags.mergemix_mixture
    if name is not None:
        name, config = with_reference(name, config)
    if kind == "reference":
        return ExpertStage(config, f"references/{name}", kind)
    return EvaluateStage(config, name, flags.mergemix_checkpoint, flags.mergemix_model)


def _keep_others_out(config: Config, stage: Stage) -> None:
    """Lock what this stage writes, for as long as this process lives."""
    _locks.enter_context(RunDir(config.run_dir).lock(stage.lock_name))


def _clearly(hook: Callable[P, R]) -> Callable[P, R]:
    """Make errors of the user one message, and nothing left to do a success."""

    @functools.wraps(hook)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return hook(*args, **kwargs)
        except NothingToDo as done:
            if is_rank_0():
                print(f"mergemix: {done}", flush=True)
            raise SystemExit(0) from None
        except MergeMixError as error:
            _fail(error)
        except Exception as error:
            _leave_for_status(error)
            raise

    return guarded


def _leave_for_status(error: Exception) -> None:
    if path := os.environ.get(ERROR_FILE):
        leave_error(path, error)


def _fail(error: MergeMixError) -> NoReturn:
    """End this rank; others that have the same error leave the word to rank 0."""
    _leave_for_status(error)
    if not is_rank_0():
        time.sleep(_SECONDS_FOR_RANK_0)  # torchrun ends this rank once rank 0 is gone
    print(f"mergemix: error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)  # others may wait for this rank in a collective; torchrun ends them


def _end(error: Exception) -> NoReturn:
    """End this rank at once: others may wait for it, and NCCL may keep Python from ending."""
    _leave_for_status(error)
    traceback.print_exc()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


@_clearly
def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags to Megatron-LM's parser, and return it."""
    add_flags(parser)
    return parser


@_clearly
def after_parsing(args: argparse.Namespace) -> argparse.Namespace:
    """Replace the arguments that say where checkpoints are, and return them all."""
    if stage := _stage():
        stage.after_parsing(args)
    return args


@_clearly
def before_validation(args: argparse.Namespace) -> None:
    """Replace the other arguments, and print what was replaced."""
    if stage := _stage():
        stage.before_validation(args)
        if is_rank_0():
            print(f"mergemix: stage {stage.name}, arguments replaced:\n{stage.rewriting.table()}")
            sys.stdout.flush()


def wrap_pretrain(pretrain: Pretrain) -> Pretrain:
    """Return what the script calls in place of Megatron-LM's ``pretrain``."""

    @functools.wraps(pretrain)
    @_clearly
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        stage = _stage()
        if stage is None:
            return pretrain(*args, **kwargs)
        try:
            return stage.around(pretrain)(*args, **kwargs)
        except (MergeMixError, NothingToDo):
            raise
        except Exception as error:
            if stage.trains:  # Megatron-LM has its own ways then, such as to start again in place
                raise
            _end(error)

    return wrapped
