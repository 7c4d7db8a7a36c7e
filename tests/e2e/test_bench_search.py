"""The benchmark of the search against files, in small: it agrees with itself and prints a ratio."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.nightly

TOOLS = Path(__file__).parents[2] / "tools"


def test_the_benchmark_prints_candidates_per_hour_and_where_time_goes(tmp_path: Path) -> None:
    words = [sys.executable, str(TOOLS / "bench_search.py"), "--folder", str(tmp_path)]
    words += ["--size", "tiny", "--windows", "16", "--candidates", "1", "--cpu-clock"]
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert re.search(
        r"^tiny: [\d,]+ parameters in fp32, 4 experts, 16 windows of 128 .* 1 thr", out
    )
    agree = re.search(r"^losses of files and in place differ by (\S+) at most$", out, re.M)
    assert agree, out
    assert float(agree[1]) <= 1e-5
    number = r"\d+\.\d{3}"
    ours = rf"^in place +({number}) s per candidate: merge ({number}), evaluate ({number})$"
    theirs = rf"^files +({number}) s per candidate: merge process ({number}), start ({number}), "
    theirs += rf"load ({number}), evaluate ({number})$"
    for row in (ours, theirs):
        found = re.search(row, out, re.M)
        assert found, out
        whole, *parts = map(float, found.groups())
        assert whole == pytest.approx(sum(parts), abs=0.003)
    rates = re.findall(
        r"^(in place|files) +([\d,]+) candidates per hour in a search of 40$", out, re.M
    )
    fast, slow = (float(rate.replace(",", "")) for _, rate in rates)
    ratio = re.search(
        r"^in place is ([\d.]+) times as fast as files .*  (met|MISSED); beside", out, re.M
    )
    assert ratio, out
    assert float(ratio[1]) == pytest.approx(fast / slow, rel=0.02)
    assert (ratio[2] == "met") == (float(ratio[1]) >= 20)
    # Both ways start from the same windows and checkpoints, which are kept.
    kept = tmp_path / "tiny-16"
    assert (kept / "windows.npy").exists()
    assert (kept / "llama" / "domain3" / "model.safetensors").exists()
    assert (kept / "merged").is_dir()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("bench_search", TOOLS / "bench_search.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_search", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_ways_that_find_different_losses_are_refused(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = [bench.Way(label) for label in ("in place", "files")]
    for way, loss in zip(ways, (5.0, 5.00004), strict=True):
        way.add(2.0, {"merge": 1.0})
        way.add(loss, {"merge": 1.0})
    bench.compare(ways)  # 8e-6 of the loss: rounding
    assert "differ by 8.0e-06 at most" in capsys.readouterr().out
    ways[1].losses[1] = 5.0001
    with pytest.raises(SystemExit, match=r"candidate 1: in place finds a loss of 5.0000.*files"):
        bench.compare(ways)
