"""The 8B example: one launch, before and after the flag, that the real parsers know."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.launch.launch_line import launch_line
from tests.support.megatron_lm import each_checkout

EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain_gpt_8b"
SCRIPT = "/lustre/Megatron-LM/pretrain_gpt.py"
FLAG = ["--mergemix-config", "/lustre/me/mix.yaml"]

PARSE = """
import argparse, json, sys
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
parsed, unknown = parser.parse_known_args(sys.argv[1:])
facts = ("num_layers", "tensor_model_parallel_size", "use_distributed_optimizer", "data_path")
print(json.dumps({"unknown": unknown, **{name: getattr(parsed, name) for name in facts}}))
"""


@pytest.fixture
def torchrun(tmp_path: Path) -> Path:
    """Return a folder with a torchrun that prints its words."""
    program = tmp_path / "torchrun"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def words(torchrun: Path, script: str) -> list[str]:
    """Return what a script of the example starts torchrun with."""
    done = subprocess.run(
        ["bash", str(EXAMPLE / script)],
        env={"PATH": f"{torchrun}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def own(line: list[str]) -> list[str]:
    """Return the words after the script."""
    return line[line.index(SCRIPT) + 1 :]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(EXAMPLE / "mix.yaml")


def test_after_is_before_with_the_launcher_and_the_flag(torchrun: Path) -> None:
    before, after = words(torchrun, "before.sh"), words(torchrun, "after.sh")
    place = before.index(SCRIPT)
    launcher = ["-m", "megatron_mergemix.launch"]
    assert after == [*before[:place], *launcher, *before[place:], *FLAG]


def test_the_experiment_launches_the_words_of_the_script(torchrun: Path, config: Config) -> None:
    assert config.launch.command is not None
    assert own(config.launch.command) == own(words(torchrun, "before.sh"))
    assert {prefix for domain in config.domains.values() for prefix in domain.prefixes} == {
        word for word in own(config.launch.command) if word.startswith("/lustre/data/")
    }


def test_the_jobs_start_it_once_per_node(config: Config) -> None:
    line = launch_line(config)
    assert line.tasks_per_node == 1
    assert line.words[:2] == ("torchrun", "--nnodes=4")
    assert shlex.split(" ".join(line.words))[-2:] == ["--eval-iters", "32"]


@each_checkout()
def test_megatron_lm_knows_every_argument(checkout: Path, torchrun: Path) -> None:
    given = own(words(torchrun, "before.sh"))
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *given],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    parsed = json.loads(done.stdout.splitlines()[-1])
    assert parsed["unknown"] == []
    assert parsed["num_layers"] == 32
    assert parsed["tensor_model_parallel_size"] == 2
    assert parsed["use_distributed_optimizer"] is True
    assert parsed["data_path"][:2] == ["0.5", "/lustre/data/web"]
