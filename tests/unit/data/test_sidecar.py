"""The sidecar: what tells bits per byte, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mergemix.data.indexed import IndexedDataset, bytes_per_token
from megatron_mergemix.data.prepare import prepare
from megatron_mergemix.data.sidecar import read_sidecar
from megatron_mergemix.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc"}\n{"text": "\\u00e4\\u00e4"}\n')
    return prepare([text], tmp_path / "toy").prefix


def test_bytes_per_token_counts_utf8_bytes_and_end_tokens(prefix: str) -> None:
    # "abc" is 3 bytes and 4 tokens, two umlauts are 4 bytes and 5 tokens.
    assert bytes_per_token(prefix) == 7 / 9


def test_without_a_sidecar_bytes_are_unknown(prefix: str) -> None:
    Path(f"{prefix}.json").unlink()
    assert read_sidecar(prefix) is None
    assert bytes_per_token(prefix) is None


@pytest.mark.parametrize("content", ['{"text": "a"}', "", "[]", "no json at all"])
def test_a_foreign_json_file_is_no_sidecar(prefix: str, content: str) -> None:
    Path(f"{prefix}.json").write_text(content)
    assert bytes_per_token(prefix) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 8}, "speaks of 8 tokens, but .* has 9"),
        ({"format": "megatron-mergemix dataset 2"}, "format other than"),
        ({"surprise": 1}, "is damaged"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_an_error(prefix: str, change: dict, message: str) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert IndexedDataset(prefix).num_tokens == 9
    with pytest.raises(DataError, match=message):
        bytes_per_token(prefix)


def test_a_cut_sidecar_is_an_error(prefix: str) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="is damaged"):
        read_sidecar(prefix)
