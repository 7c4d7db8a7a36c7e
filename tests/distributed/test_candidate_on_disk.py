"""What a command gets is the model that is resident, bit for bit, also where ranks share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.run_distributed import run_distributed

WEIGHTS = {"math": 1.3, "code": -0.4, "prose": 0.1}


def both(config_path: Path, home: Path) -> dict[str, Any]:
    """Return scores of merges in place, and of the same written, loaded and scored."""
    from megatron.core import parallel_state

    from megatron_mergemix.config import load_config
    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.evaluate.scratch import Scratch
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size
    from megatron_mergemix.processes.distributed import from_rank_0
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config = load_config(config_path)
    parallel.start(config.parallel)
    assert config.model is not None
    chunks = build_model(config, vocab_size(config), seed=3)
    evaluator = make_evaluator(config, config.model.padded_vocab(vocab_size(config)))
    proxy = ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
    found: dict[str, Any] = {}
    kept = home / "kept"
    for name, weights in (("base", {}), ("merge", WEIGHTS)):
        proxy.apply(weights)
        found[f"{name} resident"] = evaluator.evaluate(proxy)
        merged = proxy.merged_from

        def write(name=name, merged=merged) -> None:
            (home / name).mkdir()
            with Scratch(home / "run", home / "disk", home / name).holding(merged) as folder:
                (folder / "candidate").rename(kept.with_suffix(f".{name}"))

        from_rank_0(write)
        found[f"{name} still"] = evaluator.evaluate(proxy)
    for name in ("base", "merge"):
        folder = kept.with_suffix(f".{name}") / "release"
        found[f"{name} written"] = evaluator.evaluate(ResidentProxy(chunks, folder, {}))
    parallel_state.destroy_model_parallel()
    return found


def test_a_written_candidate_is_the_resident_one(trained_experiment: Path, tmp_path: Path) -> None:
    first, second = run_distributed(both, 2, trained_experiment, tmp_path)
    assert first == second
    for name in ("base", "merge"):
        assert first[f"{name} written"] == first[f"{name} resident"] == first[f"{name} still"]
    assert first["base resident"] != first["merge resident"]
