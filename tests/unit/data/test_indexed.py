"""Reading .idx/.bin: agreement with Megatron's own reader and splitter, and every damage."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.errors import ConfigError, DataError
from tests.support.tiny_dataset import read_dataset

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10]], [[11]]]


def build(prefix: Path, dtype: type = np.uint16, documents: list = DOCUMENTS) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = np.concatenate([np.array(each) for each in sequences])
        builder.add_document(flat, [len(each) for each in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return build(tmp_path / "toy")


def patch(prefix: str, offset: int, content: bytes) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_every_integer_dtype_reads_as_megatron_reads_it(tmp_path: Path, dtype: type) -> None:
    prefix = build(tmp_path / "toy", dtype)
    ours, megatron = IndexedDataset(prefix), MegatronDataset(prefix)
    assert ours.dtype == np.dtype(dtype)
    assert ours.num_sequences == len(megatron) == 5
    assert ours.num_documents == len(megatron.document_indices) - 1 == 4
    assert ours.num_tokens == 11
    assert ours.lengths.tolist() == [3, 1, 2, 4, 1]
    assert ours.tokens.tolist() == list(range(1, 12))
    assert read_dataset(prefix) == [megatron[index].tolist() for index in range(5)]


def test_a_path_object_is_a_prefix_too(prefix: str) -> None:
    assert IndexedDataset(Path(prefix)).prefix == prefix  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(
        st.one_of(st.integers(0, 1000), st.floats(0, 100).map(lambda x: round(x, 3))),
        min_size=1,
        max_size=3,
    ).filter(lambda shares: sum(shares) > 0),
    num_sequences=st.integers(1, 400),
)
def test_a_split_cuts_where_megatron_cuts(
    tmp_path_factory: pytest.TempPathFactory, shares: list[float], num_sequences: int
) -> None:
    prefix = tmp_path_factory.mktemp("split") / "toy"
    lengths = [1 + index % 7 for index in range(num_sequences)]
    dataset = IndexedDataset(build(prefix, documents=[[list(range(n))] for n in lengths]))
    split = ",".join(str(share) for share in shares)
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for which, part in zip(("train", "valid", "test"), matrix, strict=True):
        # The cut of BlendedMegatronDatasetBuilder._build_megatron_dataset_splits.
        first, last = (int(round(edge * float(num_sequences))) for edge in part or (0, 0))
        assert dataset.tokens_in_split(split, which) == sum(lengths[first:last])


def test_halves_are_rounded_to_even_like_megatron(prefix: str) -> None:
    # 5 sequences, cut at 2.5: Python rounds to 2, schoolbook rounding would give 3.
    dataset = IndexedDataset(prefix)
    assert dataset.sequences_in_split("1,1,0", "train") == range(0, 2)
    assert dataset.tokens_in_split("1,1,0", "train") == 4
    assert dataset.tokens_in_split("1,1,0", "valid") == 7
    assert dataset.tokens_in_split("1,1,0", "test") == 0


@pytest.mark.parametrize("split", ["", "a,b,c", "0,0,0", "1,2,3,4", "1,-1,0", "nan,1,0", "1e2,1"])
def test_a_split_that_is_none_is_refused_with_its_text(prefix: str, split: str) -> None:
    with pytest.raises(ConfigError, match="expected up to three numbers") as caught:
        IndexedDataset(prefix).tokens_in_split(split, "train")
    assert repr(split) in str(caught.value)


def test_an_unknown_part_names_the_known_ones(prefix: str) -> None:
    with pytest.raises(ConfigError, match="'dev' of a split, expected one of train, valid, test"):
        IndexedDataset(prefix).tokens_in_split("1,1,1", "dev")  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: str, ending: str) -> None:
    Path(prefix + ending).unlink()
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    assert str(caught.value).startswith(f"{prefix}{ending} not found")


def test_a_wrong_prefix_names_both_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.idx and .*nothing\.bin not found"):
        IndexedDataset(str(tmp_path / "nothing"))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_prefix_with_a_suffix_says_what_to_write(prefix: str, ending: str) -> None:
    with pytest.raises(DataError, match="expected the prefix without") as caught:
        IndexedDataset(prefix + ending)
    assert str(caught.value).endswith(f": {prefix}.")


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"TARBALL", "does not start with MMIDIDX"),
        (9, struct.pack("<Q", 2), "has format version 2, expected 1"),
        (17, b"\x63", "has dtype code 99"),
        (17, b"\x07", "has dtype code 7"),
        (18, struct.pack("<Q", 2**60), "It is cut off"),
        (26, struct.pack("<Q", 6), "It is cut off"),
        (26, struct.pack("<Q", 4), "documents do not end at sequence 5"),
        (26, struct.pack("<Q", 0), "documents do not end at sequence 5"),
        (18, struct.pack("<Q", 0), "lists no sequences"),
        (34, struct.pack("<i", 9), "has 22 bytes, but .* describes 34"),
    ],
)
def test_a_damaged_index_says_what_is_wrong(
    prefix: str, offset: int, content: bytes, message: str
) -> None:
    patch(prefix, offset, content)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert f"{prefix}.idx" in str(caught.value)


@pytest.mark.parametrize("size", [0, 20, 60])
def test_a_cut_index_is_refused(prefix: str, size: int) -> None:
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(content[:size])
    with pytest.raises(DataError, match="cut off"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("change", [-2, 1])
def test_a_token_file_of_another_size_is_refused(prefix: str, change: int) -> None:
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes((content + b"x")[: len(content) + change])
    with pytest.raises(DataError, match=r"has \d+ bytes, but .* describes 22 \(11 tokens"):
        IndexedDataset(prefix)


def test_a_dataset_without_tokens_is_refused(tmp_path: Path) -> None:
    prefix = build(tmp_path / "toy", documents=[[[]]])
    with pytest.raises(DataError, match="lists 1 sequences with 0 tokens"):
        IndexedDataset(prefix)


def test_the_fingerprint_follows_the_content_and_not_the_path(prefix: str, tmp_path: Path) -> None:
    original = IndexedDataset(prefix).fingerprint()
    for ending in (".bin", ".idx"):
        shutil.copy(prefix + ending, tmp_path / f"copy{ending}")
    assert IndexedDataset(str(tmp_path / "copy")).fingerprint() == original
    changed = bytearray(Path(f"{prefix}.bin").read_bytes())
    changed[-1] ^= 1
    Path(f"{prefix}.bin").write_bytes(changed)
    assert IndexedDataset(prefix).fingerprint() != original


def test_other_boundaries_over_the_same_tokens_change_the_fingerprint(tmp_path: Path) -> None:
    first = build(tmp_path / "a", documents=[[[1, 2]], [[3]]])
    second = build(tmp_path / "b", documents=[[[1]], [[2, 3]]])
    assert IndexedDataset(first).fingerprint() != IndexedDataset(second).fingerprint()


def test_the_fingerprint_of_a_large_file_sees_its_first_and_last_tokens(tmp_path: Path) -> None:
    tokens = np.zeros(5 << 20, dtype=np.uint8)
    prints = set()
    for place in (None, 0, -1):
        changed = tokens.copy()
        if place is not None:
            changed[place] = 1
        prefix = build(tmp_path / str(place), np.uint8, [[changed]])
        prints.add(IndexedDataset(prefix).fingerprint())
    assert len(prints) == 3
