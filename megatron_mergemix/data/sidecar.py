"""``<prefix>.json`` beside a dataset: the origin of its tokens, and the bytes they stand for.

Megatron ignores the file. It is what turns a loss in nats per token into bits per byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mergemix.errors import DataError

FORMAT = "megatron-mergemix dataset 1"


@dataclass(frozen=True)
class Sidecar:
    """What is known about one dataset.

    Attributes:
        documents: documents in this dataset.
        sequences: sequences; equal to ``documents`` unless sentences were split.
        tokens: tokens, end-of-document tokens included.
        bytes: UTF-8 bytes of the documents' text.
        dropped_empty: documents without text in the sources, in no dataset.
        held_out: ``{"share": ..., "part": "train" or "heldout"}``.
        append_eod: whether every document ends with the tokenizer's end-of-document token.
        split_sentences: whether a sequence is a sentence instead of a document.
        tokenizer: ``{"kind", "path", "digest", "vocab_size", "eod"}``.
        sources: per input file ``{"path", "bytes", "sha256"}``.
        versions: of the programs that wrote it.
    """

    documents: int
    sequences: int
    tokens: int
    bytes: int
    dropped_empty: int
    held_out: Mapping[str, Any]
    append_eod: bool
    split_sentences: bool
    tokenizer: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]


def sidecar_path(prefix: str) -> Path:
    """Return where the sidecar of a dataset is, or would be."""
    return Path(f"{prefix}.json")


def dump_sidecar(sidecar: Sidecar) -> str:
    """Return the text of the file."""
    return json.dumps({"format": FORMAT, **asdict(sidecar)}, indent=2) + "\n"


def read_sidecar(prefix: str) -> Sidecar | None:
    """Return the sidecar of a dataset, or None where it has none.

    A ``<prefix>.json`` that something else wrote, such as the text the dataset was made from, is
    no sidecar.

    Raises:
        DataError: it is a sidecar, but of another version or with fields missing.
    """
    path = sidecar_path(prefix)
    try:
        with path.open("rb") as file:
            # A foreign file may be huge; a sidecar names its format in the first line.
            if FORMAT[:-1].encode() not in file.read(200):
                return None
            file.seek(0)
            content = json.load(file)
        if content.pop("format") == FORMAT:
            return Sidecar(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}. Make the dataset again.") from error
    raise DataError(
        f"{path} has a format other than {FORMAT!r}. Make the dataset again, or use the version of "
        "megatron-mergemix that wrote it."
    )
