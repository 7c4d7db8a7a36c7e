"""The evaluator on ranks that read from different disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import lm_eval_tasks
from tests.support.datasets import make_domains
from tests.support.run_distributed import run_distributed
from tests.support.untrained import write_config


def make(homes: list[Path]) -> str | None:
    """Return what making the evaluator says on a rank with a home of its own."""
    import os

    from megatron_mergemix.config import load_config
    from megatron_mergemix.errors import ConfigError
    from megatron_mergemix.evaluate.make import make_evaluator

    config = load_config(homes[int(os.environ["RANK"])] / "mix.yaml", ["model.seq_length=64"])
    try:
        make_evaluator(config, 257)
    except ConfigError as error:
        return str(error)
    return None


def write_home(folder: Path, **capabilities: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder, {"evaluate": {"capabilities": capabilities}})
    return folder


def quiz(folder: Path, count: int) -> dict[str, Any]:
    return {"lm_eval": {"tasks": lm_eval_tasks.write(folder / "tasks", count)[:2]}}


def loss(folder: Path, tokens: int) -> dict[str, Any]:
    make_domains(folder / "data", ["web"], [tokens])
    return {"loss": {"prefixes": [str(folder / "data" / "web")], "sequences": 4}}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tmp_path / str(number) for number in range(3)]


def test_ranks_with_the_same_items_have_an_evaluator(folders: list[Path]) -> None:
    homes = [write_home(each, quiz=quiz(each, 5), web=loss(each, 9000)) for each in folders]
    assert run_distributed(make, 3, homes) == [None] * 3


def test_ranks_with_different_documents_all_raise_what_differs_and_where(
    folders: list[Path],
) -> None:
    homes = [
        write_home(each, quiz=quiz(each, count), web=loss(each, 9000))
        for each, count in zip(folders, (5, 5, 6), strict=True)
    ]
    first, second, third = run_distributed(make, 3, homes)
    assert first == second == third
    assert "evaluate.quiz: rank 0 has read 'lm-eval" in first
    assert "5 of 5 documents" in first
    assert "but rank 2 'lm-eval" in first
    assert "6 of 6 documents" in first
    assert "evaluate.web" not in first


def test_ranks_with_different_held_out_data_all_raise(folders: list[Path]) -> None:
    homes = [
        write_home(each, web=loss(each, tokens))
        for each, tokens in zip(folders[:2], (9000, 9500), strict=True)
    ]
    first, second = run_distributed(make, 2, homes)
    assert first == second
    assert "evaluate.web: rank 0 has read" in first


def test_a_program_that_differs_matters_on_rank_0_alone(folders: list[Path]) -> None:
    homes = []
    for each in folders[:2]:
        each.mkdir()
        (each / "score.py").write_text(f"# of {each.name}\n")
        words = ["python", str(each / "score.py"), "{checkpoint}", "{output}"]
        homes.append(write_home(each, pass_rate={"command": {"run": words, "metrics": ["rate"]}}))
    assert run_distributed(make, 2, homes) == [None] * 2
