"""The journal: what goes in comes out, and what a crash or a mistake can do to it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.errors import SearchError
from megatron_mergemix.search.journal import Journal, read_journal
from megatron_mergemix.trials import Gradient, Minibatch, Score, Trial

DIGESTS = {"base": "aa", "tasks.math": "bb"}


def trial(index: int, value: float = 0.1) -> Trial:
    scores = {"math": {"loss": Score(value, value / 7, 128, "nats/token", False)}}
    slopes = {"math": {"loss": {"math": -value, "code": 1e-300}}}
    return Trial(
        index=index,
        purpose="lattice",
        mixture={"math": value, "code": 1 - value},
        merge_weights={"math": 1 / 3, "code": 2 / 3},
        scores=scores,
        gradient=Gradient(Minibatch(index, 0.25, 3, ("math", "web")), scores, slopes),
        task_vector_norm=math.pi,
        seconds={"merge": 0.001, "evaluate": 1e9},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search" / "trials.jsonl"


def filled(path: Path, count: int) -> list[Trial]:
    journal = Journal(path, DIGESTS)
    for index in range(count):
        journal.append(trial(index, 0.1 + 0.2 * index))
    return journal.trials()


def test_a_new_journal_is_empty_and_its_header_is_on_the_disk(path: Path) -> None:
    assert Journal(path, DIGESTS).trials() == []
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["header"] == {"version": 1, "digests": DIGESTS}


def test_lines_without_a_gradient_are_read_as_they_were_written_before_there_were_any(
    path: Path,
) -> None:
    line = (
        b'"trial": {"index": 0, "purpose": "base", "mixture": {}, "merge_weights": {"math": 0.0}, '
        b'"scores": {}, "gradient": null, "task_vector_norm": 0.0, "seconds": {}, "error": null}}'
    )
    payload = line.split(b": ", 1)[1][:-1]
    Journal(path, DIGESTS)
    with path.open("ab") as file:
        file.write(b'{"crc32": "%08x", ' % zlib.crc32(payload) + line + b"\n")
    assert read_journal(path)[1] == [Trial(0, "base", {}, {"math": 0.0}, {}, None, 0.0)]


def test_trials_come_back_equal_and_in_order(path: Path) -> None:
    written = filled(path, 3)
    failed = Trial(7, "verify:argmax", {}, {}, {}, error="out of memory: \u00fc\n2nd line")
    Journal(path, DIGESTS).append(failed)
    assert Journal(path, DIGESTS).trials() == [*written, failed]
    assert read_journal(path) == (DIGESTS, [*written, failed])
    assert len(path.read_bytes().splitlines()) == 5


def test_a_trial_on_a_first_share_says_so(path: Path) -> None:
    partial = replace(trial(0), first=0.25)
    Journal(path, DIGESTS).append(partial)
    assert read_journal(path)[1] == [partial]
    assert trial(0).first is None


@settings(max_examples=50, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_round_trips_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    path = tmp_path_factory.mktemp("j") / "t.jsonl"
    Journal(path, {}).append(trial(0, value))
    (back,) = Journal(path, {}).trials()
    assert back.mixture["math"].hex() == value.hex()
    assert back.scores["math"]["loss"].value.hex() == value.hex()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(
    path: Path, value: float
) -> None:
    journal = Journal(path, DIGESTS)
    before = path.read_bytes()
    with pytest.raises(SearchError, match=r"trial 0 cannot be recorded: .*a trial with an error"):
        journal.append(trial(0, value))
    assert path.read_bytes() == before
    assert journal.trials() == []


def test_an_index_is_used_once(path: Path) -> None:
    filled(path, 2)
    with pytest.raises(SearchError, match="already has a trial 1"):
        Journal(path, DIGESTS).append(trial(1))


def test_an_index_that_stands_twice_in_the_file_is_an_error_with_both_lines(path: Path) -> None:
    filled(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(SearchError, match=r"lines 2 and 4: both hold trial 0"):
        Journal(path, DIGESTS)


def test_other_digests_are_refused_naming_exactly_what_changed(path: Path) -> None:
    filled(path, 1)
    before = path.read_bytes()
    with pytest.raises(SearchError) as caught:
        Journal(path, {"base": "aa", "tasks.math": "cc", "tasks.code": "dd"})
    assert "something else: tasks.code: (absent) -> dd; tasks.math: bb -> cc. " in str(caught.value)
    assert "use another run_dir" in str(caught.value)
    assert path.read_bytes() == before


def test_another_format_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mergemix.search.journal.FORMAT_VERSION", 2)
    filled(path, 1)
    monkeypatch.undo()
    with pytest.raises(SearchError, match="has format version 2, expected 1"):
        Journal(path, DIGESTS)


# ---- damage ----


def test_a_last_line_cut_at_any_byte_costs_that_trial_only(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = filled(path, 3)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path, DIGESTS)
        assert journal.trials() == kept[:2]
        assert path.stat().st_size == cut, "reading must not change the file"
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            journal.append(kept[2])
        assert path.read_bytes() == whole
        assert len(caplog.records) == (1 if cut > start else 0)


def test_a_header_cut_at_any_byte_counts_as_an_empty_journal(path: Path) -> None:
    Journal(path, DIGESTS)
    header = path.read_bytes()
    for cut in range(len(header)):
        path.write_bytes(header[:cut])
        journal = Journal(path, DIGESTS)
        assert journal.trials() == []
        assert path.read_bytes() == header
    path.write_bytes(header[:-1])
    assert read_journal(path) == ({}, [])


def test_a_flipped_bit_anywhere_is_an_error_that_names_the_line(path: Path) -> None:
    filled(path, 3)
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for place in range(len(whole) - 1):
        line = 1 + sum(end < place for end in ends)
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        with pytest.raises(SearchError, match=rf", line {line} is damaged"):
            Journal(path, DIGESTS)


def test_a_flipped_last_newline_counts_as_a_torn_line(path: Path) -> None:
    kept = filled(path, 2)
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    assert Journal(path, DIGESTS).trials() == kept[:1]


def test_a_line_missing_in_the_middle_of_a_trial_is_an_error(path: Path) -> None:
    filled(path, 3)
    whole = path.read_bytes()
    third = whole.splitlines()[2]
    path.write_bytes(whole.replace(third, third[:40]))
    with pytest.raises(SearchError, match="line 3 is damaged"):
        Journal(path, DIGESTS)


def test_blocks_of_zeros_at_the_end_are_a_torn_line(path: Path) -> None:
    """A power failure may leave the length of a file without its content."""
    kept = filled(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    journal = Journal(path, DIGESTS)
    journal.append(trial(5))
    assert journal.trials()[:2] == kept
    assert path.read_bytes().startswith(whole + b'{"crc32"')


def test_a_file_that_is_no_journal_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("my thesis, no newline at end")
    with pytest.raises(SearchError, match="is not a journal"):
        Journal(path, DIGESTS)
    assert path.read_text() == "my thesis, no newline at end"


def test_a_missing_journal_cannot_be_read(path: Path) -> None:
    with pytest.raises(SearchError, match="there is no journal"):
        read_journal(path)


# ---- writers ----


def test_a_second_writer_is_noticed_and_loses_nothing_of_the_first(path: Path) -> None:
    first = Journal(path, DIGESTS)
    second = Journal(path, DIGESTS)
    first.append(trial(0))
    with pytest.raises(SearchError, match="another process writes to it"):
        second.append(trial(0, 0.9))
    first.append(trial(1))
    assert Journal(path, DIGESTS).trials() == [trial(0), trial(1)]


def test_a_line_written_while_we_waited_for_the_file_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Journal(path, DIGESTS), Journal(path, DIGESTS)

    def wait_for_the_other(file: int, operation: int) -> None:
        monkeypatch.undo()
        second.append(trial(1))

    monkeypatch.setattr("megatron_mergemix.search.journal.fcntl.flock", wait_for_the_other)
    with pytest.raises(SearchError, match="another process writes to it"):
        first.append(trial(0))
    assert Journal(path, DIGESTS).trials() == [trial(1)]


WRITER = """
import sys
from pathlib import Path
from megatron_mergemix.errors import SearchError
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.trials import Trial
path, start = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for index in range(start, start + 200):
    while True:
        try:
            Journal(path, {"base": "aa"}).append(Trial(index, "x" * 500, {}, {}, {}))
            break
        except SearchError as error:
            assert "another process" in str(error), error
"""


def test_two_processes_that_write_at_once_never_damage_a_line(path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for start in (0, 1000)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    indices = {trial.index for trial in Journal(path, {"base": "aa"}).trials()}
    assert indices == {*range(200), *range(1000, 1200)}


ENDLESS = """
import sys
from pathlib import Path
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.trials import Trial
journal = Journal(Path(sys.argv[1]), {})
for index in range(10**9):
    journal.append(Trial(index, "x" * 5000, {}, {}, {}))
    print(index, flush=True)
"""


def test_every_trial_that_was_reported_survives_kill_9(path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(20):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    reported = 19 + len(writer.stdout.read().split())
    writer.wait()
    writer.stdout.close()
    found = [trial.index for trial in Journal(path, {}).trials()]
    assert found == list(range(len(found)))
    assert len(found) in (reported + 1, reported + 2)


def test_a_full_disk_leaves_the_journal_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, DIGESTS)
    journal.append(trial(0))
    whole = path.read_bytes()
    write = os.write

    def half(file: int, line: bytes) -> int:
        return write(file, line[: len(line) // 2])

    def none(file: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken, text in ((half, r"only \d+ of \d+ bytes fitted"), (none, "No space left")):
        monkeypatch.setattr("megatron_mergemix.search.journal.os.write", broken)
        with pytest.raises(SearchError, match=text):
            journal.append(trial(1))
        assert path.read_bytes() == whole
    monkeypatch.undo()
    journal.append(trial(1))
    assert Journal(path, DIGESTS).trials() == [trial(0), trial(1)]


def test_a_journal_that_was_removed_is_not_silently_started_anew(path: Path) -> None:
    journal = Journal(path, DIGESTS)
    path.unlink()
    with pytest.raises(SearchError, match="cannot write .*No such file"):
        journal.append(trial(0))
    assert not path.exists()


def test_an_append_returns_only_when_the_line_is_on_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path, DIGESTS)
    sizes: list[int] = []
    fsync = os.fsync

    def watched(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        fsync(file)

    monkeypatch.setattr("megatron_mergemix.search.journal.os.fsync", watched)
    journal.append(trial(0))
    assert sizes == [path.stat().st_size]


def test_a_line_with_fields_of_another_version_is_an_error(path: Path) -> None:
    from megatron_mergemix.search.journal import _encode

    filled(path, 1)
    with path.open("ab") as file:
        file.write(_encode("trial", {"index": 1, "scores": {}, "colour": "red"}))
    with pytest.raises(SearchError, match=r"line 3 has other fields than this version .*colour"):
        Journal(path, DIGESTS)


def test_a_journal_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "search").write_text("")
    with pytest.raises(SearchError, match="cannot make .*search: File exists"):
        Journal(tmp_path / "search" / "trials.jsonl", {})
    with pytest.raises(SearchError, match="cannot read .*: Is a directory"):
        Journal(tmp_path, {})
