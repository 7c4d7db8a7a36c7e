"""Tokenizers: bytes exactly, Hugging Face from a local folder only."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mergemix.config import Tokenizer
from megatron_mergemix.data.tokenizers import ByteTokenizer, load_tokenizer
from megatron_mergemix.errors import ConfigError, DataError


def test_bytes_are_their_own_ids() -> None:
    tokenizer = load_tokenizer(Tokenizer())
    assert tokenizer.encode("a\u00e4\x00").tolist() == [97, 195, 164, 0]
    assert tokenizer.encode("x").dtype == np.int32
    assert tokenizer.encode("").size == 0
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


@given(st.text())
def test_any_text_comes_back_from_its_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_document_decodes_to_nothing_and_a_cut_character_to_its_mark() -> None:
    assert ByteTokenizer().decode([97, 256, 98]) == "ab"
    assert ByteTokenizer().decode([195]) == "\ufffd"


@pytest.mark.parametrize("outside", [-1, 257])
def test_an_id_outside_the_vocabulary_is_refused(outside: int) -> None:
    with pytest.raises(DataError, match=f"id {outside} is no byte token, expected 0 to 256"):
        ByteTokenizer().decode([97, outside])


def test_half_a_surrogate_pair_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"character 2 is '\\ud800', half a surrogate pair"):
        ByteTokenizer().encode("ab\ud800")


def test_hugging_face_without_a_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.path is missing"):
        load_tokenizer(Tokenizer(kind="huggingface"))
    with pytest.raises(ConfigError, match="is no folder"):
        load_tokenizer(Tokenizer(kind="huggingface", path=tmp_path / "gpt2"))


def test_without_transformers_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-mergemix\[huggingface\]'"):
        load_tokenizer(Tokenizer(kind="huggingface", path=tmp_path))


class TestHuggingFace:
    """With the real package, on a tokenizer trained here."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return self.train(tmp_path / "tokenizer", eos_token="<end>")

    def train(self, folder: Path, **special: str) -> Path:
        transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
        tokenizers = pytest.importorskip("tokenizers")
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            ["the cat sat on the mat"] * 10, vocab_size=300, special_tokens=["<begin>", "<end>"]
        )
        bpe.add_special_tokens(["<begin>", "<end>"])
        # A tokenizer that would put <begin> before every text if it were allowed to.
        begin = bpe.token_to_id("<begin>")
        bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", begin)]
        )
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
        fast.save_pretrained(folder)
        return folder

    def test_ids_come_without_special_tokens_and_decode_to_the_text(self, folder: Path) -> None:
        tokenizer = load_tokenizer(Tokenizer(kind="huggingface", path=folder))
        text = "the cat , sat \u00e4"
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert len(ids) < len(text.encode())
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids.tolist(), tokenizer.eod]) == text
        assert tokenizer.eod == 1

    def test_the_digest_follows_the_files(self, folder: Path) -> None:
        settings = Tokenizer(kind="huggingface", path=folder)
        before = load_tokenizer(settings).digest()
        (folder / "weights.safetensors").write_bytes(b"not the tokenizer's")
        assert load_tokenizer(settings).digest() == before
        changed = (folder / "tokenizer.json").read_text() + "\n"
        (folder / "tokenizer.json").write_text(changed)
        assert load_tokenizer(settings).digest() != before

    def test_a_tokenizer_without_an_end_token_is_refused(self, tmp_path: Path) -> None:
        folder = self.train(tmp_path / "endless")
        with pytest.raises(ConfigError, match="has no end-of-sequence token"):
            load_tokenizer(Tokenizer(kind="huggingface", path=folder))

    def test_an_empty_folder_is_refused_without_the_network(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers", reason="needs the extra huggingface")
        with pytest.raises(ConfigError, match="no tokenizer can be loaded from"):
            load_tokenizer(Tokenizer(kind="huggingface", path=tmp_path))
