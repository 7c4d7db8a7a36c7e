"""Every stage of the plugin in the real ``pretrain_gpt.py``, from a base to a training run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_mergemix.checkpoint.common_state import arguments, read_common
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.data.blend import blend_arguments
from megatron_mergemix.journal import Trial, read_journal
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.training_runs import expert_run
from tests.support.megatron_lm import each_checkout, training_losses
from tests.support.plugin import DP2, MODEL, PP2, STEPS, TP2, Launches
from tests.support.weights import read_weights

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def launches(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """A base, three experts of three layouts, a search on two pipeline stages."""
    made = Launches(checkout, tmp_path_factory.mktemp("plugin"))
    made.write()
    for expert, layout in (("math", TP2), ("code", DP2)):
        done = made.stage("expert", *layout, ranks=2, expert=expert)
        assert done.returncode == 0, done.stdout
        assert f"experts/{expert} is trained" in done.stdout
    with made.run(*PP2, ranks=2) as run:  # does what is left
        assert run.end() == 0, run.stdout + run.stderr
    assert "experts/math: already trained" in run.stdout
    assert "stage search" in run.stdout
    return made


def trials(launches: Launches) -> list[Trial]:
    return read_journal(launches.run_dir / "search" / "trials.jsonl")[1]


def assert_same_scores(ours: Sequence[Trial], theirs: Sequence[Trial], rtol: float) -> None:
    """Compare the trials that the design asks for; what is verified depends on the scores."""
    ours, theirs = (
        [trial for trial in trials if not trial.purpose.startswith("verify")]
        for trials in (ours, theirs)
    )
    assert len(ours) >= 6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.mixture == other.mixture
        for capability, metrics in mine.scores.items():
            for metric, score in metrics.items():
                expected = other.scores[capability][metric].value
                np.testing.assert_allclose(score.value, expected, rtol=rtol)


@each_checkout()
def test_an_expert_is_trained_from_the_base_on_its_component(
    checkout: Path, launches: Launches
) -> None:
    config = with_recorded_launch(load_config(launches.config))
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


@each_checkout()
@pytest.mark.parametrize(("layout", "ranks"), [((), 1), (TP2, 2), (DP2, 2)], ids=["1", "TP", "DP"])
def test_the_search_scores_the_same_under_every_layout(
    checkout: Path, launches: Launches, layout: Sequence[str], ranks: int
) -> None:
    expected = trials(launches)
    kept = launches.home / "search of two stages"
    shutil.move(launches.run_dir / "search", kept)
    try:
        done = launches.stage("search", *layout, ranks=ranks)
        assert done.returncode == 0, done.stdout
        assert_same_scores(trials(launches), expected, rtol=1e-5)
    finally:
        shutil.rmtree(launches.run_dir / "search", ignore_errors=True)
        shutil.move(kept, launches.run_dir / "search")


@each_checkout()
def test_the_built_in_search_gives_the_same_scores(
    checkout: Path, launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEMIX_DEVICE", "cpu")
    settings = yaml.safe_load(launches.config.read_text())
    config = with_recorded_launch(load_config(launches.config))
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
    assert main(["search", str(path)]) == 0
    ours = read_journal(tmp_path / "run" / "search" / "trials.jsonl")[1]
    assert_same_scores(ours, trials(launches), rtol=1e-5)


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
def test_the_training_run_takes_the_learned_blend(checkout: Path, launches: Launches) -> None:
    done = launches.stage("train", "--mock-data", "--train-iters", "2")
    assert done.returncode == 0, done.stdout
    # blend.split leaves nothing to validate on, and the launch validates: held-out data does.
    blend = launches.run_dir / "blend" / "per_split_data_args.json"
    assert re.search(rf"per_split_data_args_path \.+ {re.escape(str(blend))}\n", done.stdout)
    table = done.stdout.split("arguments replaced:\n")[1].split("\nusing world size")[0]
    assert [line.split()[0] for line in table.splitlines()] == [
        "--per-split-data-args-path",
        "--mock-data",
    ]


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
    uniform = next(trial for trial in trials(launches) if trial.purpose == "prior:uniform")
    proxy = {name: metrics["loss"].value for name, metrics in uniform.scores.items()}
    assert losses["prose"] > proxy["prose"]  # it has seen none
    assert losses["math"] < proxy["math"]


@each_checkout()
def test_an_expert_with_a_killed_rank_continues_from_its_last_save(
    checkout: Path, launches: Launches
) -> None:
    other = launches.with_settings("killed", {"run_dir": str(launches.home / "killed")})
    saves = other.run_dir / "experts" / "math" / "checkpoints"
    words = other.words("expert", *TP2, "--save-interval", "1", expert="math")
    with other.start(words, ranks=2) as launch:
        launch.wait_until((saves / "iter_0000001" / "metadata.json").exists)
        launch.rank(1).kill()
        assert launch.end(timeout=60) != 0
        assert launch.survivors() == []
    assert not (saves / "iter_0000004").exists(), "the kill came too late"
    with other.start(words, ranks=2) as launch:
        assert launch.end() == 0, launch.stdout + launch.stderr
    assert min(training_losses(launch.stdout)) > 1
    straight = read_weights(launches.run_dir / "experts" / "math" / "checkpoints" / "iter_0000004")
    resumed = read_weights(saves / "iter_0000004")
    for name, tensor in straight.items():
        np.testing.assert_array_equal(resumed[name], tensor, err_msg=name)


@each_checkout()
def test_a_search_with_a_killed_rank_continues_after_its_last_trial(
    checkout: Path, launches: Launches
) -> None:
    shutil.copytree(launches.run_dir, launches.home / "again", symlinks=True)
    shutil.rmtree(launches.home / "again" / "search")
    settings = {"run_dir": str(launches.home / "again"), "search": {"trials": 60}}
    other = launches.with_settings("again", settings)
    journal = other.run_dir / "search" / "trials.jsonl"
    words = other.words("search", *TP2)
    with other.start(words, ranks=2) as launch:
        launch.wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4)
        launch.rank(1).kill()
        assert launch.end(timeout=60) != 0
        assert launch.survivors() == []
    done = len(read_journal(journal)[1])
    assert not (other.run_dir / "search" / "result.json").exists(), "the kill came too late"
    with other.start(words, ranks=2) as launch:
        assert launch.end() == 0, launch.stdout + launch.stderr
    assert f"search: continues after {done} trials" in launch.stdout
    assert len(read_journal(journal)[1]) >= 61


@each_checkout()
def test_virtual_stages_and_spread_moe_experts_score_the_same(
    checkout: Path, launches: Launches, tmp_path: Path
) -> None:
    moe = ("--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type=alltoall")
    four = [word if word != "2" or last != "--num-layers" else "4" for last, word in pairs(MODEL)]
    other = replace(
        launches.with_settings("four", {"run_dir": str(launches.home / "four")}),
        model=(*four, *moe),
    )
    saving = ("--save", str(tmp_path / "four"), "--save-interval", "2", "--train-iters", "2")
    done = other.stock("--mock-data", *saving)
    assert done.returncode == 0, done.stdout
    scores = []
    virtual = ("--num-layers-per-virtual-pipeline-stage", "1")
    spread = ("--expert-model-parallel-size", "2")
    for layout, ranks in (((), 1), ((*PP2, *virtual), 2), (spread, 2)):
        shutil.rmtree(other.run_dir, ignore_errors=True)
        flag = ("--mergemix-checkpoint", str(tmp_path / "four"))
        done = other.stage("evaluate", *layout, *flag, ranks=ranks)
        assert done.returncode == 0, done.stdout
        (record,) = (other.run_dir / "evaluate").glob("*.json")
        measured = json.loads(record.read_text())["scores"]
        scores.append([measured[name]["loss"]["value"] for name in measured])
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
    np.testing.assert_allclose(scores[2], scores[0], rtol=1e-5)


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(("", *words), words, strict=False))


@each_checkout()
def test_errors_of_the_user_are_one_message(checkout: Path, launches: Launches) -> None:
    done = launches.stage("expert", expert="maht")
    assert done.returncode != 0
    assert done.stdout.count("mergemix: error:") == 1
    assert "no run is called 'experts/maht'" in done.stdout
    empty = launches.with_settings("empty", {"run_dir": str(launches.home / "empty")})
    done = empty.stage("train", "--mock-data")
    assert done.returncode != 0
    assert "Run the stages expert (for every domain) and search" in done.stdout
    assert not empty.run_dir.exists()
