"""The command line: exit codes, messages, and what is handed to whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_mergemix.launch
from megatron_mergemix import __version__
from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.errors import ConfigError, SearchError

REPOSITORY = Path(__file__).parents[2]


class Verbs(SimpleNamespace):
    """Stands for the verbs and remembers the calls."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error
        for verb in ("train", "search", "blend", "validate", "run"):
            setattr(self, verb, lambda *arguments, verb=verb: self.call(verb, *arguments))

    def call(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Verbs:
    fake = Verbs()
    monkeypatch.setitem(sys.modules, "megatron_mergemix.launch.verbs", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(megatron_mergemix.launch, "verbs", fake, raising=False)
    return fake


@pytest.mark.parametrize("verb", ["search", "blend", "validate", "run"])
def test_a_stage_gets_the_file_and_the_overrides_in_order(verb: str, verbs: Verbs) -> None:
    assert main([verb, "mix.yaml", "--set", "a.b=1", "--set", "c=2"]) == 0
    assert verbs.calls == [(verb, Path("mix.yaml"), ["a.b=1", "c=2"])]


def test_train_gets_what_is_to_be_trained(verbs: Verbs) -> None:
    assert main(["train", "mix.yaml", "base", "expert:math", "references"]) == 0
    assert verbs.calls == [("train", Path("mix.yaml"), [], ["base", "expert:math", "references"])]


@pytest.mark.parametrize("what", ["expert", "expert:", "bases", "experts:math"])
def test_train_refuses_what_it_does_not_know(
    what: str, verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "mix.yaml", what])
    assert caught.value.code == 2
    assert f"{what!r}, expected base, experts, expert:NAME" in capsys.readouterr().err
    assert verbs.calls == []


def test_an_error_of_ours_is_one_line_and_exit_code_1(
    verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs.error = SearchError("three in a row")
    assert main(["search", "mix.yaml"]) == 1
    assert capsys.readouterr().err == "error: three in a row\n"


@pytest.mark.parametrize(
    "arguments", [["--traceback", "search", "m"], ["search", "m", "--traceback"]]
)
def test_traceback_shows_the_stack(arguments: list[str], verbs: Verbs) -> None:
    verbs.error = SearchError("three in a row")
    with pytest.raises(SearchError):
        main(arguments)


def test_an_error_that_is_not_ours_is_not_hidden(verbs: Verbs) -> None:
    verbs.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["run", "mix.yaml"])


def test_an_interrupt_ends_with_130(verbs: Verbs, capsys: pytest.CaptureFixture[str]) -> None:
    verbs.error = KeyboardInterrupt()
    assert main(["run", "mix.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted; start it again to continue\n"


def test_a_missing_configuration_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path}/none.yaml: No such")


def test_without_a_verb_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "VERB" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mergemix {__version__}\n"


def test_data_has_the_arguments_of_its_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert "--output PREFIX" in capsys.readouterr().out


def test_a_reader_that_leaves_early_ends_it_quietly(tmp_path: Path) -> None:
    # A pipe nobody reads from, and more text than its buffer holds.
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "from megatron_mergemix import cli, template;"
        "template.TEMPLATE *= 100;"
        "sys.exit(cli.main(['init']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (done.returncode, done.stderr) == (1, "")


# ---- init ----


def test_init_writes_a_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mix.yaml"
    assert main(["init", str(path)]) == 0
    assert f"mergemix plan {path}" in capsys.readouterr().out
    config = load_config(path)
    assert list(config.domains) == ["math", "code", "web"]


def test_init_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("mine")
    assert main(["init", str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path} exists already; name another file\n"
    assert path.read_text() == "mine"


def test_init_in_a_missing_folder_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "none" / "mix.yaml")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_init_without_a_path_prints_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init"]) == 0
    path = tmp_path / "mix.yaml"
    path.write_text(capsys.readouterr().out)
    load_config(path)


def test_what_the_template_comments_out_are_the_defaults(tmp_path: Path) -> None:
    """A line ``#key: value`` without a blank is a setting; adding it must change nothing."""
    from megatron_mergemix.template import TEMPLATE

    plain, full = tmp_path / "plain.yaml", tmp_path / "full.yaml"
    plain.write_text(TEMPLATE)
    lines = TEMPLATE.splitlines(keepends=True)
    optional = [line for line in lines if line.lstrip().startswith("#") and "# " not in line[:6]]
    assert len(optional) > 20
    full.write_text(
        "".join(line.replace("#", "", 1) if line in optional else line for line in lines)
    )
    config = load_config(plain)
    assert config.model is not None
    without, given = config.model_dump(), load_config(full).model_dump()
    # Where the default depends on another setting, the template writes the result.
    assert without["model"].pop("num_query_groups") is None
    assert given["model"].pop("num_query_groups") == given["model"]["num_attention_heads"]
    assert without["model"].pop("ffn_hidden_size") is None
    assert given["model"].pop("ffn_hidden_size") == config.model.ffn_width()
    assert without["model"].pop("vocab_size") is None
    assert given["model"].pop("vocab_size") == 257
    assert without["domains"]["web"].pop("max_epochs") is None
    assert given["domains"]["web"].pop("max_epochs") == 4
    assert without["evaluate"]["utility"].pop("weights") == {}
    assert set(given["evaluate"]["utility"].pop("weights").values()) == {1.0}
    assert without == given


def test_the_template_names_every_section(tmp_path: Path) -> None:
    from megatron_mergemix.config import Config
    from megatron_mergemix.template import TEMPLATE

    missing = [name for name in Config.model_fields if f"{name}:" not in TEMPLATE]
    assert missing == ["launched"]  # filled in by the plugin


def test_a_typo_in_an_override_is_shown_as_such(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    main(["init", str(path)])
    with pytest.raises(ConfigError, match=r"^--set search.trails: .* Did you mean trials\?"):
        load_config(path, ["search.trails=3"])
