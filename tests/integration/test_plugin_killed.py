"""A rank is killed in every stage: all ranks end, and the next start of the same continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_mergemix.checkpoint.common_state import arguments, read_common
from megatron_mergemix.checkpoint.metadata import read_index
from tests.support.datasets import make_domains
from tests.support.experiment import DOMAINS
from tests.support.megatron_lm import each_checkout, training_losses
from tests.support.plugin import STEPS, TP2, BigRun, Launches
from tests.support.processes import Command
from tests.support.weights import assert_same_weights

pytestmark = pytest.mark.timeout(900)

LAST = f"iter_{STEPS:07d}"
MIXTURE = ("--mergemix-mixture", "as_math")


def kill_rank_1(launch: Command, when: Callable[[], bool]) -> None:
    """Kill it, and see that nothing of the launch lives on."""
    launch.wait_until(lambda: "arguments replaced:" in launch.stdout)
    victim = launch.rank(1)
    launch.wait_until(when)
    victim.kill()
    assert launch.end(timeout=60) != 0
    assert launch.survivors() == []


def output_of_next_start(launches: Launches, words: Sequence[str]) -> str:
    done = launches.complete(words, ranks=2)
    assert done.returncode == 0, done.stdout
    return done.stdout


def kill_and_continue_training(launches: Launches, words: Sequence[str], saves: Path) -> None:
    with launches.start(words, ranks=2) as launch:
        kill_rank_1(launch, when=(saves / "latest_checkpointed_iteration.txt").exists)
    assert not (saves / LAST).exists(), "the kill came too late"
    assert min(training_losses(output_of_next_start(launches, words))) > 1


@each_checkout()
def test_an_expert_continues_from_its_last_save(checkout: Path, launches: Launches) -> None:
    other = launches.with_settings("killed", {"run_dir": str(launches.home / "killed")})
    saves = other.run_dir / "experts" / "math" / "checkpoints"
    words = other.words("expert", *TP2, "--save-interval", "1", expert="math")
    kill_and_continue_training(other, words, saves)
    assert_same_weights(saves / LAST, launches.run_dir / "experts" / "math" / "checkpoints" / LAST)


@pytest.mark.nightly
@each_checkout()
def test_a_search_continues_after_its_last_trial(checkout: Path, launches: Launches) -> None:
    shutil.copytree(launches.run_dir, launches.home / "again", symlinks=True)
    shutil.rmtree(launches.home / "again" / "search")
    settings = {"run_dir": str(launches.home / "again"), "search": {"trials": 20}}
    other = launches.with_settings("again", settings)
    journal = other.run_dir / "search" / "trials.jsonl"
    words = other.words("search", *TP2)
    with other.start(words, ranks=2) as launch:
        kill_rank_1(launch, lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4)
    done = len(other.trials())
    assert not (other.run_dir / "search" / "result.json").exists(), "the kill came too late"
    output = output_of_next_start(other, words)
    assert f"search: continues after {done} trials" in output
    assert len(other.trials()) >= 21


@pytest.fixture(scope="module")
def reference(launches: Launches) -> Launches:
    """An experiment with a reference that is the same run as the expert math, killed once."""
    held_out = launches.home / "long"
    make_domains(held_out, DOMAINS, [40000] * len(DOMAINS))
    losses = {
        name: {"loss": {"prefixes": [str(held_out / name)], "sequences": 300}} for name in DOMAINS
    }
    changes = {
        "run_dir": str(launches.home / "killed reference"),
        "references": {"as_math": launches.mixture_of("math")},
        "evaluate": {"capabilities": losses},
    }
    made = launches.with_settings("killed reference", changes)
    words = made.words("reference", *TP2, *MIXTURE, "--save-interval", "1")
    saves = made.run_dir / "references" / "as_math" / "checkpoints"
    kill_and_continue_training(made, words, saves)
    return made


@pytest.mark.nightly
@each_checkout()
def test_a_reference_continues_from_its_last_save(
    checkout: Path, launches: Launches, reference: Launches
) -> None:
    saves = reference.run_dir / "references" / "as_math" / "checkpoints"
    assert_same_weights(saves / LAST, launches.run_dir / "experts" / "math" / "checkpoints" / LAST)


@pytest.mark.nightly
@each_checkout()
def test_an_evaluation_is_made_by_the_next_start(checkout: Path, reference: Launches) -> None:
    scores = reference.run_dir / "references" / "as_math" / "scores.json"
    words = reference.words("evaluate", *TP2, *MIXTURE)
    with reference.start(words, ranks=2) as launch:
        kill_rank_1(launch, lambda: "successfully loaded checkpoint" in launch.stdout)
    assert not scores.exists(), "the kill came too late"
    output_of_next_start(reference, words)
    assert json.loads(scores.read_text())["scores"].keys() == set(DOMAINS)


@pytest.mark.nightly
@each_checkout()
def test_a_training_run_continues_from_its_own_saves_on_the_same_blend(
    checkout: Path, launches: Launches, big_run: BigRun, tmp_path: Path
) -> None:
    run = BigRun(tmp_path)
    kill_and_continue_training(launches, launches.words("train", *run.words), run.saves)
    (drawn,), (straight,) = (
        sorted(other.cache.glob("*train*dataset_index.npy")) for other in (run, big_run)
    )
    assert drawn.name == straight.name  # named by the digest of the blend
    assert drawn.read_bytes() == straight.read_bytes()
    saved = arguments(read_common(read_index(run.saves / LAST)))
    kept = run.saves / "mergemix_per_split_data_args.json"
    assert saved["per_split_data_args_path"] == str(kept)
    learned = launches.run_dir / "blend" / "per_split_data_args.json"
    assert kept.read_bytes() == learned.read_bytes()
    assert_same_weights(run.saves / LAST, big_run.saves / LAST)
