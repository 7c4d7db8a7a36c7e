"""A plan shows what is on record of the task vectors, and measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config
from megatron_mergemix.diagnosis.record import diagnosis_digests, publish_measured
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.experiment.digests import search_digests
from megatron_mergemix.experiment.named_files import check_files
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.plan.make import make_plan, plan_of
from megatron_mergemix.plan.tables import print_tables
from megatron_mergemix.plan.task_vectors import task_vectors_on_record
from megatron_mergemix.run_dir import RunDir
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import with_experts, write_config

PRODUCTS = [[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return with_experts(write_config(tmp_path))


def search_was_done(config: Config) -> None:
    result = {"task_vector_products": PRODUCTS, "digests": search_digests(config)}
    publish_json(RunDir(config.run_dir).result, result)


def diagnosis_was_made(config: Config) -> None:
    record: dict[str, Any] = {"products": PRODUCTS, "delta": [0.01, 0.02, 0.03], "losses": {}}
    publish_measured(config, {**record, "digests": diagnosis_digests(config)})


def test_nothing_on_record_is_nothing_shown(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert task_vectors_on_record(config) is None
    plan = make_plan(write_config(tmp_path))  # neither base nor experts are there
    assert plan.task_vectors is None
    print_tables(plan)
    assert "task vectors" not in capsys.readouterr().out


def test_a_search_tells_norms_and_cosines(config: Config) -> None:
    search_was_done(config)
    found = task_vectors_on_record(config)
    assert found is not None
    assert (found.experts, found.delta) == (["math", "code", "web"], None)
    assert found.norms == [2.0, 1.0, 3.0]
    np.testing.assert_allclose(found.cosines, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])


def test_a_diagnosis_tells_update_sizes_too(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    search_was_done(config)
    diagnosis_was_made(config)
    found = task_vectors_on_record(config)
    assert found is not None
    assert found.delta == [0.01, 0.02, 0.03]
    assert plan_of(config, None).task_vectors is None, "nothing may be opened"
    print_tables(plan_of(config, check_files(config)))
    shown = capsys.readouterr().out
    assert "task vectors of the experts, on record" in shown
    assert "2.00%" in shown
    assert "0.500" in shown


def test_other_settings_of_the_same_experts_change_no_task_vectors(config: Config) -> None:
    search_was_done(config)
    search = config.search.model_copy(update={"seed": 7})
    assert task_vectors_on_record(config.model_copy(update={"search": search})) is not None


def test_an_error_in_the_settings_is_not_taken_for_missing_experts(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config) -> dict[str, str]:
        raise ConfigError("something else")

    monkeypatch.setattr("megatron_mergemix.plan.task_vectors.checkpoint_digests", refuse)
    with pytest.raises(ConfigError, match="something else"):
        task_vectors_on_record(config)


def test_what_is_on_record_of_other_experts_is_not_shown(config: Config) -> None:
    search_was_done(config)
    diagnosis_was_made(config)
    folder = resolve(config.experts.checkpoints["web"])
    write_checkpoint(folder, {"embedding.word_embeddings.weight": torch.full((264, 8), 7.0)})
    assert task_vectors_on_record(config) is None
