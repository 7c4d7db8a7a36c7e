"""What a stage leaves for ``mergemix status`` when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron_lm import hooks
from megatron_mergemix.megatron_lm.stage import Pretrain, Stage
from megatron_mergemix.processes.error_file import ERROR_FILE
from tests.unit.megatron_lm.test_mixture_flag import config


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(hooks.os, "_exit", leave)
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "expert.error"))
    monkeypatch.setenv("RANK", "0")
    return tmp_path / "expert.error"


def failing(error: Exception) -> None:
    @hooks._clearly
    def hook() -> None:
        raise error

    hook()


def test_an_error_of_the_user_is_left_and_ends_the_rank(left: Path) -> None:
    with pytest.raises(Left):
        failing(ConfigError("--seq-length is missing."))
    assert left.read_text() == "--seq-length is missing."


def test_what_megatron_fails_with_is_left_and_raised(left: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        failing(RuntimeError("CUDA out of memory"))
    assert left.read_text().startswith("rank 0: RuntimeError: CUDA out of memory\n")


class Scoring(Stage):
    """Stands for a stage whose ranks wait for each other's word."""

    trains = False

    def around(self, pretrain: Pretrain) -> Pretrain:
        return pretrain


class Training(Scoring):
    trains = True


@pytest.mark.parametrize(("stage", "end"), [(Scoring, Left), (Training, RuntimeError)])
def test_a_rank_that_others_may_wait_for_ends_at_once(
    left: Path,
    stage: type[Stage],
    end: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def pretrain() -> None:
        raise RuntimeError("CUDA out of memory")

    made = stage(config())
    monkeypatch.setattr(hooks, "_stage", lambda: made)
    with pytest.raises(end):
        hooks.wrap_pretrain(pretrain)()
    assert left.read_text().startswith("rank 0: RuntimeError: CUDA out of memory\n")
    assert ("Traceback" in capsys.readouterr().err) == (end is Left)


def test_without_the_variable_no_file_is_written(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ERROR_FILE)
    with pytest.raises(RuntimeError):
        failing(RuntimeError("CUDA out of memory"))
    assert list(left.parent.iterdir()) == []
