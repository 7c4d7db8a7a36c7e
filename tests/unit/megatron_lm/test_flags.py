from __future__ import annotations

import argparse

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron_lm.flags import add_flags, stage_of


def parse(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *words])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return parser.parse_known_args()[0]


def test_without_a_stage_it_is_the_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage_of(parse(monkeypatch, "--mergemix-config", "mix.yaml")) == "train"


def test_stage_and_expert_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEMIX_STAGE", "expert")
    monkeypatch.setenv("MERGEMIX_EXPERT", "math")
    args = parse(monkeypatch, "--mergemix-config", "mix.yaml")
    assert (stage_of(args), args.mergemix_expert) == ("expert", "math")
    args = parse(monkeypatch, "--mergemix-stage", "search")  # the flag wins
    assert stage_of(args) == "search"


def test_a_yaml_of_megatron_is_refused_because_it_drops_the_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="does not work with --yaml-cfg"):
        parse(monkeypatch, "--mergemix-config=mix.yaml", "--yaml-cfg", "model.yaml")
    parse(monkeypatch, "--yaml-cfg", "model.yaml")  # none of our business


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mergemix-stage", "serach"], "is 'serach', expected train, expert, search"),
        (["--mergemix-stage", "expert"], "the stage expert needs --mergemix-expert"),
        (["--mergemix-stage", "reference"], "the stage reference needs --mergemix-mixture"),
        (
            ["--mergemix-stage", "search", "--mergemix-expert", "math"],
            "--mergemix-expert means nothing in the stage search",
        ),
        (
            ["--mergemix-stage=expert", "--mergemix-expert=a", "--mergemix-blend=b"],
            "--mergemix-blend means nothing in the stage expert",
        ),
    ],
)
def test_flags_that_do_not_fit_the_stage_are_refused(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_of(parse(monkeypatch, *words))
