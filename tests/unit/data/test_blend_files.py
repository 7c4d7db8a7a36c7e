"""The written blend: what the files say, and what a crash leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

from megatron_mergemix.config import Base, Blend, Config, Domain
from megatron_mergemix.config.evaluate import Capability, Evaluate, LossTask
from megatron_mergemix.data.blend_files import current_blend, write_blend
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.errors import BlendError
from megatron_mergemix.files import publishing

FILES = ["blend.yaml", "data_args.txt", "data_path.txt", "per_split_data_args.json"]


def dataset(prefix: Path, num_sequences: int) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint8)
    for _ in range(num_sequences):
        builder.add_document(np.ones(10), [10])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Math has 800 + 200 tokens, code 500; half of each is the training part."""
    sizes = {"a": 80, "b": 20, "c": 50, "held1": 3, "held2": 1}
    at = {name: dataset(tmp_path / name, size) for name, size in sizes.items()}
    return Config(
        run_dir=tmp_path,
        base=Base(checkpoint=tmp_path),
        domains={
            "math": Domain(prefixes=[at["a"], at["b"]]),
            "code": Domain(prefixes=[at["c"]], max_epochs=4),
        },
        evaluate=Evaluate(
            capabilities={
                "math": Capability(loss=LossTask(prefixes=[at["held1"]])),
                "all": Capability(loss=LossTask(prefixes=[at["held1"], at["held2"]])),
            }
        ),
        blend=Blend(train_tokens=1000, split="50, 50, 0"),
    )


MIXTURE = {"math": 0.6, "code": 0.4}


def test_the_data_args_file_is_one_line_that_megatron_parses(
    config: Config, tmp_path: Path
) -> None:
    folder = write_blend(tmp_path / "blend", MIXTURE, config)
    content = (folder / "data_args.txt").read_text()
    assert content == f"0.480000 {tmp_path}/a 0.120000 {tmp_path}/b 0.400000 {tmp_path}/c\n"
    assert get_blend_from_list(content.split()) == (
        [f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c"],
        [0.48, 0.12, 0.4],
    )


def test_the_command_line_has_a_split_without_blanks(config: Config, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", MIXTURE, config)
    words = (folder / "data_path.txt").read_text().split()
    assert words[0] == "--data-path"
    assert words[1:-2] == (folder / "data_args.txt").read_text().split()
    assert words[-2:] == ["--split", "50,50,0"]


def test_per_split_arguments_train_on_whole_datasets_and_validate_on_held_out_ones(
    config: Config, tmp_path: Path
) -> None:
    # With the odd split below the training parts weigh differently from the whole datasets.
    odd = config.model_copy(update={"blend": Blend(split="3,97,0")})
    folder = write_blend(tmp_path / "blend", MIXTURE, odd)
    # 2 and 1 sequences.
    assert (folder / "data_args.txt").read_text().startswith(f"0.400000 {tmp_path}/a 0.200000")
    assert json.loads((folder / "per_split_data_args.json").read_text()) == {
        "train": ["0.480000", f"{tmp_path}/a", "0.120000", f"{tmp_path}/b", "0.400000"]
        + [f"{tmp_path}/c"],
        "valid": ["0.750000", f"{tmp_path}/held1", "0.250000", f"{tmp_path}/held2"],
        "test": None,
    }


def test_the_yaml_tells_what_it_is_and_where_it_came_from(config: Config, tmp_path: Path) -> None:
    folder = write_blend(
        tmp_path / "blend",
        MIXTURE,
        config,
        utility=0.75,
        utility_stderr=0.01,
        provenance={"source": "argmax", "digests": {"base": "abc"}},
    )
    text = (folder / "blend.yaml").read_text()
    assert f"--data-args-path {folder}/data_args.txt --split 50,50,0\n" in text
    told = yaml.safe_load(text)
    at = {name: str(tmp_path / name) for name in "abc"}
    assert told["mixture"] == MIXTURE
    assert told["weights"] == {at["a"]: 0.48, at["b"]: 0.12, at["c"]: 0.4}
    assert told["train_tokens"] == 1000
    assert told["epochs"] == pytest.approx({"math": 1.2, "code": 1.6})
    assert told["epochs_per_prefix"] == pytest.approx({at["a"]: 1.2, at["b"]: 1.2, at["c"]: 1.6})
    assert (told["utility"], told["utility_stderr"]) == (0.75, 0.01)
    assert told["provenance"]["source"] == "argmax"
    assert told["provenance"]["digests"] == {"base": "abc"}
    assert told["provenance"]["datasets"][at["a"]] == IndexedDataset(at["a"]).fingerprint()
    assert told["provenance"]["megatron_mergemix"]


def test_without_train_tokens_no_epochs_are_claimed(config: Config, tmp_path: Path) -> None:
    unbounded = config.model_copy(update={"blend": Blend(split="50,50,0")})
    told = yaml.safe_load(
        (write_blend(tmp_path / "blend", MIXTURE, unbounded) / "blend.yaml").read_text()
    )
    assert not {"epochs", "epochs_per_prefix", "train_tokens"} & set(told)


def test_more_epochs_than_allowed_are_refused_before_anything_is_written(
    config: Config, tmp_path: Path
) -> None:
    # Code has 250 training tokens: 4 epochs are all 1000 tokens, so only a longer run is refused.
    write_blend(tmp_path / "full", {"math": 0.0, "code": 1.0}, config)
    longer = config.model_copy(update={"blend": Blend(train_tokens=2600, split="50,50,0")})
    with pytest.raises(BlendError, match=r"repeats domain code 4\.16 times, expected at most 4"):
        write_blend(tmp_path / "blend", MIXTURE, longer)
    assert not (tmp_path / "blend").exists()


def test_a_dataset_too_small_for_the_split_is_refused_because_megatron_would_hang(
    config: Config, tmp_path: Path
) -> None:
    # Of b's 20 sequences a fortieth is half a one, which rounds to none.
    strict = config.model_copy(update={"blend": Blend(split="39,1,0")})
    with pytest.raises(BlendError, match=r"b has 20 sequences, too few for the valid part of"):
        write_blend(tmp_path / "blend", MIXTURE, strict)
    relaxed = config.model_copy(update={"blend": Blend(split="1,0,0")})
    write_blend(tmp_path / "blend", MIXTURE, relaxed)


def test_the_same_arguments_write_the_same_bytes(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "blend"
    write_blend(folder, MIXTURE, config, utility=0.5)
    before = {name: (folder / name).read_bytes() for name in FILES}
    write_blend(folder, dict(reversed(MIXTURE.items())), config, utility=0.5)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_a_written_blend_is_told_from_one_of_other_data_weights_or_held_out_text(
    config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "blend"
    assert not current_blend(folder, MIXTURE, config)
    write_blend(folder, MIXTURE, config)
    assert current_blend(folder, MIXTURE, config)
    assert not current_blend(folder, {"math": 0.5, "code": 0.5}, config)
    weighted = Domain(prefixes={str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0})
    held = Evaluate(
        capabilities={"all": Capability(loss=LossTask(prefixes=[str(tmp_path / "held2")]))}
    )
    for other in (
        {"domains": {**config.domains, "math": weighted}},
        {"evaluate": held},
        {"blend": Blend(train_tokens=1000, split="60,40,0")},
    ):
        assert not current_blend(folder, MIXTURE, config.model_copy(update=other)), other
    for_less = {"blend": Blend(train_tokens=900, split="50,50,0")}
    assert current_blend(folder, MIXTURE, config.model_copy(update=for_less))


def test_after_a_crash_the_marker_is_missing_and_a_second_start_completes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "blend"
    write_blend(folder, {"math": 0.5, "code": 0.5}, config)
    clean = write_blend(tmp_path / "clean", MIXTURE, config)
    expected = {name: (clean / name).read_text().replace(str(clean), str(folder)) for name in FILES}
    replace = os.replace
    for survivors in range(4):
        moved = 0

        def failing(source: Path, target: Path, allowed: int = survivors) -> None:
            nonlocal moved
            if moved == allowed:
                raise KeyboardInterrupt
            moved += 1
            replace(source, target)

        monkeypatch.setattr(publishing.os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            write_blend(folder, MIXTURE, config)
        monkeypatch.setattr(publishing.os, "replace", replace)
        assert not (folder / "blend.yaml").exists()
    write_blend(folder, MIXTURE, config)
    assert {name: (folder / name).read_text() for name in FILES} == expected
