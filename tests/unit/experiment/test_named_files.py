"""The files that the settings name: what is counted, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mergemix.config import Config
from megatron_mergemix.errors import CheckpointError, ConfigError, DataError
from megatron_mergemix.experiment import named_files
from megatron_mergemix.experiment.named_files import PrefixCount, check_files
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("math", "code", "held"):
        write_dataset(tmp_path / name, [np.arange(50), np.arange(30), np.arange(20)])
    return tmp_path


def config_of(data: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "run_dir": "unused",
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "seq_length": 16,
        },
        "base": {"train": {"tokens": 1e4, "lr": 1e-3}},
        "domains": {
            "math": {"prefixes": [f"{data}/math"]},
            "code": {"prefixes": [f"{data}/code"]},
        },
        "evaluate": {
            "capabilities": {"a": {"loss": {"prefixes": [f"{data}/held"], "sequences": 2}}}
        },
        "blend": {"split": "2,1,0"},
        **changes,
    }
    return Config.model_validate(settings)


def test_documents_and_tokens_are_counted_and_training_tokens_by_the_split(data: Path) -> None:
    counts = check_files(config_of(data))
    assert counts == {
        "math": [PrefixCount(f"{data}/math", 3, 100, 80)],
        "code": [PrefixCount(f"{data}/code", 3, 100, 80)],
    }


def test_every_missing_dataset_is_named_at_once(data: Path) -> None:
    (data / "math.bin").unlink()
    (data / "held.idx").unlink()
    with pytest.raises(DataError) as caught:
        check_files(config_of(data))
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 problems with the files:"
    assert lines[1].startswith(f"  domains.math.prefixes: {data}/math.bin not found.")
    assert lines[2].startswith(f"  evaluate.capabilities.a.loss: {data}/held.idx not found.")


def test_more_than_eight_problems_are_counted(data: Path) -> None:
    prefixes = [f"{data}/none{number}" for number in range(10)]
    with pytest.raises(DataError) as caught:
        check_files(config_of(data, domains={"a": {"prefixes": prefixes}}))
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (
        10,
        "10 problems with the files:",
        "  and 2 more",
    )


@pytest.mark.parametrize(("seq_length", "enough"), [(79, True), (80, False)])
def test_a_domain_needs_one_training_sample(data: Path, seq_length: int, enough: bool) -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": seq_length}
    evaluate = {"capabilities": {"a": {"loss": {"prefixes": [f"{data}/held"], "sequences": 1}}}}
    config = config_of(data, model=model, evaluate=evaluate)
    if enough:
        check_files(config)
        return
    with pytest.raises(
        DataError, match=r"domains.math.prefixes: 80 tokens in .*, expected more than .* 80"
    ):
        check_files(config)


def test_a_weighted_dataset_without_training_tokens_is_refused(data: Path) -> None:
    write_dataset(data / "one", [np.arange(500)])
    domains = {
        "math": {"prefixes": {f"{data}/math": 1.0, f"{data}/one": 1.0}},
        "code": {"prefixes": [f"{data}/code"]},
    }
    config = config_of(data, domains=domains, blend={"split": "1,2,0"})
    with pytest.raises(DataError, match=r"one has a weight, but none of its 1 sequences"):
        check_files(config)
    domains["math"] = {"prefixes": [f"{data}/math", f"{data}/one"]}
    check_files(config_of(data, domains=domains, blend={"split": "1,2,0"}))


def test_too_little_held_out_data_is_refused(data: Path) -> None:
    evaluate = {"capabilities": {"a": {"loss": {"prefixes": [f"{data}/held"], "sequences": 64}}}}
    with pytest.raises(DataError, match=r"evaluate.capabilities.a.loss: "):
        check_files(config_of(data, evaluate=evaluate))


def test_data_of_another_tokenizer_is_refused(data: Path) -> None:
    write_dataset(data / "code", [np.arange(100)], tokenizer={"kind": "huggingface"})
    with pytest.raises(DataError, match="was made with tokenizer kind huggingface, but .* byte"):
        check_files(config_of(data, blend={"split": "1"}))


def test_data_of_a_larger_vocabulary_is_refused(data: Path) -> None:
    write_dataset(data / "code", [np.arange(100)], tokenizer={"kind": "byte", "vocab_size": 999})
    model = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "seq_length": 16,
        "vocab_size": 300,
    }
    with pytest.raises(DataError, match=r"a vocabulary of 999 tokens, but model.vocab_size is 300"):
        check_files(config_of(data, blend={"split": "1"}, model=model))


def test_missing_checkpoints_are_named_by_their_key(data: Path) -> None:
    config = config_of(
        data,
        base={"checkpoint": f"{data}/base"},
        experts={"checkpoints": {"math": f"{data}/m", "code": f"{data}/c"}},
    )
    with pytest.raises(CheckpointError) as caught:
        check_files(config)
    lines = str(caught.value).splitlines()
    assert lines[1].startswith(f"  base.checkpoint: Checkpoint {data}/base does not exist.")
    assert lines[2].startswith(f"  experts.checkpoints.math: Checkpoint {data}/m does not exist.")
    assert len(lines) == 4


def test_a_missing_tokenizer_folder_is_named(data: Path) -> None:
    tokenizer = {"kind": "huggingface", "path": f"{data}/none"}
    with pytest.raises(ConfigError, match=rf"tokenizer.path: {data}/none is no folder"):
        check_files(config_of(data, tokenizer=tokenizer))


@pytest.mark.parametrize("name", ["code", "held"])
def test_data_of_other_tokenizer_files_is_refused(
    data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded:
        def digest(self) -> str:
            return "huggingface ours"

    monkeypatch.setattr(named_files, "load_tokenizer", lambda settings: Loaded())
    made_with = {"kind": "huggingface", "path": "/old", "vocab_size": 257, "eod": 256}
    documents = [np.arange(50), np.arange(30), np.arange(20)]
    config = config_of(data, tokenizer={"kind": "huggingface", "path": str(data)})
    write_dataset(data / name, documents, {**made_with, "digest": "huggingface ours"})
    check_files(config)
    write_dataset(data / name, documents, {**made_with, "digest": "huggingface theirs"})
    with pytest.raises(DataError, match=rf"{name} was made with another tokenizer \(/old, digest"):
        check_files(config)


def test_given_experts_must_have_the_tensors_of_the_given_base(data: Path) -> None:
    paths = {}
    for name, width in {"base": 3, "math": 3, "code": 4}.items():
        folder = write_checkpoint(data / name / "iter_0000001", {"a.weight": torch.ones(2, width)})
        paths[name] = str(folder)
    base = {"checkpoint": paths.pop("base")}
    with pytest.raises(
        CheckpointError, match=r"^experts.checkpoints.code: Expert 'code' .* has ot"
    ):
        check_files(config_of(data, base=base, experts={"checkpoints": paths}))
    paths["code"] = paths["math"]
    check_files(config_of(data, base=base, experts={"checkpoints": paths}))
