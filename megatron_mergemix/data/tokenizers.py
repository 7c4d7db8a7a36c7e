"""Text to token ids and back: plain bytes, or a Hugging Face tokenizer from a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_mergemix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_mergemix import config


class Tokenizer(Protocol):
    """What the rest of the program needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Return the number of ids; the largest id is one less."""
        ...

    @property
    def eod(self) -> int:
        """Return the id that ends a document."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 ``[n]``, without any special tokens around it.

        Raises:
            DataError: the text is no valid Unicode.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids; what is no text (end of document) gives nothing."""
        ...

    def digest(self) -> str:
        """Return a text that changes when the same text may give other ids."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document. Needs no files."""

    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of a text, int32 ``[n]``.

        Raises:
            DataError: the text has half a surrogate pair, which UTF-8 cannot express.
        """
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; bytes that are no UTF-8 (a cut character) become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        values = np.asarray(ids, dtype=np.int64)
        outside = values[(values < 0) | (values > self.eod)]
        if outside.size:
            raise DataError(f"id {outside[0]} is no byte token, expected 0 to {self.eod}.")
        return values[values < self.eod].astype(np.uint8).tobytes().decode(errors="replace")

    def digest(self) -> str:
        """Return a constant: there is only one byte tokenizer."""
        return "byte"


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer from a local folder; nothing is downloaded or executed."""

    # What decides the ids; a folder may hold a whole model besides.
    _FILES = (
        "tokenizer*",
        "vocab*",
        "merges*",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.model",
        "*.tiktoken",
    )

    def __init__(self, path: Path):
        """Load the tokenizer.

        Raises:
            ConfigError: transformers is not installed, the folder holds no tokenizer, or the
                tokenizer has no end-of-sequence token to end documents with.
        """
        self._path = Path(path)
        self._tokenizer = _load_pretrained(self._path)
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer in {path} has no end-of-sequence token, but documents must end "
                "with one. Set eos_token in its tokenizer_config.json."
            )
        self.eod = int(self._tokenizer.eos_token_id)
        self.vocab_size = len(self._tokenizer)

    @property
    def pretrained(self) -> Any:
        """Return the tokenizer of transformers, for its special tokens and its chat template."""
        return self._tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 ``[n]``, without special tokens around it.

        Raises:
            DataError: the text has half a surrogate pair.
        """
        utf8(text)
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids, without special tokens."""
        values = np.asarray(ids, dtype=np.int64).tolist()
        return self._tokenizer.decode(
            values, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def digest(self) -> str:
        """Return a sha256 in hex over the names and contents of the tokenizer's files."""
        digest = hashlib.sha256()
        for file in sorted(self._files()):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        return f"huggingface {digest.hexdigest()}"

    def _files(self) -> Iterable[Path]:
        found = {file for pattern in self._FILES for file in self._path.glob(pattern)}
        return (file for file in found if file.is_file())


def load_tokenizer(settings: config.Tokenizer) -> Tokenizer:
    """Return the tokenizer that the settings name.

    Raises:
        ConfigError: the settings do not fit together, or it cannot be loaded.
    """
    if settings.kind == "byte":
        return ByteTokenizer()
    if settings.path is None:
        raise ConfigError("tokenizer.path is missing: kind huggingface reads it from a folder.")
    return HuggingFaceTokenizer(settings.path)


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of a text.

    Raises:
        DataError: the text has half a surrogate pair, which JSON can express and UTF-8 cannot.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is {text[error.start]!a}, half a surrogate pair, which is "
            "no Unicode text. Repair or drop the document."
        ) from error


def _load_pretrained(path: Path) -> Any:
    if not path.is_dir():
        raise ConfigError(
            f"tokenizer.path {path} is no folder, expected the folder of a Hugging Face tokenizer "
            "on this machine; nothing is downloaded."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "tokenizer.kind huggingface needs the transformers package. "
            "Install it with: pip install 'megatron-mergemix[huggingface]'"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {path}: {error}") from error
