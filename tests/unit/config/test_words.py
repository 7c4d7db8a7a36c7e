"""A launch that is given as text, and what no shell would read in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import ConfigError
from tests.unit.megatron_lm.test_mixture_flag import config

WORDS = ["torchrun", "--nproc-per-node", "8", "pretrain_gpt.py", "--wandb-exp-name", "my run"]


def write(tmp_path: Path, launch: str) -> Path:
    settings = config().model_dump(mode="json", exclude={"launch", "slurm", "launched"})
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False) + launch)
    return path


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc-per-node 8 pretrain_gpt.py --wandb-exp-name 'my run'",
        "[torchrun, --nproc-per-node, '8', pretrain_gpt.py, --wandb-exp-name, my run]",
        '>-\n    torchrun --nproc-per-node 8\n    pretrain_gpt.py --wandb-exp-name "my run"',
        '>-\n    torchrun --nproc-per-node 8 \\\n    pretrain_gpt.py --wandb-exp-name "my run"',
        '|\n    torchrun --nproc-per-node 8 \\\n      pretrain_gpt.py --wandb-exp-name "my run"',
    ],
    ids=["text", "list", "folded", "folded with backslashes", "lines"],
)
def test_a_launch_is_text_or_words(tmp_path: Path, command: str) -> None:
    settings = load_config(write(tmp_path, f"launch:\n  kind: command\n  command: {command}\n"))
    assert settings.launch.command == WORDS
    assert Config.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("torchrun --nnodes $SLURM_NNODES x.py", r"has '\$SLURM_NNODES', but no shell reads"),
        ("python x.py --save ${HOME}/saves", r"has '\$\{HOME\}/saves', but no shell"),
        ("torchrun 'x.py", "No closing quotation"),
        ("python x.py --mergemix-config=mix.yaml", "which is appended for each stage"),
        ('""', "is empty, expected the words"),
    ],
)
def test_what_only_a_shell_could_read_is_refused(
    tmp_path: Path, command: str, message: str
) -> None:
    path = write(tmp_path, f"launch:\n  kind: command\n  command: {command}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "mix.yaml:" in str(caught.value)
    assert "launch.command" in str(caught.value)


def test_a_layout_beside_a_launch_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "launch: {kind: command}\n")
    with pytest.raises(ConfigError, match="parallel is given, but with launch.kind command"):
        load_config(path, ["parallel.processes=8"])
