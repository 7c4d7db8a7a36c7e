"""Stages in ``pretrain_mamba.py``, which from 0.18 on runs ``pretrain_hybrid.py``.

The model is one of attention and MLP layers: layers of Mamba itself need CUDA kernels.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.training_runs.experiment_runs import expert_run
from tests.support.megatron_lm import each_checkout
from tests.support.plugin import MODEL, TP2, Launches
from tests.support.weights import read_weights

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
# Not as tests.support.local_hybrid_spec: a Megatron-LM checkout has a package of that name.
SPEC = ("--spec", "local_hybrid_spec", "stack_spec", "--hybrid-override-pattern", "*-")


@each_checkout()
def test_a_hybrid_expert_is_trained_and_scores_the_same_under_every_layout(
    checkout: Path, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "support")])
    hybrid = Launches(
        checkout,
        tmp_path,
        model=(*(word for word in MODEL if word != "--swiglu"), "--squared-relu", *SPEC),
        script="pretrain_mamba.py",
        environment={"PYTHONPATH": path},
    )
    hybrid.write()
    done = hybrid.stage("expert", *TP2, ranks=2, expert="math")
    assert done.returncode == 0, done.stdout
    expert = expert_run(hybrid.settings(), "math").final_checkpoint()
    base, trained = read_weights(tmp_path / "base" / "iter_0000004"), read_weights(expert)
    assert any("layers.1.mlp" in name for name in base), base.keys()
    assert all(not np.array_equal(trained[name], weight) for name, weight in base.items())
    scores = []
    for layout, ranks in ((TP2, 2), ((), 1)):
        flag = ("--mergemix-checkpoint", str(expert))
        done = hybrid.stage("evaluate", *layout, *flag, ranks=ranks)
        assert done.returncode == 0, done.stdout
        (record,) = (hybrid.run_dir / "evaluate").glob("*.json")
        measured = json.loads(record.read_text())["scores"]
        scores.append([measured[name]["loss"]["value"] for name in measured])
        record.unlink()
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
