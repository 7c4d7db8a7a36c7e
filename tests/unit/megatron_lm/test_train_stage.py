"""A run keeps the blend that it began with, whatever is searched while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.errors import BlendError
from megatron_mergemix.megatron_lm import train_stage
from megatron_mergemix.megatron_lm.train_stage import TrainStage
from tests.unit.megatron_lm.test_arguments_page import launch
from tests.unit.megatron_lm.test_mixture_flag import config


class Run:
    """A launch whose search has ended, and its saves."""

    def __init__(self, home: Path) -> None:
        self.config = config().model_copy(update={"run_dir": home / "run", "launched": object()})
        self.blend, self.saves = home / "run" / "blend", home / "saves"
        self.blend.mkdir(parents=True)
        self.saves.mkdir()
        self.write("first")

    def write(self, text: str) -> None:
        for name in ("data_args.txt", "per_split_data_args.json"):
            (self.blend / name).write_text(text)

    def save(self) -> None:
        (self.saves / "latest_checkpointed_iteration.txt").write_text("10")

    def start(self, blend: Path | None = None, **given: Any) -> Any:
        args = launch(**{"save": str(self.saves), "load": str(self.saves), **given})
        TrainStage(self.config, str(blend) if blend else None).before_validation(args)
        return args


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(train_stage, "search_result", lambda config: {})
    monkeypatch.setattr(train_stage, "learned_blend", lambda config, result: {})
    return Run(tmp_path)


def test_a_run_goes_on_with_the_blend_that_it_began_with(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.start().data_args_path == str(run.blend / "data_args.txt")
    run.write("second")
    assert run.start().data_args_path == str(run.blend / "data_args.txt"), "it has not saved yet"
    run.save()
    kept = run.saves / "mergemix_data_args.txt"
    monkeypatch.setattr(train_stage, "search_result", lambda config: None)  # of yet another search
    assert run.start().data_args_path == str(kept)
    assert kept.read_text() == "second"
    assert capsys.readouterr().out == ""
    run.write("third")
    assert run.start().data_args_path == str(kept)
    assert "goes on with the blend that it began with" in capsys.readouterr().out
    changed = run.start(blend=run.blend)
    assert changed.data_args_path == str(run.blend / "data_args.txt")
    assert kept.read_text() == "second"


def test_data_per_split_are_kept_as_well(run: Run) -> None:
    run.start()
    run.save()
    run.write("second")
    kept = run.saves / "mergemix_per_split_data_args.json"
    assert run.start(valid_data_path=["/own"]).per_split_data_args_path == str(kept)
    assert kept.read_text() == "first"


def test_a_run_from_another_checkpoint_takes_what_was_learned(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "latest_checkpointed_iteration.txt").write_text("5")
    (base / "mergemix_data_args.txt").write_text("of its own run")
    assert run.start(load=str(base)).data_args_path == str(run.blend / "data_args.txt")
    assert (run.saves / "mergemix_data_args.txt").read_text() == "first"
    assert run.start(load=str(base), save=None).data_args_path == str(run.blend / "data_args.txt")


def test_rank_0_alone_looks_whether_the_blend_is_that_of_the_search(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "search_result", lambda config: None)
    with pytest.raises(BlendError, match="there is no learned mixture"):
        run.start()
    monkeypatch.setenv("RANK", "1")
    assert run.start().data_args_path == str(run.blend / "data_args.txt")
    assert not list(run.saves.iterdir())
