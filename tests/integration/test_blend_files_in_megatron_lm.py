"""The written blend files, read by the code that reads them in ``pretrain_gpt.py``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_mergemix.config import Base, Blend, Config, Domain
from megatron_mergemix.config.evaluate import Capability, Evaluate, LossTask
from megatron_mergemix.data.blend_files import write_blend
from tests.support.forked_launch import run_forked
from tests.support.megatron_lm import each_checkout


def read_in_megatron(checkout: Path, arguments: list[str]) -> list:
    done = run_forked("tests.support.blend_reader", 1, arguments, checkout=checkout)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def write(tmp_path: Path, prefixes: dict[str, int]) -> tuple[Path, list[str]]:
    for name, num_sequences in prefixes.items():
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=np.uint8)
        for _ in range(num_sequences):
            builder.add_document(np.ones(10), [10])
        builder.finalize(f"{tmp_path / name}.idx")
    at = [str(tmp_path / name) for name in prefixes]
    config = Config(
        run_dir=tmp_path,
        base=Base(checkpoint=tmp_path),
        domains={"math": Domain(prefixes=at[:2]), "code": Domain(prefixes=at[2:3])},
        evaluate=Evaluate(capabilities={"all": Capability(loss=LossTask(prefixes=at[3:]))}),
        blend=Blend(split="50,50,0"),
    )
    return write_blend(tmp_path / "blend", {"math": 0.6, "code": 0.4}, config), at


@each_checkout()
def test_every_file_means_the_same_to_megatron(checkout: Path, tmp_path: Path) -> None:
    folder, at = write(tmp_path, {"a": 80, "b": 20, "c": 50, "h": 2})
    expected = [at[:3], [0.48, 0.12, 0.4]]
    words = (folder / "data_path.txt").read_text().split()
    assert read_in_megatron(checkout, words) == ["50,50,0", expected, None]
    data_args = ["--data-args-path", str(folder / "data_args.txt"), "--split", "50,50,0"]
    assert read_in_megatron(checkout, data_args) == ["50,50,0", expected, None]
    per_split = ["--per-split-data-args-path", str(folder / "per_split_data_args.json")]
    assert read_in_megatron(checkout, per_split) == [None, None, [expected, [at[3:], [1.0]], None]]
    lists = json.loads((folder / "per_split_data_args.json").read_text())
    by_flag = ["--train-data-path", *lists["train"], "--valid-data-path", *lists["valid"]]
    assert read_in_megatron(checkout, by_flag) == [
        None,
        None,
        [expected, [at[3:], [1.0]], None],
    ]
