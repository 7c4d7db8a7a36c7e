"""What the end of a search prints about its recommendation."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.launch.summary import print_search
from tests.support.untrained import write_config

DOMAINS = ["math", "code", "web"]
LEARNED = dict(zip(DOMAINS, (0.5, 0.3, 0.2), strict=True))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


def result(**changes):
    candidate = {
        "mixture": LEARNED,
        "trial": 7,
        "predicted": 0.7,
        "observed": 0.7021,
        "expected": 0.7,
        "stderr": 0.01,
        "gain": 0.0,
        "gain_stderr": 0.0,
    }
    return {
        "source": "argmax",
        "utility": 0.7021,
        "mixture": LEARNED,
        "merge_weights": LEARNED,
        "alternatives": {"argmax": candidate},
        "interval": [0.69, 0.714],
        "items": "new items",
        "better_than": {"uniform": 0.99975, "proportional": 0.973, "best observed": 0.004},
        "as_good": {
            "share": 0.0312,
            "least": dict(zip(DOMAINS, (0.41, 0.2, 0.1), strict=True)),
            "largest": dict(zip(DOMAINS, (0.58, 0.4, 0.3), strict=True)),
            "nearest": {"uniform": dict(zip(DOMAINS, (0.41, 0.34, 0.25), strict=True))},
        },
        "surrogates": {"math": {"surrogate": "gp", "rmse": 0.1}},
        "notes": ["A note."],
        **changes,
    }


def test_the_lines_say_how_sure_the_recommendation_is(config, capsys):
    print_search(config, result())
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index("U 0.7021, 95 % interval 0.6900 to 0.7140")
    assert lines[start : start + 5] == [
        "U 0.7021, 95 % interval 0.6900 to 0.7140",
        "better than uniform with probability above 0.99, than proportional with probability "
        "0.97, than best observed with probability below 0.01",
        "as good within noise: 3.1 % of the possible mixtures: math 0.41 to 0.58, code 0.20 to "
        "0.40, web 0.10 to 0.30",
        "  of these nearest to uniform: math 0.410, code 0.340, web 0.250",
        "note: A note.",
    ]


def test_an_interval_that_holds_for_the_search_s_items_alone_says_so(config, capsys):
    print_search(config, result(items="the search's items"))
    assert "0.7140 on the items of this search" in capsys.readouterr().out


def test_a_set_that_no_evenly_spread_mixture_hits_is_not_called_empty(config, capsys):
    good = {**result()["as_good"], "share": 0.0}
    print_search(config, result(as_good=good))
    assert "as good within noise: less than 0.1 % of" in capsys.readouterr().out


def test_where_the_ensemble_helped_is_said_and_nothing_without_it(config, capsys):
    print_search(config, result())
    assert "ensemble" not in capsys.readouterr().out
    helped = {"rho": 0.934, "rmse": 0.0061, "rmse_without": 0.01234, "used": True}
    hurt = {"rho": -0.2, "rmse": 0.05, "rmse_without": 0.04, "used": False}
    evidence = {"math": {"ensemble": helped}, "code": {"ensemble": hurt}}
    print_search(config, result(surrogates=evidence))
    assert (
        "ensemble of the experts, leave-one-out error without -> with it: math 0.01234 -> 0.0061 "
        "(used, rho 0.93), code 0.04 -> 0.05 (not used, rho -0.20)"
    ) in capsys.readouterr().out
