"""What experts and references learn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import SearchError
from megatron_mergemix.training_runs.mixtures import (
    assumed_components,
    component_matrix,
    named_mixture,
    reference_mixture,
    train_tokens,
)
from tests.support.untrained import COMPONENTS, TOKENS, given, with_base


def test_rows_of_the_matrix_are_the_experts(config_path: Path) -> None:
    config = with_base(config_path, "experts.general_mixture=proportional")
    expected = 0.75 * np.eye(3) + 0.25 * np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(component_matrix(config), expected, atol=1e-12)


def test_what_given_experts_learned_is_said_or_called_an_assumption(config_path: Path) -> None:
    experts = {name: str(given(config_path, name, 2.0)) for name in TOKENS}
    told = f"experts.checkpoints={experts}"
    note = assumed_components(with_base(config_path, told))
    assert note is not None
    assert "experts.general_share: 0.25 (of uniform)" in note
    assert assumed_components(with_base(config_path, told, "experts.general_share=0.25")) is None
    assert assumed_components(with_base(config_path)) is None
    rows = {name: str(given(config_path, name, 2.0)) for name in ("algebra", "code", "web", "all")}
    told = f"experts.checkpoints={rows}"
    assert (
        assumed_components(with_base(config_path, told, f"experts.components={COMPONENTS}")) is None
    )


def test_named_mixtures_are_completed(config_path: Path) -> None:
    config = load_config(config_path)
    assert train_tokens(config) == TOKENS
    assert named_mixture(config, "proportional") == pytest.approx(
        {"math": 0.6, "code": 0.3, "web": 0.1}
    )
    assert named_mixture(config, {"code": 1.0}) == {"math": 0.0, "code": 1.0, "web": 0.0}


def test_the_learned_reference_needs_a_result(config_path: Path) -> None:
    config = load_config(config_path)
    with pytest.raises(SearchError, match="Run `mergemix search mix.yaml` first"):
        reference_mixture(config, "learned")
    result = config.run_dir / "search" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"mixture": {"math": 0.5, "code": 0.25, "web": 0.25}}))
    assert reference_mixture(config, "learned") == {"math": 0.5, "code": 0.25, "web": 0.25}
