"""What goes wrong for a new user ends soon, with one clear message, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.checkpoint.archive import stored_tensor
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.config import load_config
from megatron_mergemix.experiment.digests import trial_digests
from megatron_mergemix.experiment.strategy import make_strategy
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.trials import Trial
from tests.support.copies import copy_experiment
from tests.support.processes import mergemix
from tests.support.tiny_dataset import write_dataset

ONE_RANK = ("--set=parallel.processes=1", "--set=parallel.tensor=1")


def refusal(
    config: Path, *words: str, timeout: float = 60.0, environment: Mapping[str, str] | None = None
) -> str:
    """Start ``mergemix words``, which must fail cleanly; return its one message."""
    with mergemix(config, *words, environment=environment) as command:
        assert command.end(timeout) == 1, command.stdout + command.stderr
        assert command.survivors(patience=10) == []
        message = command.stderr
    assert message.startswith("error: "), message
    assert message.count("error: ") == 1, message
    assert "Traceback" not in message
    run_dir = config.parent / "run"
    assert not (run_dir / "search" / "result.json").exists()
    assert not (run_dir / "blend").exists()
    return message


@pytest.fixture
def copy(trained_experiment: Path, tmp_path: Path) -> Path:
    """Return the ``mix.yaml`` of a trained experiment that may be spoilt."""
    return copy_experiment(trained_experiment, tmp_path / "copy")


# ---- found before any rank starts ----


def test_a_wrong_dataset_is_named_with_the_way_to_make_one(copy: Path) -> None:
    message = refusal(copy, "run", "--set=domains.math.prefixes=[/nowhere/math]")
    assert "domains.math.prefixes" in message
    assert "/nowhere/math.idx and /nowhere/math.bin not found" in message
    assert "mergemix data" in message


def test_a_wrong_base_checkpoint_is_named(copy: Path) -> None:
    message = refusal(copy, "run", "--set=base={checkpoint: /nowhere/base}")
    assert "base.checkpoint: Checkpoint /nowhere/base does not exist" in message
    assert "Name a root or an iteration's folder" in message


def test_a_cut_off_expert_is_refused_before_the_search(copy: Path) -> None:
    expert = expert_checkpoints(load_config(copy))["code"]
    file = max(expert.glob("*.distcp"), key=lambda path: path.stat().st_size)
    length = file.stat().st_size
    os.truncate(file, length // 2)
    message = refusal(copy, "search")
    assert str(expert) in message
    assert f"{file.name} has {length // 2} bytes, expected at least {length}" in message
    assert "Copy it again or name another save" in message


def test_a_cut_off_base_is_refused_before_training_from_it(copy: Path) -> None:
    base = base_checkpoint(load_config(copy))
    file = max(base.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    words = (f"--set=base={{checkpoint: {base}}}", f"--set=run_dir={copy.parent / 'fresh'}")
    message = refusal(copy, "train", "experts", *words)
    assert f"base.checkpoint: Checkpoint {base} is damaged: {file.name} has" in message
    assert not (copy.parent / "fresh").exists()


def test_a_domain_with_too_few_tokens_is_named(copy: Path) -> None:
    write_dataset(copy.parent / "short", [np.arange(20)])
    message = refusal(copy, "run", f"--set=domains.code.prefixes=[{copy.parent / 'short'}]")
    assert "domains.code.prefixes: 20 tokens" in message
    assert "expected more than model.seq_length 32" in message


def test_a_dataset_that_megatron_could_not_split_is_refused_at_once(copy: Path) -> None:
    message = refusal(copy, "run", "--set=blend.split='999,1,0'")
    assert "domains.math.prefixes" in message
    assert "too few for the valid part" in message
    assert "set blend.split: '1,0,0'" in message


def test_a_second_start_in_one_run_dir_is_told_who_is_there(copy: Path) -> None:
    run_dir = RunDir(copy.parent / "run")
    before = run_dir.config.read_bytes()
    with run_dir.lock("run"):
        message = refusal(copy, "run", "--set=search.trials=20")
    assert f"run in {run_dir.root} is under way already: process {os.getpid()} on" in message
    assert "use another run_dir" in message
    assert run_dir.config.read_bytes() == before


def test_a_changed_setting_is_refused_by_a_search_that_began(copy: Path) -> None:
    config = load_config(copy)
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    for planned in make_strategy(config).ask():
        journal.append(Trial(planned.index, planned.purpose, planned.mixture, {}, {}, error="no"))
    before = RunDir(config.run_dir).trials.read_bytes()
    message = refusal(copy, "search", "--set=search.seed=5")
    assert "search.seed: 0 -> 5" in message
    assert "use another run_dir" in message
    message = refusal(copy, "search", "--set=search.strategy=bayesian")
    assert "search.strategy: mergemix -> bayesian" in message
    message = refusal(copy, "search", "--set=domains.code.bounds=[0.0, 0.5]")
    assert "of the journal measured" in message
    assert "settings of search: restore them, or use another run_dir" in message
    message = refusal(copy, "search", "--set=evaluate.capabilities.code.loss.sequences=5")
    assert "evaluate.code: loss, metric bpb, 13 x 32 tokens" in message
    assert "-> loss, metric bpb, 5 x 32 tokens" in message
    assert "use another run_dir" in message
    assert RunDir(config.run_dir).trials.read_bytes() == before


@pytest.mark.parametrize("verb", ["run", "search"])
def test_changed_data_under_a_finished_run_is_refused(copy: Path, verb: str) -> None:
    prefix = copy.parent / "data" / "code"
    with open(f"{prefix}.bin", "r+b") as tokens:
        tokens.write(b"\x07\x00")
    message = refusal(copy, verb)
    assert f"{copy.parent / 'run' / 'base'} holds another run: blend.{prefix}.data:" in message
    assert "Choose another run_dir, or remove" in message


def test_a_changed_expert_setting_is_refused_by_the_search(copy: Path) -> None:
    message = refusal(copy, "search", "--set=experts.lr=1e-3")
    assert f"{copy.parent / 'run' / 'experts' / 'math'} holds another run: lr: 0.002 ->" in message


# ---- found by the ranks ----


def test_nan_in_an_expert_is_named_with_its_tensor(copy: Path) -> None:
    path = expert_checkpoints(load_config(copy))["prose"]
    _write_nan(path, "decoder.final_layernorm.weight")
    message = refusal(copy, "search", *ONE_RANK, timeout=120)
    assert f"prose ({path}) holds 2 NaN or Inf values in decoder.final_layernorm.weight" in message
    assert "use an earlier save or train it again" in message


def _write_nan(path: Path, name: str) -> None:
    """Make the first two elements of a float32 tensor NaN, in the file itself."""
    chunk = read_index(path).tensors[name].chunks[0]
    with (path / chunk.file).open("r+b") as file:
        where = stored_tensor(file.fileno(), chunk.file_offset, chunk.length)
        assert where.dtype == "float32"
        file.seek(where.position)
        file.write(np.full(2, np.nan, dtype="<f4").tobytes())


def test_an_expert_of_another_base_is_refused(copy: Path) -> None:
    config = load_config(copy)
    other = copy.parent / "other"
    words = ("--set=base.train.seed=7", "--set=base.train.tokens=2048", f"--set=run_dir={other}")
    with mergemix(copy, "train", "base", *words, *ONE_RANK) as command:
        assert command.end(120) == 0, command.stderr
    given = {name: str(path) for name, path in expert_checkpoints(config).items()}
    given["code"] = str(other / "base" / "checkpoints")
    message = refusal(copy, "search", f"--set=experts.checkpoints={given}", *ONE_RANK, timeout=120)
    assert "expert code" in message
    assert f"was not trained from the base ({base_checkpoint(config)})" in message


# Raises on rank 1 when it measures its third candidate.
RAISES = """
import os
if os.environ.get("RANK") == "1":
    from megatron_mergemix.search import loop
    measure, calls = loop._measure, []
    def raising(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise ValueError("the disk of rank 1 is gone")
        return measure(*arguments)
    loop._measure = raising
"""


def test_a_rank_that_raises_ends_all_and_is_quoted(copy: Path) -> None:
    site = copy.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(RAISES)
    message = refusal(copy, "search", timeout=120, environment={"PYTHONPATH": str(site)})
    assert message.startswith("error: rank 1: ValueError: the disk of rank 1 is gone\n")
    assert f"The traceback is in {copy.parent / 'run' / 'logs' / 'search.log'}" in message
    log = (copy.parent / "run" / "logs" / "search.log").read_text()
    assert "in raising" in log, "the log holds the traceback"
