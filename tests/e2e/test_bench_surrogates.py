"""The benchmark of surrogates, on a few runs in the format of RegMix's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.nightly

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, num in (("train", 60), ("test", 40)):
        shares = rng.dirichlet(np.ones(3), num).round(3)
        losses = np.stack([2 - shares[:, 0] ** 0.3, 3 - 2 * shares[:, 1] ** 0.3], axis=1)
        for name, header, table in (
            (f"{part}_mixture_1m.csv", "index,train_web,train_code,train_math", shares),
            (f"{part}_pile_loss_1m.csv", "index,metric/pile_cc_val_loss,metric/code", losses),
        ):
            lines = [f"{i}," + ",".join(map(str, row)) for i, row in enumerate(table.tolist())]
            (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


def bench(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench_surrogates.py", "--data", str(data), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def numbers(output: str, method: str) -> list[float]:
    line = next(line for line in output.splitlines() if line.strip().startswith(f"{method} "))
    return [float(word) for word in line.removeprefix(f"  {method}").split()[:3]]


def test_every_method_gets_a_line_with_its_rank_correlations(data: Path) -> None:
    done = bench(data, "--rows", "32", "--draws", "1")
    assert done.returncode == 0, done.stderr
    assert "60 training and 40 test runs, 3 domains, 2 targets, 1 draws" in done.stdout
    mean, worst, highlight = numbers(done.stdout, "gp_root")
    assert worst <= mean
    assert min(mean, worst, highlight) > 0.95
    for method in ("auto", "gp", "quadratic", "loglinear", "lightgbm"):
        assert numbers(done.stdout, method)[0] > 0.85
    # Leaves of 20 rows cannot split 32: one constant for all mixtures.
    assert numbers(done.stdout, "LightGBM as published") == [0.0, 0.0, 0.0]
    assert numbers(done.stdout, "ridge as published")[0] < mean
    assert "0.820      -    0.960" in done.stdout


def test_what_refuses_the_rows_says_why_and_the_others_go_on(data: Path) -> None:
    done = bench(data, "--rows", "8", "--draws", "1", "--methods", "quadratic", "gp")
    assert done.returncode == 0, done.stderr
    assert "refused: The quadratic surrogate needs at least 9 measured mixtures" in done.stdout
    assert numbers(done.stdout, "gp")[0] > 0.5


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("test_mixture_1m.csv", lambda text: text.replace("\n0,", "\n7,"), "not of the same runs"),
        ("test_mixture_1m.csv", lambda text: text.replace("\n0,", "\n0,1"), "other than 1"),
        ("train_pile_loss_1m.csv", lambda text: text.replace("code", "math"), "different columns"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(data, file, change, message) -> None:
    (data / file).write_text(change((data / file).read_text()))
    done = bench(data, "--quick")
    assert done.returncode != 0
    assert message in done.stderr


def test_an_unknown_target_is_refused_with_those_there_are(data: Path) -> None:
    done = bench(data, "--targets", "law")
    assert done.returncode != 0
    assert "metric/pile_cc_val_loss, metric/code" in done.stderr
