"""Megatron's indexed datasets, read without Megatron: ``<prefix>.idx`` and ``<prefix>.bin``.

Everything that can be wrong with the two files is found on opening, by the index and the size of
the token file alone; tokens are mapped, not read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from megatron_mergemix.data.sidecar import read_sidecar, sidecar_path
from megatron_mergemix.errors import ConfigError, DataError

Part = Literal["train", "valid", "test"]

_PARTS = ("train", "valid", "test")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = np.dtype(
    [
        ("magic", "V9"),
        ("version", "<u8"),
        ("dtype", "u1"),
        ("num_sequences", "<u8"),
        ("num_boundaries", "<u8"),
    ]
)
# Megatron's codes 6 and 7 are float64 and float32, which are no tokens.
_TOKEN_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class IndexedDataset:
    """One dataset: ``sequences`` of tokens, grouped into documents.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: of the stored tokens.
        lengths: int32 ``[num_sequences]``, tokens per sequence.

    Raises:
        DataError: on construction, when a file is missing or damaged, the two do not belong
            together, or there are no tokens.
    """

    prefix: str
    dtype: np.dtype = field(init=False)
    lengths: np.ndarray = field(init=False, repr=False)
    _starts: np.ndarray = field(init=False, repr=False)
    _boundaries: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prefix = os.fspath(self.prefix)
        _check_files(prefix)
        dtype, lengths, starts, boundaries = _read_index(prefix)
        for name, value in (
            ("prefix", prefix),
            ("dtype", dtype),
            ("lengths", lengths),
            ("_starts", starts),
            ("_boundaries", boundaries),
        ):
            object.__setattr__(self, name, value)
        self._check_token_file()

    def _check_token_file(self) -> None:
        if self.num_tokens == 0:
            raise DataError(
                f"{self.prefix}.idx lists {self.num_sequences} sequences with 0 tokens, expected "
                "some. Make the dataset again from text that is not empty."
            )
        expected = self.num_tokens * self.dtype.itemsize
        found = os.path.getsize(f"{self.prefix}.bin")
        end = int(self._starts[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if found != expected or end != expected:
            raise DataError(
                f"{self.prefix}.bin has {found} bytes, but {self.prefix}.idx describes {expected} "
                f"({self.num_tokens} tokens of {self.dtype.name}). The two files are from "
                "different runs, or one is cut off; copy or make them again."
            )

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences; Megatron's ``--split`` cuts at sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Return the number of documents; the file keeps one boundary more."""
        return len(self._boundaries) - 1

    @cached_property
    def num_tokens(self) -> int:
        """Return the number of tokens in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def tokens(self) -> np.ndarray:
        """Return all tokens, ``[num_tokens]`` in ``dtype``, mapped read-only."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")

    def sequences_in_split(self, split: str, which: Part) -> range:
        """Return the sequences that Megatron's ``--split`` gives to one part.

        Raises:
            ConfigError: ``split`` is not up to three numbers, or ``which`` names no part.
        """
        # Python's round: to the even neighbour at .5, as Megatron cuts.
        first, last = (round(edge * float(self.num_sequences)) for edge in _edges(split, which))
        return range(first, last)

    def tokens_in_split(self, split: str, which: Part) -> int:
        """Return the tokens that Megatron's ``--split`` gives to one part; may be 0.

        Raises:
            ConfigError: ``split`` is not up to three numbers, or ``which`` names no part.
        """
        part = self.sequences_in_split(split, which)
        return int(self.lengths[part.start : part.stop].sum(dtype=np.int64))

    def fingerprint(self) -> str:
        """Return a sha256 in hex that changes when the dataset is exchanged for another.

        It covers the whole index, the size of the token file and 64 blocks of 64 KiB spread
        evenly over it, first and last included: all tokens of a file up to 4 MiB, a sample of a
        larger one. A change of single tokens between the blocks goes unseen. The path does not
        enter. Computed once per process.
        """
        index, tokens = os.stat(f"{self.prefix}.idx"), os.stat(f"{self.prefix}.bin")
        return _fingerprint_once(
            self.prefix, index.st_mtime_ns, index.st_ino, tokens.st_mtime_ns, tokens.st_ino
        )


def share_of_split(split: str, which: Part) -> float:
    """Return the share that Megatron's ``--split`` gives to one part.

    Raises:
        ConfigError: ``split`` is not up to three numbers, or ``which`` names no part.
    """
    first, last = _edges(split, which)
    return last - first


def bytes_per_token(prefix: str) -> float | None:
    """Return the mean UTF-8 bytes of text behind a token, or None where no sidecar tells.

    End-of-document tokens count as tokens without bytes.

    Raises:
        DataError: the sidecar is damaged, or speaks of another number of tokens.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return None
    found = IndexedDataset(prefix).num_tokens
    if sidecar.tokens != found:
        raise DataError(
            f"{sidecar_path(prefix)} speaks of {sidecar.tokens} tokens, but {prefix}.idx has "
            f"{found}. It belongs to another dataset; remove it or make the dataset again."
        )
    return sidecar.bytes / sidecar.tokens


@cache
def _fingerprint_once(prefix: str, *state_of_the_files: int) -> str:
    digest = hashlib.sha256()
    with open(f"{prefix}.idx", "rb") as index:
        while block := index.read(1 << 20):
            digest.update(block)
    size = os.path.getsize(f"{prefix}.bin")
    digest.update(size.to_bytes(8, "little"))
    with open(f"{prefix}.bin", "rb") as tokens:
        _hash_sample(tokens, size, digest)
    return digest.hexdigest()


def _hash_sample(tokens: BinaryIO, size: int, digest: hashlib._Hash) -> None:
    last = max(size - _BLOCK_BYTES, 0)
    blocks = min(_SAMPLED_BLOCKS, math.ceil(size / _BLOCK_BYTES))
    for block in range(blocks):
        tokens.seek(last * block // max(blocks - 1, 1))
        digest.update(tokens.read(_BLOCK_BYTES))


def _check_files(prefix: str) -> None:
    missing = [ending for ending in (".idx", ".bin") if not Path(prefix + ending).is_file()]
    if not missing:
        return
    if prefix.endswith((".idx", ".bin")):
        raise DataError(
            f"{prefix} is a file's name, expected the prefix without {prefix[-4:]}: {prefix[:-4]}."
        )
    names = " and ".join(prefix + ending for ending in missing)
    raise DataError(
        f"{names} not found. A dataset is a pair of <prefix>.idx and <prefix>.bin; check the "
        "prefix, or make the dataset with `mergemix data`."
    )


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return dtype, lengths, byte offsets and document boundaries, mapped."""
    path = f"{prefix}.idx"
    size = os.path.getsize(path)
    if size < _HEADER.itemsize:
        raise DataError(f"{path} has {size} bytes, shorter than its header. It is cut off.")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    header = raw[: _HEADER.itemsize].view(_HEADER)[0]
    dtype = _token_dtype(path, header)
    sequences, boundaries = int(header["num_sequences"]), int(header["num_boundaries"])
    ends = list(accumulate([_HEADER.itemsize, 4 * sequences, 8 * sequences, 8 * boundaries]))
    if size < ends[-1]:
        raise DataError(
            f"{path} has {size} bytes, but its header announces {ends[-1]} ({sequences} sequences)."
            " It is cut off; copy or make the dataset again."
        )
    lengths, starts, documents = (
        raw[first:last].view(kind)
        for first, last, kind in zip(ends, ends[1:], ("<i4", "<i8", "<i8"), strict=False)
    )
    if sequences == 0:
        raise DataError(f"{path} lists no sequences. Make the dataset again from text.")
    if boundaries == 0 or int(documents[-1]) != sequences:
        raise DataError(
            f"{path} is damaged: its documents do not end at sequence {sequences}. Make it again."
        )
    return dtype, lengths, starts, documents


def _token_dtype(path: str, header: np.void) -> np.dtype:
    if header["magic"].tobytes() != _MAGIC:
        raise DataError(
            f"{path} does not start with {_MAGIC[:7].decode()}: it is no Megatron index file."
        )
    if header["version"] != _VERSION:
        raise DataError(
            f"{path} has format version {header['version']}, expected {_VERSION}. "
            "It was written by another program."
        )
    code = int(header["dtype"])
    if code not in _TOKEN_DTYPES:
        raise DataError(
            f"{path} has dtype code {code}, expected one of {sorted(_TOKEN_DTYPES)} (integers)."
        )
    return np.dtype(_TOKEN_DTYPES[code])


def _edges(split: str, which: Part) -> tuple[float, float]:
    """Return where a part of the split begins and ends, from 0 to 1."""
    if which not in _PARTS:
        raise ConfigError(f"part {which!r} of a split, expected one of {', '.join(_PARTS)}.")
    numbers = [text.strip() for text in split.split(",")]
    shares = [float(text) for text in numbers if re.fullmatch(r"\d+\.?\d*|\.\d+", text)]
    if len(shares) != len(numbers) or len(shares) > len(_PARTS) or not sum(shares) > 0:
        raise ConfigError(
            f"split is {split!r}, expected up to three numbers for train, valid and test that do "
            "not all vanish, such as '99,1,0'."
        )
    shares += [0.0] * (len(_PARTS) - len(shares))
    normalised = cast("list[float]", (np.array(shares) / np.sum(shares)).tolist())
    # Summed from the left like Megatron, so that the last bit agrees with it.
    edges = [0.0]
    for share in normalised:
        edges.append(edges[-1] + share)
    part = _PARTS.index(which)
    return edges[part], edges[part + 1]
