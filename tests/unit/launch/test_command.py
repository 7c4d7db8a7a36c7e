"""Which launches a job consists of, and what becomes of one that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, ModelFacts
from megatron_mergemix.errors import ConfigError, MergeMixError, TrainingError
from megatron_mergemix.launch import command
from megatron_mergemix.launch.command import run_stages
from megatron_mergemix.model_facts import record_launch
from tests.support import lm_eval_tasks
from tests.unit.megatron_lm.test_mixture_flag import config as any_config

RECORDS = "import json, sys; print(json.dumps(sys.argv[1:]), file=open('launches', 'a'))"


def config(tmp_path: Path, *command: str) -> Config:
    settings = any_config().model_dump()
    settings["run_dir"] = tmp_path / "run"
    settings["launch"]["command"] = list(command) or None
    return Config.model_validate(settings)


def test_every_stage_is_a_launch_of_the_user_s_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "is_trained", lambda config, name: True)
    settings = config(tmp_path, sys.executable, "-c", RECORDS, "pretrain_gpt.py", "--bf16")
    run_stages(settings, "train", ["experts/math", "references/uniform"])
    run_stages(settings, "search")
    run_stages(settings, "validate", ["learned"])
    run_stages(settings, "diagnose")
    common = ["pretrain_gpt.py", "--bf16", "--mergemix-config", str(tmp_path / "run/config.json")]
    launched = [json.loads(line) for line in Path("launches").read_text().splitlines()]
    assert [words[:4] for words in launched] == [common] * 7
    assert [" ".join(words[4:]) for words in launched] == [
        "--mergemix-stage expert --mergemix-expert math",
        "--mergemix-stage reference --mergemix-mixture uniform",
        "--mergemix-stage search",
        "--mergemix-stage reference --mergemix-mixture learned",
        "--mergemix-stage evaluate --mergemix-mixture learned",
        "--mergemix-stage evaluate --mergemix-model mixture:learned",
        "--mergemix-stage diagnose",
    ]


def test_a_failed_launch_ends_the_job(tmp_path: Path) -> None:
    settings = config(tmp_path, sys.executable, "-c", "raise SystemExit(3)")
    with pytest.raises(MergeMixError, match="--mergemix-expert math ended with exit code 3"):
        run_stages(settings, "train", ["experts/math", "experts/code"])


def test_a_model_that_cannot_be_scored_keeps_no_other_from_its_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fails = f"{RECORDS}; raise SystemExit(sys.argv[-1] == 'base')"
    settings = config(tmp_path, sys.executable, "-c", fails)
    with pytest.raises(MergeMixError, match="--mergemix-model base ended with exit code 1"):
        run_stages(settings, "evaluate", ["base", "expert:math"])
    assert len(Path("launches").read_text().splitlines()) == 2


def test_a_launch_that_leaves_before_its_run_is_done_ends_the_job(tmp_path: Path) -> None:
    settings = config(tmp_path, sys.executable, "-c", "pass")
    with pytest.raises(TrainingError, match="--mergemix-expert math ended well before its run"):
        run_stages(settings, "train", ["experts/math", "experts/code"])
    run_stages(settings, "search")


def test_tasks_must_fit_into_the_model_that_the_first_launch_has_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch puts its sequence length on record; no other is started."""
    monkeypatch.setattr(command, "is_trained", lambda config, name: True)
    task = lm_eval_tasks.write_choices(tmp_path, [["x", "a long answer"]])
    settings = config(tmp_path, sys.executable, "-c", RECORDS).model_dump()
    settings["evaluate"]["capabilities"]["asked"] = {"lm_eval": {"tasks": [str(task)]}}
    asking = Config.model_validate(settings)
    monkeypatch.chdir(tmp_path)
    facts = ModelFacts(seq_length=8, global_batch_size=2, scoring={}, training={})
    record_launch(asking.model_copy(update={"launched": facts}))
    with pytest.raises(ConfigError, match=r"task own, document 0: .* sees 8 at once"):
        run_stages(asking, "train", ["experts/math", "experts/code"])
    assert len(Path("launches").read_text().splitlines()) == 1


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be started: torchrunn: No such file"):
        run_stages(config(tmp_path, "torchrunn"), "search")


def test_without_a_command_the_next_launch_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --mergemix-config mix.yaml --mergemix-stage search"):
        run_stages(config(tmp_path), "search")
