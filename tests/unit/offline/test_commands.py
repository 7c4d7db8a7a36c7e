"""``mergemix merge``, ``average`` and ``inspect`` as a user calls them."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.offline.average import save_weights
from tests.support.checkpoint_family import random_model, write_family, write_save
from tests.support.untrained import with_experts, write_config
from tests.support.weights import read_weights

NORM = "decoder.final_layernorm.weight"


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return write_family(tmp_path / "in")[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


def test_merge_takes_paths_and_weights(family, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    experts = [f"--expert={family['a']}=0.25", f"--expert={family['b']}=0.75"]
    assert main(["merge", f"--base={family['base']}", *experts, f"--output={out}"]) == 0
    assert f"--load {out} --finetune" in capsys.readouterr().out
    a, b = (read_weights(family[name])[NORM] for name in ("a", "b"))
    merged = read_weights(out / "release")[NORM]
    np.testing.assert_allclose(merged, 0.25 * a + 0.75 * b, rtol=2**-8)
    names = json.loads((out / "mergemix.json").read_text())["experts"]
    assert list(names) == ["a/iter_0000003", "b/iter_0000003"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--expert={a}=0.5"], "sum to 0.5"),
        (["--expert={a}=-1", "--expert={b}=2", "--method=slerp"], "none below 0"),
        (["--expert={a}=1", "--density=0.5"], "--density is not for linear"),
        (["--expert={a}=1", "--scale=2"], "--scale is not for linear"),
        (["--expert={a}=1", "--method=ties", "--density=0"], "more than 0"),
        (["--expert={a}=1", "--alpha", "math=1"], "need --config"),
        (["--expert={a}=0.5", "--expert={a}=0.5"], "named twice"),
        ([], "--expert PATH=WEIGHT"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    family, tmp_path, capsys, arguments, expected
) -> None:
    filled = [text.format(**family) for text in arguments]
    out = tmp_path / "out"
    message = refused(capsys, "merge", f"--base={family['base']}", f"--output={out}", *filled)
    assert expected in message
    assert not out.exists()


@pytest.mark.parametrize("text", ["nan", "inf", "x", ""])
def test_a_weight_that_is_no_number_is_refused_at_once(capsys, text) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--base=x", f"--expert=y={text}", "--output=z"])
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["uniform", "linear", "minus-sqrt"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_of_saves_sum_to_one(kind, count) -> None:
    assert sum(save_weights(kind, count)) == pytest.approx(1, abs=1e-12)


def test_minus_sqrt_weighs_gradients_like_that_decay() -> None:
    weights = save_weights("minus-sqrt", 4)
    after = [sum(weights[j:]) for j in range(4)]  # gradients after save j - 1
    assert after == pytest.approx([1 - (j / 4) ** 0.5 for j in range(4)])
    assert save_weights("linear", 3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    """Four saves, 80 tokens apart."""
    root = tmp_path / "run"
    for step in range(1, 5):
        args = argparse.Namespace(seq_length=8, consumed_train_samples=10 * step)
        write_save(root / f"iter_{step:07d}", random_model(step), args=args)
    (root / "latest_checkpointed_iteration.txt").write_text("4")
    return root


@pytest.mark.parametrize("which", [["--last", "3"], ["--tokens", "161"], ["--tokens", "240"]])
def test_average_takes_the_last_saves(run_root, tmp_path, which) -> None:
    assert main(["average", str(run_root), *which, f"--output={tmp_path / 'out'}"]) == 0
    mean = sum(read_weights(run_root / f"iter_{step:07d}")[NORM] for step in (2, 3, 4)) / 3
    merged = read_weights(tmp_path / "out" / "release")[NORM]
    np.testing.assert_allclose(merged, mean, rtol=2**-8, atol=1e-6)


def test_average_of_more_saves_than_there_are_is_refused(run_root, tmp_path, capsys) -> None:
    message = refused(capsys, "average", str(run_root), "--last=5", f"--output={tmp_path / 'o'}")
    assert "has 4 complete saves" in message


def test_inspect_tells_model_from_optimizer(family, capsys) -> None:
    assert main(["inspect", str(family["a"]), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert found["layout"] == "common.pt"
    assert found["iteration"] == 3
    assert found["parameters"] == 16 * 6 + 120 + 120 + 36 + 6
    assert found["model"]["bytes_by_dtype"] == {"bfloat16": 2 * found["parameters"]}
    assert found["optimizer_and_rest"]["bytes"] == 24
    assert found["bytes_entries"] == {"model": 2, "rest": 1}
    assert found["tensors"][NORM] == {"shape": [6], "dtype": "bfloat16", "chunks": 1}


def test_inspect_compares_experts_with_their_base(family, capsys) -> None:
    paths = [str(family[name]) for name in ("base", "a", "b")]
    assert main(["inspect", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["differences"]
    weights = [read_weights(family[name]) for name in ("base", "a", "b")]
    flat = [np.concatenate([model[name].ravel() for name in sorted(model)]) for model in weights]
    base, *experts = flat
    deltas = [expert - base for expert in experts]
    norms = [np.linalg.norm(delta) for delta in deltas]
    assert [n["all"] for n in found["norms"]] == pytest.approx(norms)
    cosine = deltas[0] @ deltas[1] / norms[0] / norms[1]
    assert found["cosines"][0][1] == found["cosines"][1][0] == pytest.approx(cosine)
    for expert, delta, update in zip(experts, deltas, found["delta"], strict=True):
        size = np.abs(expert).sum() + np.abs(base).sum()
        assert update == pytest.approx(np.abs(delta).sum() / size)
    assert found["norms"][0]["MoE router"] == pytest.approx(
        np.linalg.norm(
            weights[1]["decoder.layers.mlp.router.weight"]
            - weights[0]["decoder.layers.mlp.router.weight"]
        )
    )


def test_inspect_prints_tables_for_people(family, capsys) -> None:
    assert main(["inspect", *(str(family[name]) for name in ("base", "a")), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "378 parameters" in text
    assert f"{NORM}  (6,)  bfloat16" in text
    assert "Update size delta" in text


def test_an_expert_has_one_weight(tmp_path: Path, capsys) -> None:
    path = write_config(tmp_path)
    with_experts(path)
    common = ["merge", "--config", str(path), f"--output={tmp_path / 'out'}"]
    for alpha in (["math=0.2", "code=1", "math=0.3"], ["math=0.2", "--alpha", "math=0.3"]):
        assert "--alpha: 'math' is there twice" in refused(capsys, *common, "--alpha", *alpha)
    assert not (tmp_path / "out").exists()


def test_merge_takes_what_an_experiment_trained_and_searched(
    trained_experiment: Path, tmp_path: Path, capsys
) -> None:
    from megatron_mergemix.config import load_config
    from megatron_mergemix.experiment.digests import search_digests
    from megatron_mergemix.files.publishing import publish_json
    from megatron_mergemix.run_dir import RunDir
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config = load_config(trained_experiment)
    experts = {n: read_weights(p) for n, p in expert_checkpoints(config).items()}
    base = read_weights(base_checkpoint(config))
    common = ["merge", "--config", str(trained_experiment)]
    out = tmp_path / "alpha"
    arguments = [*common, "--alpha", "math=0.5", "code=0.25", "--method=task_arithmetic"]
    assert main([*arguments, f"--output={out}"]) == 0
    merged = read_weights(out / "release")
    for name, tensor in merged.items():
        exact = 0.25 * base[name] + 0.5 * experts["math"][name] + 0.25 * experts["code"][name]
        np.testing.assert_allclose(tensor, exact, rtol=1e-6, atol=1e-7)

    searched = [*common, "--from-search", f"--output={tmp_path / 'found'}"]
    assert "mergemix search" in refused(capsys, *searched)
    result = {
        "merge_weights": {"math": 0.0, "code": 1.0, "prose": 0.0},
        "mixture": {"math": 0.0, "code": 1.0, "prose": 0.0},
        "digests": search_digests(config),
    }
    path = RunDir(config.run_dir).result
    try:
        publish_json(path, result)
        assert main(searched) == 0
        found = read_weights(tmp_path / "found" / "release")
        assert all(np.array_equal(found[name], experts["code"][name]) for name in found)
        publish_json(path, {**result, "digests": {**result["digests"], "expert.math": "other"}})
        shutil.rmtree(tmp_path / "found")
        assert "measured on another expert.math" in refused(capsys, *searched)
    finally:
        path.unlink()
