"""The patches in ``patches/``, on the real trees they are for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import committed_patch
from tests.support.experiment import write_experiment
from tests.support.megatron_lm import each_checkout, run_pretrain_gpt, training_losses
from tests.support.plugin import MODEL
from tests.support.weights import assert_same_weights

CPU_MODE = "megatron_mergemix.megatron.cpu_mode"
LAUNCHER = "megatron_mergemix.launch"
THREE_STEPS = (
    *MODEL,
    *("--mock-data", "--train-iters", "3", "--log-interval", "1", "--eval-iters", "0"),
    *("--save-interval", "3"),
)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@each_checkout()
def test_the_committed_patch_applies_compiles_and_reverts(checkout: Path, tmp_path: Path) -> None:
    patch = committed_patch(checkout)
    files = re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), re.M)
    assert {"megatron/training/arguments.py", "pretrain_gpt.py"} < set(files)
    git(tmp_path, "init", "--quiet")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / file, tmp_path / file)
    git(tmp_path, "add", ".")
    git(tmp_path, "apply", str(patch))
    changes = [line.split("\t") for line in git(tmp_path, "diff", "--numstat").splitlines()]
    inserted = {file: (int(added), int(removed)) for added, removed, file in changes}
    scripts = {file: (2, 0) for file in files if file.startswith("pretrain_")}
    assert inserted == {"megatron/training/arguments.py": (6, 0), **scripts}
    for file in files:
        compile((tmp_path / file).read_text(), file, "exec")
    git(tmp_path, "apply", "-R", str(patch))
    assert git(tmp_path, "diff", "--numstat") == ""


@pytest.fixture(scope="module")
def stock(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The logged steps of the unmodified script, and its save."""
    return three_steps(checkout, CPU_MODE, tmp_path_factory.mktemp("stock"))


def three_steps(checkout: Path, launcher: str, saves: Path) -> tuple[list[str], Path]:
    """Train three steps without any flag of the plugin."""
    done = run_pretrain_gpt(checkout, 1, [*THREE_STEPS, "--save", str(saves)], launcher)
    assert done.returncode == 0, done.stdout
    assert training_losses(done.stdout).keys() == {1, 2, 3}
    logged = re.findall(r"lm loss: \S+ \|.*grad norm: \S+ \|", done.stdout)
    return logged, saves / "iter_0000003"


def assert_same(ours: tuple[list[str], Path], theirs: tuple[list[str], Path]) -> None:
    assert ours[0] == theirs[0]
    assert_same_weights(ours[1], theirs[1])


@each_checkout()
def test_a_patched_script_without_the_flag_is_stock(
    checkout: Path, patched: Path, stock: tuple[list[str], Path], tmp_path: Path
) -> None:
    assert_same(three_steps(patched, CPU_MODE, tmp_path), stock)


@each_checkout()
def test_the_launcher_without_the_flag_is_stock(
    checkout: Path, stock: tuple[list[str], Path], tmp_path: Path
) -> None:
    assert_same(three_steps(checkout, LAUNCHER, tmp_path), stock)


@each_checkout()
def test_a_patched_script_with_the_flag_meets_every_hook(
    checkout: Path, patched: Path, stock: tuple[list[str], Path], tmp_path: Path
) -> None:
    path = write_experiment(tmp_path)
    settings = yaml.safe_load(path.read_text())
    for section in ("model", "parallel", "training"):
        del settings[section]
    settings |= {"base": {"checkpoint": str(stock[1])}, "launch": {"kind": "command"}}
    path.write_text(yaml.safe_dump(settings))
    flags = ("--mergemix-config", str(path), "--mergemix-stage", "evaluate")
    done = run_pretrain_gpt(patched, 1, [*MODEL, *flags, "--load", str(stock[1].parent)], CPU_MODE)
    assert done.returncode == 0, done.stdout
    assert "mergemix: stage evaluate, arguments replaced:" in done.stdout
    assert re.search(rf"--load +{re.escape(str(stock[1].parent))} +-> ", done.stdout)
    (scores,) = (tmp_path / "run" / "evaluate").glob("*.json")
    assert f"mergemix: written to {scores}" in done.stdout
