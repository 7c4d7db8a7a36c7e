"""Text files into documents, and documents into tokens; both without any state between documents.

Reading happens in one process and only cuts files apart. Decoding, parsing and tokenizing happen
in :class:`Encoder`, which runs in as many processes as wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_mergemix.data.tokenizers import load_tokenizer, utf8
from megatron_mergemix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_mergemix import config

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1000
_MAX_SEQUENCE = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """How text becomes a dataset.

    Attributes:
        tokenizer: None is the default tokenizer of the configuration.
        json_key: the key of a ``.jsonl`` line that holds the text.
        txt_documents: what one document of a ``.txt`` file is: the whole file, or a block of
            lines between blank ones.
        held_out: share of documents, 0 to less than 1, that go to ``<prefix>_heldout``.
        append_eod: end every document with the tokenizer's end-of-document token.
        split_sentences: language of NLTK's sentence splitter (``"english"``); every sentence
            becomes a sequence of its document. None: a document is one sequence.
        workers: processes that tokenize; the result does not depend on it.
        overwrite: replace a dataset, its held-out part included, that is there already.
    """

    tokenizer: config.Tokenizer | None = None
    json_key: str = "text"
    txt_documents: Literal["file", "paragraph"] = "file"
    held_out: float = 0.0
    append_eod: bool = True
    split_sentences: str | None = None
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class RawDocument:
    """Bytes of a document that nobody has looked into yet, and where they start."""

    path: Path
    line: int
    content: bytes


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        tokens: int32 ``[n]``, all sequences of the document one after the other.
        lengths: tokens per sequence.
        num_bytes: UTF-8 bytes of the text.
        held_out: whether it belongs to the held-out part.
    """

    tokens: np.ndarray
    lengths: list[int]
    num_bytes: int
    held_out: bool


class Source:
    """One input file; counts and hashes the bytes that were read from it."""

    def __init__(self, path: Path, txt_documents: Literal["file", "paragraph"]):
        """Check the file without reading it.

        Raises:
            DataError: it is missing, or neither ``.jsonl`` nor ``.txt``.
        """
        if not path.is_file():
            raise DataError(f"{path} is no file, expected .jsonl or .txt.")
        self._cut = {
            ".jsonl": self._lines,
            ".txt": self._whole if txt_documents == "file" else self._paragraphs,
        }.get(path.suffix)
        if self._cut is None:
            raise DataError(f"{path} ends with {path.suffix!r}, expected .jsonl or .txt.")
        self.path = path
        self.bytes_read = 0
        self._sha256 = hashlib.sha256()

    def documents(self) -> Iterator[RawDocument]:
        """Yield the documents of the file in order."""
        assert self._cut is not None, "the constructor refuses other files"
        return self._cut()

    def digest(self) -> str:
        """Return the sha256 in hex of what was read."""
        return self._sha256.hexdigest()

    def _read(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                self.bytes_read += len(line)
                self._sha256.update(line)
                yield number, line

    def _lines(self) -> Iterator[RawDocument]:
        for number, line in self._read():
            if line.strip():
                yield RawDocument(self.path, number, line)

    def _whole(self) -> Iterator[RawDocument]:
        yield RawDocument(self.path, 1, b"".join(line for _, line in self._read()))

    def _paragraphs(self) -> Iterator[RawDocument]:
        block: list[bytes] = []
        first = 1
        for number, line in self._read():
            if line.strip():
                if not block:
                    first = number
                block.append(line)
            elif block:
                yield RawDocument(self.path, first, b"".join(block).rstrip(b"\r\n"))
                block = []
        if block:
            yield RawDocument(self.path, first, b"".join(block).rstrip(b"\r\n"))


def batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Group documents into pieces of work worth sending to another process."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Encoder:
    """Turns raw documents into tokens."""

    def __init__(self, options: Options):
        """Load the tokenizer and, where sentences are wanted, the splitter.

        Raises:
            ConfigError: one of them cannot be loaded.
        """
        self._options = options
        self.tokenizer = load_tokenizer(tokenizer_settings(options))
        language = options.split_sentences
        self._sentences = sentence_splitter(language) if language else lambda text: [text]

    def encode(self, batch: Sequence[RawDocument]) -> list[Encoded | None]:
        """Return the documents as tokens, in order; None for one without text.

        Raises:
            DataError: a document cannot be read; names file and line.
        """
        return [self._encode(raw) for raw in batch]

    def _encode(self, raw: RawDocument) -> Encoded | None:
        try:
            text = self._text(raw)
            content = utf8(text)
            pieces = [self.tokenizer.encode(sentence) for sentence in self._sentences(text)]
        except DataError as error:
            raise DataError(f"{raw.path}, line {raw.line}: {error}") from error
        pieces = [piece for piece in pieces if len(piece)]
        if not text.strip() or not pieces:
            return None
        if self._options.append_eod:
            pieces[-1] = np.append(pieces[-1], np.int32(self.tokenizer.eod))
        lengths = [len(piece) for piece in pieces]
        if max(lengths) > _MAX_SEQUENCE:
            raise DataError(
                f"{raw.path}, line {raw.line}: a document of {max(lengths)} tokens, but an index "
                f"holds at most {_MAX_SEQUENCE} in one sequence. Cut the text into documents."
            )
        held_out = is_held_out(text, self._options.held_out)
        return Encoded(np.concatenate(pieces), lengths, len(content), held_out)

    def _text(self, raw: RawDocument) -> str:
        try:
            text = raw.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte {error.start} is 0x{raw.content[error.start]:02x}, no UTF-8 text. Convert "
                "the file to UTF-8."
            ) from error
        return text if raw.path.suffix == ".txt" else _json_text(text, self._options.json_key)


def tokenizer_settings(options: Options) -> config.Tokenizer:
    """Return the tokenizer that the options name, or the configuration's default."""
    from megatron_mergemix.config import Tokenizer

    return options.tokenizer or Tokenizer()


def is_held_out(text: str, share: float) -> bool:
    """Return whether a document is held out, by its text alone.

    Documents whose text differs at most in white space at its ends fall on the same side, so a
    duplicate of a held-out document is never trained on; near duplicates may be.
    """
    digest = hashlib.blake2b(utf8(text.strip()), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """Return a function that cuts a text into sentences which concatenate to the text.

    White space between two sentences belongs to the first. NLTK's Punkt model, trained for the
    language, does the cutting; an untrained one would cut at every abbreviation, so there is no
    fallback to it.

    Raises:
        ConfigError: NLTK or its data for the language is not installed.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ConfigError(
            "splitting sentences needs the nltk package. "
            "Install it with: pip install 'megatron-mergemix[nltk]'"
        ) from error
    try:
        punkt = PunktTokenizer(language)
    except (LookupError, OSError, ValueError) as error:
        raise ConfigError(
            f"splitting sentences needs NLTK's Punkt data for {language!r}, which cannot be loaded "
            f"from NLTK's data folders ({type(error).__name__}). Install it with: python -m "
            "nltk.downloader punkt_tab (on a machine without internet, copy the folder "
            "nltk_data/tokenizers/punkt_tab and set NLTK_DATA)."
        ) from error

    def split(text: str) -> list[str]:
        starts = [start for start, _ in punkt.span_tokenize(text)]
        cuts = [0, *starts[1:], len(text)]
        return [text[first:last] for first, last in zip(cuts, cuts[1:], strict=False)]

    return split


def _json_text(line: str, key: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"no JSON: {error}. Expected one JSON object per line.") from error
    except RecursionError as error:
        raise DataError("JSON that is nested too deeply to be read.") from error
    if not isinstance(value, dict):
        raise DataError(f"a JSON {type(value).__name__}, expected an object with key {key!r}.")
    if key not in value:
        known = ", ".join(repr(name) for name in list(value)[:5])
        raise DataError(f"no key {key!r}; the object has {known or 'none'}. Set --json-key.")
    if not isinstance(value[key], str):
        raise DataError(f"{key!r} is a {type(value[key]).__name__}, expected a string.")
    return value[key]
