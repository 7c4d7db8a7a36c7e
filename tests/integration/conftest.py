"""What several tests of the plugin stand on; made once per checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.plugin import DP2, PP2, TP2, BigRun, Launches

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def launches(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """A base, three experts of three layouts, a search on two pipeline stages."""
    made = Launches(checkout, tmp_path_factory.mktemp("plugin"))
    made.write()
    for expert, layout in (("math", TP2), ("code", DP2), ("prose", PP2)):
        done = made.stage("expert", *layout, ranks=2, expert=expert)
        assert done.returncode == 0, done.stdout
        assert f"experts/{expert} is trained" in done.stdout
    done = made.stage("search", *PP2, ranks=2)
    assert done.returncode == 0, done.stdout
    return made


@pytest.fixture(scope="session")
def big_run(launches: Launches, tmp_path_factory: pytest.TempPathFactory) -> BigRun:
    """The user's own training run on the learned blend, not interrupted."""
    run = BigRun(tmp_path_factory.mktemp("big run"))
    done = launches.stage("train", *run.words, ranks=2)
    assert done.returncode == 0, done.stdout
    run.output.write_text(done.stdout)
    return run


@pytest.fixture(scope="session")
def patched(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched copy of what a launch needs of a checkout."""
    copy = tmp_path_factory.mktemp("patched")
    shutil.copytree(checkout / "megatron", copy / "megatron")
    for script in checkout.glob("*.py"):
        shutil.copy2(script, copy)
    for words in (["init", "--quiet"], ["apply", str(committed_patch(checkout))]):
        subprocess.run(["git", "-C", str(copy), *words], check=True, capture_output=True)
    return copy


def committed_patch(checkout: Path) -> Path:
    """Return the patch for a checkout; the tool holds it equal to what it makes."""
    command = [sys.executable, str(REPOSITORY / "tools" / "make_patch.py"), str(checkout)]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.partition(" is right")[0])
