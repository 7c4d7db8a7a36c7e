from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron_lm.mixture_flag import with_reference


def config() -> Config:
    domains = {name: {"prefixes": [f"/data/{name}"]} for name in ("math", "code", "web")}
    return Config.model_validate(
        {
            "run_dir": "run",
            "base": {"checkpoint": "/base"},
            "domains": domains,
            "evaluate": {"capabilities": {"web": {"loss": {"prefixes": ["/data/heldout"]}}}},
            "launch": {"kind": "command"},
        }
    )


def test_a_named_reference_is_taken_as_it_is() -> None:
    settings = config()
    assert with_reference("uniform", settings) == ("uniform", settings)


def test_shares_become_a_reference_of_that_name() -> None:
    name, settings = with_reference("math=0.25, web=0.75", config())
    assert Path(name).name == name == "math_0_25-web_0_75"
    assert settings.references[name] == {"math": 0.25, "code": 0.0, "web": 0.75}
    assert "uniform" in settings.references


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrom", "is 'unifrom', expected one of learned, uniform, proportional or shares"),
        ("math=0.5,codex=0.5", "'codex' is no domain; domains: math, code, web"),
        ("math=0.5,math=0.5", "'math' is there twice"),
        ("math=0.5,code=0.4", "sum to 0.9, expected 1"),
        ("math=half,code=0.5", "'half' is no share"),
        ("math=-1,code=2", "'-1' is no share"),
        ("math=nan,code=1", "'nan' is no share"),
    ],
)
def test_what_is_no_mixture_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_reference(text, config())
