"""Which mixtures an experiment asks for, and what stands for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.experiment.strategy import make_strategy, merge_weights_of
from megatron_mergemix.training_runs.mixtures import component_matrix
from tests.support.untrained import (
    TOKENS,
    with_components,
    with_experts,
)


def test_merge_weights_are_of_experts_and_stand_for_the_mixture_of_domains(
    config_path: Path,
) -> None:
    config = with_components(config_path)
    merge_weights = merge_weights_of(config)
    assert merge_weights({}) == dict.fromkeys(config.expert_names, 0.0)
    for mixture in ({"math": 1.0}, {"code": 0.25, "web": 0.75}):
        alpha = merge_weights(mixture)
        assert list(alpha) == ["algebra", "code", "web", "all"]
        reached = np.array(list(alpha.values())) @ component_matrix(config)
        assert reached == pytest.approx([mixture.get(name, 0.0) for name in TOKENS], abs=1e-9)
    assert min(merge_weights({"math": 1.0}).values()) < -0.1


def test_bounds_priors_and_vertices_are_of_mixtures_whatever_the_components(
    config_path: Path,
) -> None:
    bounds = "domains.web.bounds=[0.1, 0.5]"
    plain, own = (
        make_strategy(with_them(config_path, bounds)).ask()
        for with_them in (with_experts, with_components)
    )
    assert plain == own
    assert {proposal.purpose for proposal in own} >= {"vertex", "prior:uniform"}
    assert all(set(proposal.mixture) <= set(TOKENS) for proposal in own)


def test_the_strategy_knows_domains_bounds_and_proportions(config_path: Path) -> None:
    strategy = make_strategy(with_experts(config_path, "domains.web.max_epochs=2"))
    asked = {proposal.purpose: proposal.mixture for proposal in reversed(strategy.ask())}
    assert asked["base"] == {}
    # 100 of 1000 tokens belong to web; proportional to tokens gives it less than its limit of 0.2.
    assert asked["prior:proportional"] == pytest.approx({"math": 0.6, "code": 0.3, "web": 0.1})
    assert max(p.mixture.get("web", 0.0) for p in strategy.ask()) == pytest.approx(0.2)


def test_too_few_trials_for_the_domains_are_refused(config_path: Path) -> None:
    with pytest.raises(ConfigError, match="search.trials is 3"):
        make_strategy(with_experts(config_path, "search.trials=3"))
