"""Every stage of the plugin in the real ``pretrain_gpt.py``, from a base to a training run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_mergemix.checkpoint.common_state import arguments, read_common
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.cli import main
from megatron_mergemix.data.blend import blend_arguments
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.experiment_runs import expert_run
from tests.support.forked_jobs import run_verb
from tests.support.megatron_lm import each_checkout, training_losses
from tests.support.plugin import (
    DP2,
    PP2,
    STEPS,
    TP2,
    BigRun,
    Launches,
    assert_same_scores,
)
from tests.support.weights import read_weights

pytestmark = pytest.mark.timeout(900)


@each_checkout()
def test_an_expert_is_trained_from_the_base_on_its_component(
    checkout: Path, launches: Launches
) -> None:
    config = launches.settings()
    for domain in config.domains:
        run = expert_run(config, domain)
        saved = arguments(read_common(read_index(run.final_checkpoint())))
        expected = {
            "data_path": blend_arguments(list(run.blend)),
            "train_iters": STEPS,
            "lr": 1e-2,
            "min_lr": 1e-2,
            "lr_decay_style": "constant",
            "finetune": True,
            "consumed_train_samples": 4 * STEPS,
        }
        assert {name: saved[name] for name in expected} == expected
    base = read_weights(launches.home / "base" / "iter_0000004")
    weights = [read_weights(expert_run(config, name).final_checkpoint()) for name in config.domains]
    for name, tensor in base.items():
        assert all(other[name].shape == tensor.shape for other in weights)
    moved = [
        np.sqrt(sum(np.square(w[n] - base[n]).sum() for n in base))
        / np.sqrt(sum(np.square(base[n]).sum() for n in base))
        for w in weights
    ]
    assert all(0.001 < distance < 0.5 for distance in moved), moved


@each_checkout()
def test_a_finished_stage_is_not_run_again(checkout: Path, launches: Launches) -> None:
    record = launches.run_dir / "experts" / "math" / "finished.json"
    before = record.stat()
    again = launches.stage("expert", *TP2, ranks=2, expert="math")
    assert again.returncode == 0, again.stdout
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "experts/math is trained:" not in again.stdout
    assert "experts/math is trained already" in again.stdout
    assert training_losses(again.stdout) == {}


@pytest.mark.nightly
@each_checkout()
def test_a_run_starts_the_stages_that_are_left(checkout: Path, launches: Launches) -> None:
    other = launches.with_settings("left", {"run_dir": str(launches.home / "left")})
    shutil.copytree(launches.run_dir, other.run_dir, symlinks=True)
    for folder in ("experts/prose", "search", "blend"):
        shutil.rmtree(other.run_dir / folder)
    with other.run(*PP2, ranks=2) as run:
        assert run.end() == 0, run.stdout + run.stderr
    assert "experts/math: already trained" in run.stdout
    assert "stage search" in run.stdout
    assert_same_scores(other.trials(), launches.trials(), rtol=1e-6)
    assert (other.run_dir / "blend" / "blend.yaml").exists()


@each_checkout()
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param((), 1, id="1", marks=pytest.mark.nightly),
        pytest.param(TP2, 2, id="TP"),
        pytest.param(DP2, 2, id="DP", marks=pytest.mark.nightly),
    ],
)
def test_the_search_scores_the_same_under_every_layout(
    checkout: Path, launches: Launches, layout: Sequence[str], ranks: int
) -> None:
    expected = launches.trials()
    kept = launches.home / "search of two stages"
    shutil.move(launches.run_dir / "search", kept)
    try:
        done = launches.stage("search", *layout, ranks=ranks)
        assert done.returncode == 0, done.stdout
        assert_same_scores(launches.trials(), expected, rtol=1e-5)
    finally:
        shutil.rmtree(launches.run_dir / "search", ignore_errors=True)
        shutil.move(kept, launches.run_dir / "search")


@each_checkout()
def test_the_built_in_search_gives_the_same_scores(
    checkout: Path, launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEMIX_DEVICE", "cpu")
    settings = yaml.safe_load(launches.config.read_text())
    config = launches.settings()
    settings |= {
        "run_dir": str(tmp_path / "run"),
        "launch": {"kind": "builtin"},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": _ffn(launches),
            "normalization": "LayerNorm",
            "seq_length": 32,
            "tie_embeddings": True,
            "make_vocab_size_divisible_by": 128,
        },
    }
    settings["experts"]["checkpoints"] = {
        name: str(expert_run(config, name).final_checkpoint()) for name in config.domains
    }
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    run_verb(path, "search")
    ours = read_journal(tmp_path / "run" / "search" / "trials.jsonl")[1]
    assert_same_scores(ours, launches.trials(), rtol=1e-5)


def _ffn(launches: Launches) -> int:
    saved = arguments(read_common(read_index(launches.home / "base" / "iter_0000004")))
    return int(saved["ffn_hidden_size"])


@each_checkout()
def test_the_training_run_draws_the_blend_it_is_given(
    checkout: Path, launches: Launches, tmp_path: Path
) -> None:
    data = launches.home / "data"
    (tmp_path / "data_args.txt").write_text(f"0.75 {data}/math 0.25 {data}/code\n")
    cache = ("--data-cache-path", str(tmp_path / "cache"), "--eval-iters", "0")
    given = ("--mergemix-blend", str(tmp_path), "--train-iters", "10", "--mock-data")
    done = launches.stage("train", *given, *cache)
    assert done.returncode == 0, done.stdout
    assert len(training_losses(done.stdout)) > 0
    (index,) = (tmp_path / "cache").glob("*train*dataset_index.npy")
    drawn = np.load(index)[:40]
    assert np.bincount(drawn).tolist() == [30, 10]


@each_checkout()
def test_the_training_run_takes_the_learned_blend_and_draws_it(
    checkout: Path, launches: Launches, big_run: BigRun
) -> None:
    output = big_run.output.read_text()
    # blend.split leaves nothing to validate on, and the launch validates: held-out data does.
    blend = launches.run_dir / "blend" / "per_split_data_args.json"
    assert re.search(rf"per_split_data_args_path \.+ {re.escape(str(blend))}\n", output)
    table = output.split("arguments replaced:\n")[1].split("\nusing world size")[0]
    assert [line.split()[0] for line in table.splitlines()] == [
        "--per-split-data-args-path",
        "--mock-data",
    ]
    learned = json.loads((launches.run_dir / "search" / "result.json").read_text())["mixture"]
    expected = np.multiply(list(learned.values()), 4 * STEPS)
    np.testing.assert_allclose(big_run.drawn(), expected, atol=1.0)


@each_checkout()
def test_a_reference_is_trained_and_evaluated(checkout: Path, launches: Launches) -> None:
    mixture = ("--mergemix-mixture", "math=0.5,code=0.5")
    done = launches.stage("reference", *mixture)
    assert done.returncode == 0, done.stdout
    done = launches.stage("evaluate", *mixture)
    assert done.returncode == 0, done.stdout
    folder = launches.run_dir / "references" / "math_0_5-code_0_5"
    record = json.loads((folder / "scores.json").read_text())
    losses = {name: metrics["loss"]["value"] for name, metrics in record["scores"].items()}
    uniform = next(trial for trial in launches.trials() if trial.purpose == "prior:uniform")
    proxy = {name: metrics["loss"].value for name, metrics in uniform.scores.items()}
    assert losses["prose"] > proxy["prose"]  # it has seen none
    assert losses["math"] < proxy["math"]


@each_checkout()
def test_the_experts_are_diagnosed_alike_under_every_layout(
    checkout: Path, launches: Launches, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for layout, ranks in ((TP2, 2), ((), 1)):
        shutil.rmtree(launches.run_dir / "diagnose", ignore_errors=True)
        done = launches.stage("diagnose", *layout, ranks=ranks)
        assert done.returncode == 0, done.stdout
        assert "mergemix: measured" in done.stdout
        capsys.readouterr()
        assert main(["diagnose", str(launches.config), "--json", "-"]) == 0  # from the record
        found.append(json.loads(capsys.readouterr().out))
    for name, loss in found[0]["curvature"].items():
        assert max(loss["disagreements"]) < 0.1
        other = found[1]["curvature"][name]
        largest = np.abs(loss["second_order"]).max()
        np.testing.assert_allclose(
            other["second_order"], loss["second_order"], rtol=0, atol=1e-2 * largest
        )
        np.testing.assert_allclose(other["gamma"], loss["gamma"], rtol=1e-2)
    assert found[0]["applied_norm"]["learned"] > 0
    again = launches.stage("diagnose")
    assert again.returncode == 0
    assert "the experts are diagnosed already" in again.stdout


@each_checkout()
def test_errors_of_the_user_are_one_message(checkout: Path, launches: Launches) -> None:
    done = launches.stage("expert", expert="maht")
    assert done.returncode != 0
    assert done.stdout.count("mergemix: error:") == 1
    assert "no run is called 'experts/maht'" in done.stdout
    empty = launches.with_settings("empty", {"run_dir": str(launches.home / "empty")})
    done = empty.stage("train", "--mock-data")
    assert done.returncode != 0
    assert "Run the stage expert for every expert and the stage search" in done.stdout
    assert not empty.run_dir.exists()


@each_checkout()
def test_an_expert_is_its_component_and_the_mean_of_its_last_saves(
    checkout: Path, launches: Launches
) -> None:
    rows = {
        "algebra": {"math": 0.75, "code": 0.25},
        "hack": {"code": 1.0},
        "novel": {"prose": 1.0},
        "all": "uniform",
    }
    experts = {"average_last": 2, "components": rows}
    changes = {"run_dir": str(launches.home / "mean"), "experts": experts}
    other = launches.with_settings("mean", changes)
    flags = ("--save-interval", "2", "--exit-interval", "3")
    done = other.stage("expert", *TP2, *flags, ranks=2, expert="algebra")
    assert done.returncode == 0, done.stdout
    assert "experts/algebra stopped after step 3 of 4" in done.stdout
    done = other.stage("expert", *TP2, *flags[:2], ranks=2, expert="algebra")
    assert done.returncode == 0, done.stdout
    saves = other.run_dir / "experts" / "algebra" / "checkpoints"
    data = launches.home / "data"
    saved = arguments(read_common(read_index(saves / "iter_0000004")))
    assert saved["data_path"] == ["0.750000", f"{data}/math", "0.250000", f"{data}/code"]
    second, last = (read_weights(saves / f"iter_000000{step}") for step in (2, 4))
    mean = read_weights(expert_run(other.settings(), "algebra").final_checkpoint())
    assert mean.keys() == last.keys()
    for name, weight in mean.items():
        np.testing.assert_allclose(weight, (second[name] + last[name]) / 2, rtol=1e-6, atol=1e-8)
    # Killed after the last save, before the mean was written down.
    for trace in ("finished.json", "checkpoints/averaged"):
        path = saves.parent / trace
        path.unlink() if path.is_file() else shutil.rmtree(path)
    done = other.stage("expert", *TP2, *flags[:2], ranks=2, expert="algebra")
    assert done.returncode == 0, done.stdout
    assert training_losses(done.stdout) == {}
    assert "experts/algebra had made all of its 4 steps before" in done.stdout
    again = read_weights(expert_run(other.settings(), "algebra").final_checkpoint())
    assert all(np.array_equal(again[name], weight) for name, weight in mean.items())
