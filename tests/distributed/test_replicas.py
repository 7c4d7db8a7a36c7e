"""Replicas on real ranks: who belongs to one, and searches that do not depend on what they divide.

Every layout searches the same experiment: with candidates divided, with requests divided, and as
the loop finds faster. Journals of dense models are compared bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.trials import Scores, Trial
from tests.distributed.test_search_layouts import SHARE, overrides
from tests.support.run_distributed import RankFailure, run_distributed

DIVIDED = ("candidates", "requests", "auto")


def parts(layouts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return, for every layout, what this rank knows about replicas, and what it gathers."""
    from megatron.core import parallel_state

    from megatron_mergemix.megatron.replicas import Replicas
    from megatron_mergemix.processes.distributed import rank

    found = {}
    for name, sizes in layouts.items():
        parallel_state.initialize_model_parallel(**sizes)
        replicas = Replicas()
        whole = replicas.data_ranks
        with replicas.apart():
            own = replicas.data_ranks
            gathered = replicas.gather({"from": replicas.own, "items": [rank()] * 3})
        assert replicas.data_ranks is whole
        found[name] = (replicas.count, replicas.own, (own.size, own.own), whole.size, gathered)
        parallel_state.destroy_model_parallel()
    return found


FOUR: dict[str, dict[str, int]] = {
    "dp4": {},
    "tp2 dp2": {"tensor_model_parallel_size": 2},
    "pp2 dp2": {"pipeline_model_parallel_size": 2},
    "tp2 pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "ep2 dp4": {"expert_model_parallel_size": 2},
    "ep4 dp4": {"expert_model_parallel_size": 4},
    "tp2 ep2 dp2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2 etp1 ep2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "pp2 ep2 dp2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
EXPECTED: dict[str, tuple[int, list[int], list[tuple[int, int]], int]] = {
    "dp4": (4, [0, 1, 2, 3], [(1, 0)] * 4, 4),
    "tp2 dp2": (2, [0, 0, 1, 1], [(1, 0)] * 4, 2),
    "pp2 dp2": (2, [0, 1, 0, 1], [(1, 0)] * 4, 2),
    "tp2 pp2": (1, [0] * 4, [(1, 0)] * 4, 1),
    "ep2 dp4": (2, [0, 0, 1, 1], [(2, 0), (2, 1)] * 2, 4),
    "ep4 dp4": (1, [0] * 4, [(4, n) for n in range(4)], 4),
    "tp2 ep2 dp2": (1, [0] * 4, [(2, 0), (2, 0), (2, 1), (2, 1)], 2),
    # MoE experts are spread over the tensor ranks: nothing else ties data ranks together.
    "tp2 etp1 ep2": (2, [0, 0, 1, 1], [(1, 0)] * 4, 2),
    "pp2 ep2 dp2": (1, [0] * 4, [(2, 0), (2, 1)] * 2, 2),
}
"""Replicas, each rank's own, size and place of its data ranks within it, data ranks at all."""


def test_a_replica_is_the_ranks_that_wait_for_each_other_in_a_forward_pass() -> None:
    ranks = run_distributed(parts, 4, FOUR)
    for name, (count, own, within, whole) in EXPECTED.items():
        found = [each[name] for each in ranks]
        assert [each[0] for each in found] == [count] * 4, name
        assert [each[1] for each in found] == own, name
        assert [each[2] for each in found] == within, name
        assert [each[3] for each in found] == [whole] * 4, name
        firsts = [own.index(number) for number in range(count)]
        for each in found:
            assert each[4] == [{"from": n, "items": [firsts[n]] * 3} for n in range(count)], name


def waits(store: Path, seconds: float, timeout: float, dying: bool) -> list[str]:
    """Return what is gathered when the first of two replicas takes long, or loses a rank.

    Args:
        store: a file that is not there yet.
        seconds: that it takes.
        timeout: of the process group of all ranks, in seconds.
        dying: whether rank 0 is killed with -9 in place of coming to an end.
    """
    import os
    import signal
    import time
    from datetime import timedelta

    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_mergemix.megatron.replicas import Replicas

    own, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        *("gloo", f"file://{store}"), timedelta(seconds=timeout), rank=own, world_size=size
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    replicas = Replicas()
    if replicas.own == 0:
        time.sleep(seconds)
        if dying and own == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return replicas.gather(f"from {replicas.own}")


@pytest.mark.nightly
def test_a_replica_waits_for_longer_than_a_collective_may(tmp_path: Path) -> None:
    expected = ["from 0", "from 1"]
    assert run_distributed(waits, 4, tmp_path / "store", 12.0, 5.0, False) == [expected] * 4


def test_a_replica_that_waits_notices_that_the_other_was_killed(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(waits, 4, tmp_path / "store", 1.0, 60.0, True)
    assert "Rank 0 ended with exit code -9" in str(failure.value)
    for other in (1, 2, 3):
        assert f"Rank {other} ended with exit code 1" in str(failure.value)
    assert "had no end" not in str(failure.value)


# ---- searches ----


def searches(
    config_path: Path, wanted: Mapping[str, Sequence[str]], failing: Sequence[int] = ()
) -> dict[str, str]:
    """Search once for every list of overrides; return how each ended, and who measured what.

    Args:
        config_path: the YAML.
        wanted: overrides by name.
        failing: the indices of trials that cannot be scored.
    """
    from megatron.core import parallel_state

    from megatron_mergemix.errors import EvaluationError, MergeMixError
    from megatron_mergemix.evaluate.loss import LossEvaluator
    from megatron_mergemix.jobs import search
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.search import loop

    measured: list[int] = []
    measure, evaluate = loop._measure, LossEvaluator.evaluate

    def noted(*arguments: Any) -> Trial:
        measured.append(arguments[-1].index)
        return measure(*arguments)

    def failed(self: LossEvaluator, proxy: Any) -> Scores:
        scores = evaluate(self, proxy)
        if measured[-1] in failing:
            raise EvaluationError(f"trial {measured[-1]} is a lost cause.")
        return scores

    loop._measure, LossEvaluator.evaluate = noted, failed  # type: ignore[method-assign]
    ends = {}
    for name, changes in wanted.items():
        measured.clear()
        config = load_config(config_path, changes)
        parallel.start(config.parallel)
        try:
            search.search(config)
            ends[name] = f"measured {len(measured)}"
        except MergeMixError as error:
            ends[name] = str(error)
        parallel_state.destroy_model_parallel()
    return ends


def lists(
    config_path: Path, home: Path, layout: str, *changes: str, **sizes: int
) -> dict[str, list[str]]:
    """Return overrides by what is divided, each with a run_dir of its own."""
    return {
        divided: [
            *overrides(config_path, home / f"{layout} {divided}", SHARE, **sizes),
            f"search.replicas={divided}",
            *changes,
        ]
        for divided in DIVIDED
    }


def trials_in(run_dir: Path) -> list[Trial]:
    """Return the journal's trials, without their seconds."""
    _, trials = read_journal(run_dir / "search" / "trials.jsonl")
    return [dataclasses.replace(trial, seconds={}) for trial in trials]


@pytest.fixture(scope="module")
def alone(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """Return the trials of one rank."""
    run_dir = tmp_path_factory.mktemp("alone")
    changes = overrides(trained_experiment, run_dir, SHARE, processes=1, tensor=1)
    run_distributed(searches, 1, trained_experiment, {"one": changes})
    return trials_in(run_dir)


@pytest.mark.parametrize("num", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_replicas_write_the_journal_of_one_rank_bit_for_bit(
    trained_experiment: Path, alone: list[Trial], tmp_path: Path, num: int
) -> None:
    smaller = "training.micro_batch_size=4"  # of training, whose batches four ranks must divide
    wanted = lists(trained_experiment, tmp_path, "replicas", smaller, processes=num, tensor=1)
    ends = run_distributed(searches, num, trained_experiment, wanted, timeout=240)
    for divided in DIVIDED:
        assert trials_in(tmp_path / f"replicas {divided}") == alone, divided
    every = len(alone)
    assert [end["requests"] for end in ends] == [f"measured {every}"] * num
    measured = [int(end["candidates"].split()[1]) for end in ends]
    assert sum(measured) == every, "with candidates divided, nothing is measured twice"
    assert max(measured) - min(measured) <= 2  # one for every batch of an odd size


@pytest.mark.nightly
def test_two_replicas_of_two_tensor_ranks_write_the_same_journal(
    trained_experiment: Path, alone: list[Trial], tmp_path: Path
) -> None:
    wanted = lists(trained_experiment, tmp_path, "tp2dp2", processes=4, tensor=2)
    run_distributed(searches, 4, trained_experiment, wanted, timeout=240)
    expected = trials_in(tmp_path / "tp2dp2 requests")
    for divided in DIVIDED:
        assert trials_in(tmp_path / f"tp2dp2 {divided}") == expected, divided
    for trial, other in zip(expected[:13], alone[:13], strict=True):  # base and design
        assert trial.mixture == other.mixture
        assert _values(trial) == pytest.approx(_values(other), rel=2e-6)


def _values(trial: Trial) -> dict[str, float]:
    return {
        f"{capability} {metric}": score.value
        for capability, metrics in trial.scores.items()
        for metric, score in metrics.items()
    }


# ---- MoE experts spread over data ranks ----

MOE = ["model.num_moe_experts=4", "parallel.tensor=1"]


def bent_experts(config_path: Path, root: Path) -> None:
    """Save an untrained MoE model as base, and bent copies of it as experts."""
    import torch

    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.dist_checkpoint import load_model, save
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.model_facts import vocab_size

    config = load_config(config_path, [*MOE, "parallel.processes=1"])
    parallel.start(config.parallel)
    chunks = build_model(config, vocab_size(config), seed=3)
    base = save(root / "base", 1, chunks, training={}, keep=1)
    for step, name in enumerate(config.domains, start=1):
        load_model(base, chunks)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter += 0.1 * parameter * torch.sin(300 * step * parameter)
        save(root / name, 1, chunks, training={}, keep=1)


@pytest.fixture(scope="module")
def moe(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that give the MoE experts."""
    root = tmp_path_factory.mktemp("moe")
    run_distributed(bent_experts, 1, trained_experiment, root)
    given = {name: str(root / name) for name in load_config(trained_experiment).domains}
    return [*MOE, f"base={{checkpoint: {root / 'base'}}}", f"experts.checkpoints={given}"]


@pytest.mark.nightly
def test_spread_moe_experts_are_scored_alike_whatever_replicas_divide(
    trained_experiment: Path, moe: list[str], tmp_path: Path
) -> None:
    """Two data ranks are one replica under EP2; four are two."""
    runs: dict[int, dict[str, list[str]]] = {}
    for ranks in (1, 2, 4):
        own = [f"parallel.expert={min(ranks, 2)}", "training.micro_batch_size=4"]
        wanted = lists(trained_experiment, tmp_path, f"ep {ranks}", *moe, *own, processes=ranks)
        if ranks < 4:
            del wanted["candidates"]
        runs[ranks] = wanted
        run_distributed(searches, ranks, trained_experiment, wanted, timeout=300)
    expected = trials_in(tmp_path / "ep 1 requests")
    assert len({tuple(_values(trial).values()) for trial in expected}) == len(expected)
    for ranks, wanted in runs.items():
        for divided in wanted:
            found = trials_in(tmp_path / f"ep {ranks} {divided}")
            assert [trial.index for trial in found] == [trial.index for trial in expected]
            for trial, other in zip(found[:13], expected[:13], strict=True):
                assert trial.mixture == other.mixture
                assert _values(trial) == pytest.approx(_values(other), rel=1e-6)


def test_candidates_cannot_be_divided_among_one_replica(
    trained_experiment: Path, moe: list[str], tmp_path: Path
) -> None:
    changes = lists(trained_experiment, tmp_path, "one", *moe, "parallel.expert=2", processes=2)
    ends = run_distributed(searches, 2, trained_experiment, {"one": changes["candidates"]})
    for end in ends:
        assert (
            "search.replicas is candidates, but the 2 ranks of this job hold one model"
            in end["one"]
        )


# ---- failures ----


def test_a_candidate_that_fails_on_its_replica_is_a_failed_trial_as_on_one_rank(
    trained_experiment: Path, tmp_path: Path
) -> None:
    one = overrides(trained_experiment, tmp_path / "one", SHARE, processes=1, tensor=1)
    wanted = lists(trained_experiment, tmp_path, "dp2", processes=2, tensor=1)
    failing = [2, 5, 6]
    run_distributed(searches, 1, trained_experiment, {"one": one}, failing)
    run_distributed(searches, 2, trained_experiment, wanted, failing)
    expected = trials_in(tmp_path / "one")
    assert [trial.index for trial in expected if trial.error] == failing
    for divided in DIVIDED:
        assert trials_in(tmp_path / f"dp2 {divided}") == expected, divided


@pytest.mark.nightly
def test_three_failures_in_a_row_end_all_ranks_of_all_replicas(
    trained_experiment: Path, tmp_path: Path
) -> None:
    wanted = lists(trained_experiment, tmp_path, "dp2", processes=2, tensor=1)
    ends = run_distributed(searches, 2, trained_experiment, wanted, [4, 5, 6])
    for divided in DIVIDED:
        for end in ends:
            assert "3 candidates failed in a row; the last: trial 6 is a lost" in end[divided]
        assert [t.index for t in trials_in(tmp_path / f"dp2 {divided}")] == list(range(7))


def dies_in_a_wave(config_path: Path, changes: Sequence[str], dying: int) -> None:
    """Kill one rank with -9 while its replica scores a candidate of its own."""
    import os
    import signal

    from megatron_mergemix.jobs import search
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.processes.distributed import rank
    from megatron_mergemix.search import loop

    measure = loop._measure

    def deadly(*arguments: Any) -> Trial:
        if rank() == dying and arguments[-1].index >= 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(*arguments)

    loop._measure = deadly
    config = load_config(config_path, list(changes))
    parallel.start(config.parallel)
    search.search(config)


def test_the_kill_of_a_rank_in_a_wave_ends_the_others_and_costs_that_wave_alone(
    trained_experiment: Path, alone: list[Trial], tmp_path: Path
) -> None:
    changes = lists(trained_experiment, tmp_path, "dp2", processes=2, tensor=1)["candidates"]
    with pytest.raises(RankFailure) as failure:
        run_distributed(dies_in_a_wave, 2, trained_experiment, changes, 1)
    assert "Rank 1 ended with exit code -9" in str(failure.value)
    assert "had no end" not in str(failure.value)
    kept = trials_in(tmp_path / "dp2 candidates")
    assert kept == alone[: len(kept)]
    assert len(kept) == 4, "waves of two: the third was under way"
    run_distributed(searches, 2, trained_experiment, {"again": changes})
    assert trials_in(tmp_path / "dp2 candidates") == alone
