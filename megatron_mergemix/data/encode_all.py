"""Tokenize files in one process or several, in order, with progress."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context

from megatron_mergemix.data.documents import (
    Encoded,
    Encoder,
    Options,
    RawDocument,
    Source,
    batches,
)
from megatron_mergemix.errors import DataError
from megatron_mergemix.processes.process_life import die_with_parent

_EncodedBatch = list[Encoded | None]

_worker_encoder: Encoder | None = None


def encode_all(
    sources: Sequence[Source], encoder: Encoder, options: Options
) -> Iterator[Encoded | None]:
    """Yield every document of the sources in order, None for one without text.

    ``encoder`` works when there is one worker; several load their own.

    Raises:
        DataError: a document cannot be read, or a worker died.
    """
    work = batches(chain.from_iterable(source.documents() for source in sources))
    encoded: Iterable[_EncodedBatch]
    encoded = map(encoder.encode, work) if options.workers == 1 else _in_workers(work, options)
    for batch in _with_progress(encoded, sources):
        yield from batch


def _in_workers(work: Iterable[list[RawDocument]], options: Options) -> Iterator[_EncodedBatch]:
    """Yield the encoded batches in order; at most two per worker are in memory."""
    waiting: deque[Future[_EncodedBatch]] = deque()
    # Not fork: importing Megatron has started threads.
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), _start_worker, (options, os.getpid())
    ) as pool:
        try:
            for batch in work:
                waiting.append(pool.submit(_encode_in_worker, batch))
                if len(waiting) >= 2 * options.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely for lack of memory. Use fewer --workers."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _start_worker(options: Options, parent: int) -> None:
    global _worker_encoder
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    _worker_encoder = Encoder(options)


def _encode_in_worker(batch: list[RawDocument]) -> _EncodedBatch:
    assert _worker_encoder is not None, "the pool starts every worker with _start_worker"
    return _worker_encoder.encode(batch)


def _with_progress(
    encoded: Iterable[_EncodedBatch], sources: Sequence[Source]
) -> Iterator[_EncodedBatch]:
    """Pass batches through and show how much of the files was read."""
    total = sum(source.path.stat().st_size for source in sources)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("tokenizing", total=total)
            for batch in encoded:
                yield batch
                bar.update(task, completed=_bytes_read(sources))
        return
    tenths = 0
    for batch in encoded:
        yield batch
        done = _bytes_read(sources) * 10 // max(total, 1)
        if done > tenths:
            tenths = done
            print(f"tokenizing: {10 * done}% of {total} bytes read", file=sys.stderr, flush=True)


def _bytes_read(sources: Sequence[Source]) -> int:
    return sum(source.bytes_read for source in sources)
