"""What a hierarchical search prints: its stages and its candidates."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.launch.stage_summary import print_stages

YAML = """\
run_dir: run
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 4}
base: {train: {tokens: 1e6, lr: 1e-3}}
domains:
  math: {children: {web_math: {prefixes: [a]}, math_qa: {prefixes: [b]}}}
  code: {prefixes: [c]}
evaluate: {capabilities: {a: {loss: {prefixes: [held]}}}}
search: {hierarchy: bottom_up, trials: 12}
"""


def candidate(share: float, gain: float) -> dict[str, object]:
    mixture = {"web_math": share, "math_qa": 0.3, "code": 0.7 - share}
    numbers = {"predicted": 0.5, "observed": 0.6 - gain, "gain": gain, "gain_stderr": 0.02}
    return {"mixture": mixture, **numbers}


RESULT = {
    "source": "joint",
    "alternatives": {"joint": candidate(0.4, 0.0), "uniform": candidate(0.3, 0.125)},
    "stages": [
        {"stage": "leaves", "variables": [], "share": 1.0, "trials": 6, "reused": 0},
        {"stage": "math", "variables": ["web_math", "math_qa"], "skipped": "why"},
        {
            "stage": "coarse", "variables": ["math", "code"], "share": 1.0, "trials": 9,
            "reused": 3, "mixture": {"math": 0.75, "code": 0.25}, "source": "argmax",
            "utility": 0.625, "stderr": None, "notes": ["noisy"],
        },
    ],
}  # fmt: skip


def test_stages_and_candidates_are_printed_with_domains_as_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(YAML)
    print_stages(load_config(path), RESULT, {"joint": 1.0, "uniform": 0.58})
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("│")][1:-1]
        for line in printed.splitlines()
        if "│" in line
    ]
    assert ["leaves", "every domain alone", "", "1.000", "6", "0", ""] in rows
    assert ["math", "not searched, see the notes", "", "", "", "", ""] in rows
    found = "math 0.750  code 0.250"
    assert ["coarse", found, "argmax", "1.000", "9", "3", "0.6250"] in rows
    assert ["math", "web_math", "0.400", "0.300"] in rows
    assert ["", "math_qa", "0.300", "0.300"] in rows
    assert ["code", "", "0.300", "0.400"] in rows
    assert ["norm of alpha", "", "1.00", "0.58"] in rows
    assert ["behind by", "", "", "0.1250 +- 0.0200"] in rows
    assert "joint <- taken" in printed
    assert "note on stage coarse: noisy" in printed
