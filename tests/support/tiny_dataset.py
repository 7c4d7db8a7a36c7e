"""An indexed dataset out of given numbers and back, without Megatron and torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.sidecar import Sidecar, dump_sidecar, sidecar_path


def read_dataset(prefix: str) -> list[list[int]]:
    """Return the tokens of every sequence."""
    dataset = IndexedDataset(prefix)
    return [part.tolist() for part in np.split(dataset.tokens, np.cumsum(dataset.lengths)[:-1])]


def write_dataset(
    prefix: Path, documents: Sequence[np.ndarray], tokenizer: Mapping[str, Any] | None = None
) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``, each document one sequence of uint16 tokens.

    Args:
        prefix: path without endings.
        documents: token ids.
        tokenizer: what a sidecar tells about the tokenizer; without it there is no sidecar.
    """
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8]))
        index.write(len(documents).to_bytes(8, "little"))
        index.write((len(documents) + 1).to_bytes(8, "little"))
        index.write(lengths.tobytes())
        index.write(starts.astype("<i8").tobytes())
        index.write(np.arange(len(documents) + 1, dtype="<i8").tobytes())
    np.concatenate(documents).astype("<u2").tofile(f"{prefix}.bin")
    if tokenizer is not None:
        sidecar_path(str(prefix)).write_text(dump_sidecar(_sidecar(documents, tokenizer)))


def _sidecar(documents: Sequence[np.ndarray], tokenizer: Mapping[str, Any]) -> Sidecar:
    tokens = sum(len(document) for document in documents)
    return Sidecar(
        documents=len(documents),
        sequences=len(documents),
        tokens=tokens,
        bytes=tokens,
        dropped_empty=0,
        held_out={},
        append_eod=False,
        split_sentences=False,
        tokenizer=tokenizer,
        sources=[],
        versions={},
    )
