"""``mergemix data``: text files into a Megatron dataset, through Megatron's own builder.

The result depends on the inputs and options alone, not on the number of workers. Everything is
built in a folder beside the target and moved to its place at the end, ``<prefix>.idx`` last, so a
dataset that has its index is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mergemix import __version__
from megatron_mergemix.errors import DataError

if TYPE_CHECKING:
    from megatron_mergemix.data.documents import Encoded, Encoder, Options, Source
    from megatron_mergemix.data.sidecar import Sidecar

HELD_OUT_SUFFIX = "_heldout"
"""The held-out part of the dataset ``<prefix>`` is the dataset ``<prefix>_heldout``."""

_ENDINGS = (".bin", ".json", ".idx")


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        prefix: of the training part.
        train: its sidecar.
        held_out: the sidecar of ``<prefix>_heldout``, or None where nothing was held out.
    """

    prefix: str
    train: Sidecar
    held_out: Sidecar | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mergemix data``."""
    add = parser.add_argument
    add("inputs", metavar="FILE", nargs="+", type=Path, help=".jsonl or .txt, UTF-8")
    add("--output", metavar="PREFIX", required=True, help="dataset to write: PREFIX.bin and .idx")
    add(
        "--tokenizer",
        metavar="NAME",
        default="byte",
        help="byte, or the folder of a Hugging Face tokenizer (default: byte)",
    )
    add("--json-key", metavar="KEY", default="text", help="key of the text in .jsonl lines")
    add(
        "--txt-documents",
        choices=("file", "paragraph"),
        default="file",
        help="a .txt file is one document, or one per block between blank lines (default: file)",
    )
    add(
        "--held-out",
        metavar="SHARE",
        type=float,
        default=0.0,
        help=f"share of the documents, chosen by content, for PREFIX{HELD_OUT_SUFFIX}",
    )
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: yes)",
    )
    add(
        "--split-sentences",
        metavar="LANGUAGE",
        nargs="?",
        const="english",
        help="store every sentence as a sequence of its own; needs NLTK and its punkt_tab data",
    )
    add("--workers", metavar="N", type=int, default=1, help="processes that tokenize (default: 1)")
    add("--overwrite", action="store_true", help="replace a dataset and its held-out part")


def run(args: argparse.Namespace) -> None:
    """Carry out ``mergemix data`` and print what was written."""
    from megatron_mergemix.config import Tokenizer
    from megatron_mergemix.data.documents import Options

    tokenizer = (
        Tokenizer()
        if args.tokenizer == "byte"
        else Tokenizer(kind="huggingface", path=Path(args.tokenizer))
    )
    options = Options(
        tokenizer=tokenizer,
        json_key=args.json_key,
        txt_documents=args.txt_documents,
        held_out=args.held_out,
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    prepared = prepare(args.inputs, args.output, options)
    _print_part(prepared.prefix, prepared.train)
    if prepared.held_out is not None:
        _print_part(prepared.prefix + HELD_OUT_SUFFIX, prepared.held_out)
    if prepared.train.dropped_empty:
        print(f"dropped {prepared.train.dropped_empty} documents without text")


def prepare(
    inputs: Sequence[str | Path], output: str | Path, options: Options | None = None
) -> Prepared:
    """Write the text of ``inputs`` as the dataset ``output`` and say what it holds.

    Args:
        inputs: ``.jsonl`` or ``.txt`` files, in the order in which their documents are stored.
        output: prefix of the dataset; its folder is made where it is missing.
        options: see :class:`~megatron_mergemix.data.documents.Options`.

    Raises:
        DataError: an input is missing or damaged, the dataset exists already or cannot be
            written, or a part of it would be empty.
        ConfigError: the tokenizer or the sentence splitter cannot be loaded.
        BlendError: Megatron could not read the prefix in a blend.
    """
    from megatron_mergemix.data.documents import Encoder, Options, Source

    options = options or Options()
    _check_options(options)
    prefix = os.fspath(output)
    _check_target(prefix, options)
    sources = [Source(Path(path), options.txt_documents) for path in inputs]
    _refuse_twice([source.path for source in sources])
    encoder = Encoder(options)
    try:
        with _building_folder(prefix) as folder:
            parts = _write_parts(folder, prefix, sources, encoder, options)
            _publish(folder, prefix, list(parts), options)
    except OSError as error:
        raise DataError(
            f"cannot read or write {error.filename or prefix}: {error.strerror}. Check "
            "permissions and free space."
        ) from error
    return Prepared(prefix, parts[prefix], parts.get(prefix + HELD_OUT_SUFFIX))


def _write_parts(
    folder: Path, prefix: str, sources: Sequence[Source], encoder: Encoder, options: Options
) -> dict[str, Sidecar]:
    """Build every part in ``folder`` under its final name; return prefix -> sidecar."""
    from megatron_mergemix.data.encode_all import encode_all

    train = _Part(folder / Path(prefix).name, encoder.tokenizer.vocab_size)
    held_out = None
    if options.held_out > 0:
        name = Path(prefix).name + HELD_OUT_SUFFIX
        held_out = _Part(folder / name, encoder.tokenizer.vocab_size)
    dropped_empty = 0
    for document in encode_all(sources, encoder, options):
        if document is None:
            dropped_empty += 1
        elif document.held_out and held_out is not None:
            held_out.add(document)
        else:
            train.add(document)
    origin = _origin(sources, encoder, options) | {"dropped_empty": dropped_empty}
    parts = {prefix: train.finish(origin | _held_out_entry(options, "train"))}
    if held_out is not None:
        entry = _held_out_entry(options, "heldout")
        parts[prefix + HELD_OUT_SUFFIX] = held_out.finish(origin | entry)
    return parts


class _Part:
    """One dataset under construction."""

    def __init__(self, path: Path, vocab_size: int):
        builder, dtype_for = _megatron_builder()
        self._path = path
        self._builder = builder(f"{path}.bin", dtype=dtype_for(vocab_size))
        self._documents = self._sequences = self._tokens = self._bytes = 0

    def add(self, document: Encoded) -> None:
        self._builder.add_document(document.tokens, document.lengths)
        self._documents += 1
        self._sequences += len(document.lengths)
        self._tokens += len(document.tokens)
        self._bytes += document.num_bytes

    def finish(self, origin: dict[str, Any]) -> Sidecar:
        """Write index and sidecar; everything is on disk afterwards."""
        from megatron_mergemix.data.sidecar import Sidecar, dump_sidecar

        if self._documents == 0:
            raise DataError(
                f"no document is left for {self._path.name} (held-out share "
                f"{origin['held_out']['share']:g}, {origin['dropped_empty']} documents without "
                "text). Give more text, or another --held-out."
            )
        self._builder.finalize(f"{self._path}.idx")
        sidecar = Sidecar(
            documents=self._documents,
            sequences=self._sequences,
            tokens=self._tokens,
            bytes=self._bytes,
            **origin,
        )
        Path(f"{self._path}.json").write_text(dump_sidecar(sidecar), encoding="utf-8")
        for ending in _ENDINGS:
            with open(f"{self._path}{ending}", "rb") as file:
                os.fsync(file.fileno())
        return sidecar


def _megatron_builder() -> tuple[Any, Any]:
    """Return Megatron's dataset builder and its choice of a dtype for a vocabulary."""
    with warnings.catch_warnings():
        # Megatron warns about missing GPU packages, which have no part in writing tokens.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    return IndexedDatasetBuilder, DType.optimal_dtype


# ---- checks, provenance, publishing ----


def _check_options(options: Options) -> None:
    if not 0 <= options.held_out < 1:
        raise DataError(f"held-out share is {options.held_out:g}, expected 0 <= share < 1.")
    if options.workers < 1:
        raise DataError(f"workers is {options.workers}, expected at least 1.")


def _check_target(prefix: str, options: Options) -> None:
    from megatron_mergemix.data.blend import check_prefix
    from megatron_mergemix.data.sidecar import read_sidecar

    check_prefix(prefix)
    for part in (prefix, prefix + HELD_OUT_SUFFIX):
        existing = [f"{part}{ending}" for ending in _ENDINGS if os.path.lexists(part + ending)]
        if existing and not options.overwrite:
            raise DataError(
                f"{', '.join(existing)} exists already. Choose another output, or give --overwrite "
                "to replace the dataset and its held-out part."
            )
        if f"{part}.json" in existing and read_sidecar(part) is None:
            raise DataError(
                f"{part}.json would be replaced, but was not written by megatron-mergemix. Move it "
                "away or choose another output."
            )


def _refuse_twice(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(f"{path} is given twice; its documents would be stored twice.")
        seen.add(path.resolve())


def _held_out_entry(options: Options, part: str) -> dict[str, Any]:
    return {"held_out": {"share": options.held_out, "part": part}}


def _origin(sources: Sequence[Source], encoder: Encoder, options: Options) -> dict[str, Any]:
    import numpy
    from megatron.core import __version__ as megatron_version

    from megatron_mergemix.data.documents import tokenizer_settings

    settings = tokenizer_settings(options)
    return {
        "append_eod": options.append_eod,
        "split_sentences": options.split_sentences is not None,
        "tokenizer": {
            "kind": settings.kind,
            "path": None if settings.path is None else str(settings.path),
            "digest": encoder.tokenizer.digest(),
            "vocab_size": encoder.tokenizer.vocab_size,
            "eod": encoder.tokenizer.eod,
        },
        "sources": [
            {"path": str(source.path), "bytes": source.bytes_read, "sha256": source.digest()}
            for source in sources
        ],
        "versions": {
            "megatron_mergemix": __version__,
            "megatron_core": megatron_version,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


@contextlib.contextmanager
def _building_folder(prefix: str) -> Iterator[Path]:
    """Give a folder on the target's file system that is gone afterwards, unless killed."""
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(target.parent.glob(f".{target.name}.*.building")):
        print(f"note: {leftover} is from another or a killed run", file=sys.stderr)
    folder = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.building")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _publish(folder: Path, prefix: str, parts: Sequence[str], options: Options) -> None:
    """Move the parts to their places; the index of the training part is the last file.

    An old index goes first, so that at no moment an index describes other tokens.
    """
    from megatron_mergemix.files.publishing import sync_folder

    target = Path(prefix).parent
    if options.overwrite:
        for part in (prefix, prefix + HELD_OUT_SUFFIX):
            for ending in reversed(_ENDINGS):
                Path(part + ending).unlink(missing_ok=True)
        sync_folder(target)
    for part in reversed(parts):
        for ending in _ENDINGS:
            if ending == ".idx":
                sync_folder(target)
            os.replace(folder / (Path(part).name + ending), part + ending)
    sync_folder(target)


def _print_part(prefix: str, sidecar: Sidecar) -> None:
    print(
        f"{prefix}: {sidecar.documents} documents, {sidecar.tokens} tokens, "
        f"{sidecar.bytes} bytes of text"
    )
