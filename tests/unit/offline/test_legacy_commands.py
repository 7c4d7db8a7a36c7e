"""``mergemix merge``, ``average`` and ``inspect`` on legacy checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_mergemix.cli import main
from tests.support.legacy_family import (
    RANKS,
    is_weight,
    random_models,
    read_legacy_files,
    write_legacy,
    write_legacy_family,
)


def compared(capsys: pytest.CaptureFixture[str], *paths: Path) -> dict[str, object]:
    assert main(["inspect", *map(str, paths), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    """Four saves of two ranks, 80 tokens apart, and one that was killed."""
    root = tmp_path / "run"
    for step in range(1, 6):
        models = random_models("tensor", step)
        write_legacy(root / f"iter_{step:07d}", "tensor", models, step)
    (root / "iter_0000005" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    (root / "latest_checkpointed_iteration.txt").write_text("4")
    return root


@pytest.mark.parametrize("which", [["--last", "3"], ["--tokens", "161"], ["--tokens", "240"]])
def test_average_takes_the_last_saves_of_a_run(run_root, tmp_path, which) -> None:
    assert main(["average", str(run_root), *which, f"--output={tmp_path / 'out'}"]) == 0
    merged = read_legacy_files(tmp_path / "out" / "release")
    saves = [read_legacy_files(run_root / f"iter_{step:07d}") for step in (2, 3, 4)]
    for rank, state in merged.items():
        for name, tensor in state["model"].items():
            if is_weight(tensor):
                mean = sum(save[rank]["model"][name].double() for save in saves) / 3
                torch.testing.assert_close(tensor.double(), mean, rtol=2**-8, atol=1e-6)


def test_inspect_tells_layout_model_and_optimizer(tmp_path, capsys) -> None:
    folder = write_legacy(tmp_path / "iter_0000003", "both", random_models("both", 1))
    (found,) = compared(capsys, folder)["checkpoints"]  # type: ignore[misc]
    assert (found["format"], found["layout"]) == ("torch", "mp_rank")
    assert found["ranks"] == {"tensor": 2, "pipeline": 2, "expert": 1}
    assert (found["iteration"], found["checkpoint_version"], found["files"]) == (3, 3.0, 4)
    # embedding, per stage a norm, fc1, two parts of MoE experts' weights and of a counter
    assert found["parameters"] == 16 * 6 + 2 * (6 + 10 * 6 + 2 * 24 + 2)
    assert found["optimizer_and_rest"]["tensors"] == 4 * 2
    assert found["model"]["bytes_by_dtype"].keys() == {"bfloat16", "int64"}
    tensor = found["tensors"]["mp_rank_01_001/model/output_layer.weight"]
    assert tensor == {"shape": [8, 6], "dtype": "bfloat16", "chunks": 1}


@pytest.mark.parametrize("layout", RANKS)
def test_inspect_compares_whole_models_and_counts_copies_once(tmp_path, capsys, layout) -> None:
    folders, models = write_legacy_family(tmp_path, layout, torch.float32)
    found = compared(capsys, *(folders[name] for name in ("base", "a", "b")))["differences"]

    def flat(name: str) -> torch.Tensor:
        distinct = {}  # by value, as copies are equal in the base
        for rank, keys in models[name].items():
            for key, model in keys.items():
                for tensor, value in model.items():
                    if is_weight(value):
                        origin = models["base"][rank][key][tensor]
                        distinct[origin.numpy().tobytes()] = value.double().view(-1)
        return torch.cat(list(distinct.values()))

    base, *experts = (flat(name) for name in ("base", "a", "b"))
    deltas = [expert - base for expert in experts]
    norms = [float(delta.norm()) for delta in deltas]
    assert [norm["all"] for norm in found["norms"]] == pytest.approx(norms)  # type: ignore[index]
    cosine = float(deltas[0] @ deltas[1]) / norms[0] / norms[1]
    assert found["cosines"][0][1] == pytest.approx(cosine)  # type: ignore[index]
    sizes = [float(expert.abs().sum() + base.abs().sum()) for expert in experts]
    expected = [float(d.abs().sum()) / size for d, size in zip(deltas, sizes, strict=True)]
    assert found["delta"] == pytest.approx(expected)  # type: ignore[index]


def test_inspect_prints_tables_for_people(tmp_path, capsys) -> None:
    folders, _ = write_legacy_family(tmp_path, "tensor")
    assert main(["inspect", str(folders["base"]), str(folders["a"])]) == 0
    text = capsys.readouterr().out
    assert "legacy torch, 2 rank files (tensor 2, pipeline 1, expert 1)" in text
    assert "Update size delta" in text


def test_inspect_refuses_to_compare_formats_or_layouts(tmp_path, capsys) -> None:
    folders, _ = write_legacy_family(tmp_path / "two", "tensor")
    other, _ = write_legacy_family(tmp_path / "one", "one")
    assert main(["inspect", str(folders["base"]), str(other["a"])]) == 1
    assert "--ckpt-convert-format torch_dist" in capsys.readouterr().err


def test_a_merge_can_be_inspected_and_merged_again(tmp_path, capsys) -> None:
    folders, _ = write_legacy_family(tmp_path, "pipeline")
    arguments = ["merge", f"--base={folders['base']}", f"--expert={folders['a']}=1"]
    assert main([*arguments, f"--output={tmp_path / 'one'}"]) == 0
    assert f"--load {tmp_path / 'one'} --finetune" in capsys.readouterr().out
    again = ["merge", f"--base={tmp_path / 'one'}", f"--expert={tmp_path / 'one'}=1"]
    assert main([*again, f"--output={tmp_path / 'two'}"]) == 0
    capsys.readouterr()
    (found,) = compared(capsys, tmp_path / "two")["checkpoints"]  # type: ignore[misc]
    assert found["iteration"] == 0
    assert found["merged_by"]["base"]["path"] == str(tmp_path / "one" / "release")
    files = [read_legacy_files(tmp_path / name / "release") for name in ("one", "two")]
    for rank in files[0]:
        models = [file[rank]["model"] for file in files]
        assert all(torch.equal(models[0][n], t) for n, t in models[1].items() if is_weight(t))
