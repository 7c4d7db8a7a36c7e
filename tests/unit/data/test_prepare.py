"""Text into datasets: what is stored, what is held out, what is refused, what a crash leaves."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mergemix.data import prepare as prepare_module
from megatron_mergemix.data.documents import Options, is_held_out
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.prepare import add_arguments, prepare, run
from megatron_mergemix.data.sidecar import read_sidecar
from megatron_mergemix.data.tokenizers import ByteTokenizer
from megatron_mergemix.errors import BlendError, ConfigError, DataError
from tests.support.tiny_dataset import read_dataset


def jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(prefix: str) -> list[str]:
    return [ByteTokenizer().decode(ids) for ids in read_dataset(prefix)]


def contents(folder: Path, name: str) -> dict[str, bytes]:
    return {ending: (folder / f"{name}{ending}").read_bytes() for ending in (".bin", ".idx")}


# ---- what is stored ----


def test_every_line_becomes_a_document_that_ends_with_eod(tmp_path: Path) -> None:
    prepared = prepare([jsonl(tmp_path / "in.jsonl", ["ab", "\u00e4"])], tmp_path / "out")
    assert read_dataset(prepared.prefix) == [[97, 98, 256], [195, 164, 256]]
    assert IndexedDataset(prepared.prefix).num_documents == 2


def test_without_eod_a_document_is_its_text_alone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["ab"])
    assert read_dataset(prepare([source], tmp_path / "o", Options(append_eod=False)).prefix) == [
        [97, 98]
    ]


def test_another_key_holds_the_text(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "no", "body": "yes"}\n')
    prepared = prepare([source], tmp_path / "out", Options(json_key="body"))
    assert texts_of(prepared.prefix) == ["yes"]


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"one\r\n\r\ntwo\n")
    assert texts_of(prepare([source], tmp_path / "out").prefix) == ["one\r\n\r\ntwo\n"]


def test_blank_lines_separate_paragraph_documents(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"\n\none\n more\n \t\n\ntwo\r\n\r\nthree")
    prepared = prepare([source], tmp_path / "out", Options(txt_documents="paragraph"))
    assert texts_of(prepared.prefix) == ["one\n more", "two", "three"]


def test_files_are_stored_in_the_order_given(tmp_path: Path) -> None:
    first, second = jsonl(tmp_path / "z.jsonl", ["z"]), jsonl(tmp_path / "a.jsonl", ["a"])
    assert texts_of(prepare([first, second], tmp_path / "out").prefix) == ["z", "a"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert texts_of(prepare([source], tmp_path / "out").prefix) == ["a"]


def test_documents_without_text_are_dropped_and_counted_but_blank_lines_are_none(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": ""}\n\n{"text": " \\n"}\n{"text": "a"}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    prepared = prepare([source, empty], tmp_path / "out")
    assert texts_of(prepared.prefix) == ["a"]
    assert prepared.train.dropped_empty == 3


def test_the_sidecar_tells_counts_and_origin(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["ab", "\u00e4", ""])
    prepared = prepare([source], tmp_path / "out")
    assert read_sidecar(prepared.prefix) == prepared.train
    sidecar = prepared.train
    assert (sidecar.documents, sidecar.sequences, sidecar.tokens, sidecar.bytes) == (2, 2, 6, 4)
    assert sidecar.tokenizer == {
        "kind": "byte",
        "path": None,
        "digest": "byte",
        "vocab_size": 257,
        "eod": 256,
    }
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True)
    assert sidecar.sources == [
        {"path": str(source), "bytes": source.stat().st_size, "sha256": digest.stdout.split()[0]}
    ]
    assert sidecar.held_out == {"share": 0.0, "part": "train"}
    assert set(sidecar.versions) == {"megatron_mergemix", "megatron_core", "numpy", "python"}


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(0, 90)))) for _ in range(5300)]
    sources = [jsonl(tmp_path / "a.jsonl", texts[:4500]), jsonl(tmp_path / "b.jsonl", texts[4500:])]
    parts = []
    for workers in (1, 2):
        prepare(sources, tmp_path / f"w{workers}", Options(held_out=0.3, workers=workers))
        parts.append(
            [contents(tmp_path, f"w{workers}{suffix}") for suffix in ("", "_heldout")]
            + [(tmp_path / f"w{workers}.json").read_bytes()]
        )
    assert parts[0] == parts[1]
    dataset = IndexedDataset(str(tmp_path / "w1"))
    assert dataset.num_documents > 3000


# ---- held out ----


def test_held_out_documents_and_their_duplicates_are_never_trained_on(tmp_path: Path) -> None:
    texts = [f"document {index % 300}" + " " * (index // 300) for index in range(900)]
    prepared = prepare(
        [jsonl(tmp_path / "in.jsonl", texts)], tmp_path / "out", Options(held_out=0.2)
    )
    train = {text.strip() for text in texts_of(prepared.prefix)}
    held_out = {text.strip() for text in texts_of(f"{prepared.prefix}_heldout")}
    assert not train & held_out
    assert train | held_out == {text.strip() for text in texts}
    # 60 expected of 300, standard deviation 7.
    assert 32 < len(held_out) < 88
    assert prepared.held_out is not None
    assert prepared.held_out.documents + prepared.train.documents == 900
    assert prepared.held_out.held_out == {"share": 0.2, "part": "heldout"}


@given(st.text(alphabet=st.characters(codec="utf-8")), st.floats(0, 1), st.floats(0, 1))
def test_what_a_small_share_holds_out_a_larger_one_holds_out_too(
    text: str, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    assert is_held_out(text, small) <= is_held_out(text, large)
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)


def test_a_share_that_holds_out_nothing_is_an_error(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(DataError, match=r"no document is left for out_heldout \(held-out share 1e"):
        prepare([source], tmp_path / "out", Options(held_out=1e-9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_input_without_any_text_is_an_error(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["", " "])
    with pytest.raises(DataError, match="no document is left for out .* 2 documents without text"):
        prepare([source], tmp_path / "out")


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_held_out_share_that_is_none_is_refused(tmp_path: Path, share: float) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(DataError, match="expected 0 <= share < 1"):
        prepare([source], tmp_path / "out", Options(held_out=share))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "no JSON: "),
        (b'["text"]', "a JSON list, expected an object with key 'text'"),
        (b'{"body": "x", "id": 1}', "no key 'text'; the object has 'body', 'id'"),
        (b'{"text": 5}', "'text' is a int, expected a string"),
        (b'{"text": null}', "'text' is a NoneType, expected a string"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "byte 10 is 0xff, no UTF-8 text"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: bytes, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        prepare([source], tmp_path / "out")
    assert str(caught.value).startswith(f"{source}, line 3: ")
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_bad_line_in_a_worker_is_the_same_error(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a" * 100] * 5000)
    with source.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"in\.jsonl, line 5001: no JSON"):
        prepare([source], tmp_path / "out", Options(workers=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_missing_unknown_and_repeated_inputs_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "in.csv").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(source)
    for inputs, message in (
        ([tmp_path / "no.jsonl"], r"no\.jsonl is no file"),
        ([tmp_path / "folder"], "folder is no file"),
        ([tmp_path / "in.csv"], r"ends with '\.csv', expected \.jsonl or \.txt"),
        ([source, tmp_path / "link.jsonl"], r"link\.jsonl is given twice"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(inputs, tmp_path / "out")


def test_an_output_that_no_blend_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BlendError, match="white space"):
        prepare([jsonl(tmp_path / "in.jsonl", ["a"])], tmp_path / "my data")


def test_an_existing_dataset_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    first, second = jsonl(tmp_path / "a.jsonl", ["a"]), jsonl(tmp_path / "b.jsonl", ["b"])
    prefix = prepare([first], tmp_path / "out").prefix
    with pytest.raises(DataError, match=r"out\.bin.* exists already.*--overwrite"):
        prepare([second], prefix)
    assert texts_of(prefix) == ["a"]
    prepare([second], prefix, Options(overwrite=True))
    assert texts_of(prefix) == ["b"]


def test_overwriting_removes_a_held_out_part_that_is_trained_on_now(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [f"document {index}" for index in range(50)])
    prefix = prepare([source], tmp_path / "out", Options(held_out=0.3)).prefix
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(DataError, match="exists already"):
        prepare([source], prefix)
    prepare([source], prefix, Options(overwrite=True))
    assert IndexedDataset(prefix).num_documents == 50
    assert not list(tmp_path.glob("out_heldout*"))


def test_a_json_file_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "out.json").write_text('{"text": "precious"}')
    with pytest.raises(DataError, match=r"out\.json would be replaced, but was not written by"):
        prepare([source], tmp_path / "out", Options(overwrite=True))
    assert (tmp_path / "out.json").read_text() == '{"text": "precious"}'


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"cannot read or write .*file: "):
        prepare([jsonl(tmp_path / "in.jsonl", ["a"])], tmp_path / "file" / "out")


# ---- crashes ----


def test_a_failure_while_publishing_leaves_no_index_of_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file that moves: either the index is missing, or the dataset is the new one."""
    old = jsonl(tmp_path / "old.jsonl", [f"old {index}" for index in range(40)])
    new = jsonl(tmp_path / "new.jsonl", [f"newer {index}" for index in range(40)])
    prefix = prepare([old], tmp_path / "out", Options(held_out=0.3)).prefix
    replace = os.replace
    for survivors in range(6):
        moved = 0

        def failing(source: Path, target: str, allowed: int = survivors) -> None:
            nonlocal moved
            if moved == allowed:
                raise KeyboardInterrupt
            moved += 1
            replace(source, target)

        monkeypatch.setattr(prepare_module.os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare([new], prefix, Options(held_out=0.3, overwrite=True))
        monkeypatch.setattr(prepare_module.os, "replace", replace)
        assert not Path(f"{prefix}.idx").exists()
        if Path(f"{prefix}_heldout.idx").exists():
            assert texts_of(f"{prefix}_heldout")[0].startswith("newer")
    prepare([new], prefix, Options(held_out=0.3, overwrite=True))
    assert len(texts_of(prefix)) + len(texts_of(f"{prefix}_heldout")) == 40


def test_a_killed_run_publishes_nothing_and_leaves_no_worker_behind(tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", ["x" * 1000] * 30000)
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out", "--workers", "2"]
    code = "from megatron_mergemix.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "data", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # Progress means that the workers are past their start and wait for more work.
    assert any(line.startswith("tokenizing: ") for line in process.stderr)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = [
        child
        for child in children.split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        if time.monotonic() > deadline:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(worker), signal.SIGKILL)
            pytest.fail("a worker outlived its parent")
        time.sleep(0.05)
    assert not list(tmp_path.glob("out*"))


def test_the_leftovers_of_a_killed_run_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leftover = tmp_path / ".out.somehost.4711.building"
    leftover.mkdir()
    prepare([jsonl(tmp_path / "in.jsonl", ["a"])], tmp_path / "out")
    assert f"note: {leftover} is from another or a killed run" in capsys.readouterr().err
    assert leftover.exists()


# ---- sentences ----


ENGLISH = "Dr. Smith went home.  He slept!\nWas it e.g. late? Yes"


def test_without_nltk_data_splitting_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ConfigError, match=r"Punkt data for 'english'.*nltk\.downloader punkt_tab"):
        prepare([source], tmp_path / "out", Options(split_sentences="english"))


def test_without_nltk_splitting_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ConfigError, match=r"pip install 'megatron-mergemix\[nltk\]'"):
        prepare([source], tmp_path / "out", Options(split_sentences="english"))


def test_sentences_become_sequences_of_their_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NLTK's own format of Punkt data, for a model that knows two abbreviations."""
    import nltk
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    parameters = PunktParameters()
    parameters.abbrev_types.update({"dr", "e.g"})
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    save_punkt_params(parameters, str(folder))

    source = jsonl(tmp_path / "in.jsonl", [ENGLISH, "  One."])
    prepared = prepare([source], tmp_path / "out", Options(split_sentences="english"))
    assert texts_of(prepared.prefix) == [
        "Dr. Smith went home.  ",
        "He slept!\n",
        "Was it e.g. late? ",
        "Yes",
        "  One.",
    ]
    assert [ids[-1] == 256 for ids in read_dataset(prepared.prefix)] == [False] * 3 + [True, True]
    assert (prepared.train.documents, prepared.train.sequences) == (2, 5)
    assert prepared.train.split_sentences
    assert prepared.train.bytes == len(ENGLISH) + len("  One.")


# ---- the command ----


def command(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_passes_every_option_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("\n\n".join(f"paragraph {index}" for index in range(40)) + "\n\n\ufeff\n")
    line = tmp_path / "in.jsonl"
    line.write_text('{"body": "from json"}\n{"body": ""}\n')
    prefix = tmp_path / "deep" / "out"
    flags = "--txt-documents paragraph --json-key body --held-out 0.5 --no-append-eod --workers 2"
    command(source, line, "--output", prefix, *flags.split())
    train, held_out = texts_of(str(prefix)), texts_of(f"{prefix}_heldout")
    assert len(train) + len(held_out) == 41
    assert {"from json", "paragraph 0"} <= {*train, *held_out}
    printed = capsys.readouterr().out.splitlines()
    tokens = sum(map(len, train))
    assert (
        printed[0] == f"{prefix}: {len(train)} documents, {tokens} tokens, {tokens} bytes of text"
    )
    assert printed[1].startswith(f"{prefix}_heldout: {len(held_out)} documents")
    assert printed[2] == "dropped 2 documents without text"
    with pytest.raises(DataError, match="exists already"):
        command(line, "--output", prefix, "--json-key", "body")
    command(line, "--output", prefix, "--json-key", "body", "--overwrite")
    assert read_dataset(str(prefix)) == [[*b"from json", 256]]


def test_a_tokenizer_that_is_not_byte_is_a_folder(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ConfigError, match="gpt2 is no folder"):
        command(source, "--output", tmp_path / "out", "--tokenizer", "gpt2")


def test_building_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from megatron_mergemix.data import prepare; "
        "prepare.add_arguments(argparse.ArgumentParser()); "
        "print([n for n in ('numpy', 'torch', 'megatron', 'pydantic', 'rich') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
