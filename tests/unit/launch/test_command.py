"""Which launches a job consists of, and what becomes of one that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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
    records(monkeypatch)
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


def records(monkeypatch: pytest.MonkeyPatch, *done: str) -> set[str]:
    """Have the stages look here for what is done; launches that end well are put in."""
    there, launch = set(done), command._launch

    def launched(config: Config, flags: list[str], *rest: Any) -> int:
        code = launch(config, flags, *rest)
        folder = {"expert": "experts/", "reference": "references/"}.get(flags[1])
        scored = flags[-1] if flags[-2] == "--mergemix-model" else f"scored/{flags[-1]}"
        if code == 0:
            there.add(f"{folder}{flags[-1]}" if folder else scored)
        return code

    def on_record(prefix: str) -> Any:
        return lambda config, name: {} if f"{prefix}{name}" in there else None

    monkeypatch.setattr(command, "_launch", launched)
    monkeypatch.setattr(command, "is_trained", lambda config, name: name in there)
    monkeypatch.setattr(command, "reference_record", on_record("scored/"))
    monkeypatch.setattr(command, "proxy_record", on_record("mixture:"))
    return there


def launched_here() -> list[str]:
    """Return the flags of the launches so far, without those that all have."""
    lines = Path("launches").read_text().splitlines()
    return [" ".join(json.loads(line)[3:]) for line in lines]


def test_what_is_done_is_not_launched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ["experts/math", "references/learned", "scored/learned", "references/uniform"]
    records(monkeypatch, *done, "mixture:uniform")
    settings = config(tmp_path, sys.executable, "-c", RECORDS)
    run_stages(settings, "train", ["experts/math", "experts/code", "references/uniform"])
    run_stages(settings, "validate", ["learned", "uniform"])
    assert launched_here() == [
        "expert --mergemix-expert code",
        "evaluate --mergemix-model mixture:learned",
        "evaluate --mergemix-mixture uniform",
    ]


def test_without_a_command_every_stage_of_a_validation_is_told_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = records(monkeypatch)
    for wanted, done in (
        ("reference --mergemix-mixture learned", "references/learned"),
        ("evaluate --mergemix-mixture learned", "scored/learned"),
        ("evaluate --mergemix-model mixture:learned", "mixture:learned"),
        ("reference --mergemix-mixture uniform", "references/uniform"),
    ):
        with pytest.raises(ConfigError, match=f"--mergemix-stage {wanted} to your launch"):
            run_stages(config(tmp_path), "validate", ["learned", "uniform"])
        there.add(done)
    there |= {"scored/uniform", "mixture:uniform"}
    run_stages(config(tmp_path), "validate", ["learned", "uniform"])


def test_a_reference_that_fails_keeps_no_other_from_its_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records(monkeypatch)
    fails = f"{RECORDS}; raise SystemExit(sys.argv[-3:: 2] == ['reference', 'even'])"
    settings = config(tmp_path, sys.executable, "-c", fails).model_dump()
    settings["references"] = {"even": "uniform", "uniform": "uniform"}
    with pytest.raises(MergeMixError) as caught:
        run_stages(Config.model_validate(settings), "validate", ["even", "uniform"])
    assert launched_here() == [
        "reference --mergemix-mixture even",
        "evaluate --mergemix-model mixture:even",
        "reference --mergemix-mixture uniform",
        "evaluate --mergemix-mixture uniform",
        "evaluate --mergemix-model mixture:uniform",
    ]
    first, last = str(caught.value).splitlines()
    assert "--mergemix-stage reference --mergemix-mixture even ended with exit code 1" in first
    assert last.startswith("If it fails again, remove even from references: nothing else")


def test_a_command_that_always_fails_is_not_started_for_every_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records(monkeypatch)
    settings = config(tmp_path, sys.executable, "-c", f"{RECORDS}; raise SystemExit(1)")
    with pytest.raises(MergeMixError, match="3 in a row failed, so no other was started"):
        run_stages(settings, "validate", ["learned", "uniform", "proportional"])
    assert len(launched_here()) == 3


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
    records(monkeypatch)
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
