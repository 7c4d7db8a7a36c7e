"""What a checkpoint contains, as plain values: no torch, no files, no parallel layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mergemix.checkpoint.archive import StoredTensor

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""torch dtype -> bytes per element."""

NOT_MODEL = (
    r"(chained_\d+\.)?optimizer\.",  # moments, masters and buckets of every optimizer
    r"(\w+\.)*rng_state/",  # random number generators, one per pipeline and tensor rank
    r"rerun_state_machine_state/",
    r"common_state/",  # arguments, iteration, scheduler; Megatron Core >= 0.19
)
"""Names, from their beginning, of the entries that are not part of the model."""

_NOT_MODEL = re.compile("|".join(NOT_MODEL))
_EXTRA_STATE = re.compile(r"_extra_state\d*$")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor that is stored in one piece.

    Attributes:
        offsets: where the box begins, one number per dim.
        sizes: how far it reaches, one number per dim.
        file: name of the file in the checkpoint's folder.
        file_offset: first byte of the piece, a whole ``torch.save`` archive.
        length: bytes of the archive.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    file_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A whole tensor, as it is without any parallelism.

    Attributes:
        shape: global shape.
        dtype: a key of ``DTYPE_BYTES``.
        chunks: boxes that tile the shape, in the order of the metadata.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements in memory."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class BytesEntry:
    """An object that is stored as opaque bytes, such as ``_extra_state``."""

    file: str
    file_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Everything that one checkpoint contains.

    Attributes:
        path: the folder of one iteration.
        iteration: from the folder's name; None for ``release``.
        tensors: name -> tensor, optimizer state included.
        bytes_entries: name (with Megatron's ``/shard_<offset>_<shape>``) -> bytes.
        stored: (file, offset) of a chunk -> where its elements lie, if that is known already.
    """

    path: Path
    iteration: int | None
    tensors: Mapping[str, TensorEntry]
    bytes_entries: Mapping[str, BytesEntry]
    stored: Mapping[tuple[str, int], StoredTensor] = field(default_factory=dict)

    def model_tensors(self) -> dict[str, TensorEntry]:
        """Return the parameters and persistent buffers; ``NOT_MODEL`` lists what is dropped."""
        return {name: entry for name, entry in self.tensors.items() if is_model_entry(name)}

    def num_parameters(self) -> int:
        """Count the elements of all model tensors, padded vocabulary rows included."""
        return sum(entry.numel for entry in self.model_tensors().values())


def is_extra_state(name: str) -> bool:
    """Say whether a name is of what a module keeps beside tensors, such as scales of fp8.

    The MoE experts of a grouped TransformerEngine layer have one each, with their number behind.
    """
    return _EXTRA_STATE.search(name) is not None


def is_model_entry(name: str) -> bool:
    """Say whether an entry belongs to the model and not to optimizer, RNG or bookkeeping."""
    return _NOT_MODEL.match(name) is None
