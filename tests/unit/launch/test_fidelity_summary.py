"""What ``mergemix validate`` prints in the end, and its scalars."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.launch.fidelity_scalars import write_scalars
from megatron_mergemix.launch.fidelity_summary import print_fidelity
from megatron_mergemix.launch.summary import print_comparison
from tests.support.untrained import TOKENS, write_config


def part(**changes: Any) -> dict[str, Any]:
    return {
        "n": 27,
        "spearman": 0.912,
        "spearman_interval": [0.81, 0.96],
        "kendall": 0.765,
        "kendall_interval": [0.6, 0.88],
        "mean_absolute_error": 0.0211,
        "offset": -0.0205,
        "centred_error": 0.0034,
        **changes,
    }


UNDEFINED = part(
    spearman=None, spearman_interval=None, kendall=None, kendall_interval=None, offset=0.0
)


def result() -> dict[str, Any]:
    names = ["learned", "uniform", "proportional", *(f"filling-{n:02d}" for n in range(1, 25))]
    rows = [
        {
            "name": name,
            "mixture": {"math": 0.5, "code": 0.25, "web": 0.25},
            "utility": 0.9 - 0.01 * place,
            "behind": 0.01 * place,
            "behind_stderr": 0.002,
            "scores": {domain: {"loss": 1.5 + 0.01 * place} for domain in TOKENS},
            "proxy": {"utility": 0.8765 - 0.01 * place},
        }
        for place, name in enumerate(names)
    ]
    return {
        "references": rows,
        "fidelity": {
            "overall": part(),
            "capabilities": {"math": part(), "code": UNDEFINED},
            "surrogate": part(spearman=0.87),
            "top_k": {
                "1": {"regret": 0.0123, "interval": [0.0, 0.02]},
                "3": {"regret": 0.0, "interval": None},
                "5": {"regret": None, "interval": None},
            },
            "calibration_n": 24,
            "calibration": {"0.5": 0.1, "0.8": 0.2, "0.95": 0.3},
            "calibration_shifted": {"0.5": 0.4, "0.8": 0.7, "0.95": 0.9},
            "calibration_of_merges": {"0.5": 0.52, "0.8": 0.81, "0.95": 0.96},
        },
        "costs": {
            "proxies": {
                "runs": 5,
                "tokens": 25e9,
                "seconds": 36000.0,
                "training_seconds": 35500.0,
                "scoring_seconds": 500.0,
            },
            "references": {
                "runs": 27,
                "tokens": 135e9,
                "seconds": None,
                "training_seconds": None,
                "scoring_seconds": 12.34,
            },
        },
        "notes": ["A note."],
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


def test_the_tables_say_how_merges_rank_what_is_lost_and_what_it_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_fidelity(result())
    shown = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert "do merges rank 27 mixtures as models that are really trained do?" in lines
    numbers = "0.81 to 0.96 0.765 0.60 to 0.88 0.0211 -0.0205 0.0034"
    assert f"utility 0.912 {numbers}" in lines
    assert f"math 0.912 {numbers}" in lines
    assert "code - - - - 0.0211 0.0000 0.0034" in lines
    assert f"predicted utility 0.870 {numbers}" in lines
    assert (
        "utility lost by really training only what merges put first, and keeping the best (95 % "
        "interval): of 1 0.0123 (0.0000 to 0.0200), of 3 0.0000"
    ) in lines
    start = lines.index(
        "the surrogate's intervals of 50, 80, 95 % hold, of 24 mixtures that are no trials,"
    )
    assert lines[start + 1 : start + 4] == [
        "52, 81, 96 % of the merges, which they are meant for",
        "10, 20, 30 % of the really trained models",
        "40, 70, 90 % of those, without the mean gap of the others",
    ]
    assert "proxies 5 2.5e+10 9.86 h 500.0 s 10.00 h" in lines
    assert "references 27 1.35e+11 - 12.3 s -" in lines
    assert lines[-1] == "note: A note."


def test_without_a_surface_nothing_is_claimed_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = result()
    names = ("surrogate", "calibration", "calibration_shifted", "calibration_of_merges")
    found["fidelity"] |= dict.fromkeys(names)
    found["fidelity"]["top_k"] = {"5": {"regret": None, "interval": None}}
    print_fidelity(found)
    shown = capsys.readouterr().out
    assert "predicted" not in shown
    assert "intervals of" not in shown
    assert "utility lost" not in shown


def test_the_comparison_of_27_references_fits_its_width(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    print_comparison(config, result()["references"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "filling-" in line]
    assert len(rows) == 24
    assert max(map(len, lines)) <= 160
    assert [cell.strip() for cell in rows[-1].split("│")[1:3]] == ["filling-24", "0.500"]
    assert "0.6165" in rows[-1]  # of the merge beside it


def test_every_number_is_a_scalar_at_the_number_of_references(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a second comparison takes the place of the first
        write_scalars(tmp_path / "validate", result())
    events = EventAccumulator(str(tmp_path / "validate"))
    events.Reload()
    tags = events.Tags()["scalars"]
    [event] = events.Scalars("fidelity/overall/spearman")
    assert (event.step, event.value) == (27, pytest.approx(0.912))
    assert event.wall_time == pytest.approx(time.time(), abs=60)
    assert events.Scalars("fidelity/top_k/1/interval/high")[0].value == pytest.approx(0.02)
    assert events.Scalars("fidelity/calibration/0.95")[0].value == pytest.approx(0.3)
    assert "fidelity/capabilities/math/kendall" in tags
    assert "fidelity/capabilities/code/kendall" not in tags
