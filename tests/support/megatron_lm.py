"""Real Megatron-LM checkouts: where they are, which of them this interpreter runs, how to run one.

The checkouts are those that ``MEGATRON_LM_DIR`` names (several separated by ``:``), else every
``Megatron-LM*`` folder in the home directory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.support.forked_launch import run_forked

_NEEDED_MODULES = ("six", "triton", "pybind11")  # by megatron.training, beyond Megatron Core
_NEEDS_PYTHON_312 = (0, 17)

# A tiny GPT and the switches without which Megatron wants CUDA, Apex or TransformerEngine.
TINY_GPT = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--seq-length", "32", "--max-position-embeddings", "32"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--seed", "1"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--num-workers", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo"),
    *("--attention-backend", "unfused", "--ckpt-format", "torch_dist"),
    *("--no-gradient-accumulation-fusion", "--no-persist-layer-norm", "--no-rope-fusion"),
    *("--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"),
    "--no-bias-dropout-fusion",
)


def checkouts() -> list[Path]:
    """Return the Megatron-LM checkouts that this interpreter can run, oldest version first."""
    named = os.environ.get("MEGATRON_LM_DIR")
    folders = [Path(f) for f in named.split(":")] if named else Path.home().glob("Megatron-LM*")
    found = [folder for folder in folders if (folder / "pretrain_gpt.py").is_file()]
    return sorted(filter(_fits, found), key=version)


def version(checkout: Path) -> tuple[int, int]:
    """Return the major and minor version of Megatron Core in a checkout."""
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    major, minor = (re.search(rf"^{part} = (\d+)", text, re.M) for part in ("MAJOR", "MINOR"))
    assert major is not None
    assert minor is not None
    return int(major[1]), int(minor[1])


def each_checkout(newest: bool = False) -> pytest.MarkDecorator:
    """Parametrise a test over ``checkout``, or skip it with the reason why there is none.

    Args:
        newest: take the newest only, for what takes long and is alike in all.
    """
    found = checkouts()[-1:] if newest else _for_this_interpreter(checkouts())
    if found and not (missing := _missing_modules()):
        marks = [pytest.mark.megatron_lm]
        parameters = [pytest.param(path, id=path.name, marks=marks) for path in found]
        return pytest.mark.parametrize("checkout", parameters, scope="session")
    if found:
        reason = f"NOT TESTED: Megatron-LM needs {missing}. Run: pip install {' '.join(missing)}"
    else:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        tag = "core_v0.19.0" if sys.version_info >= (3, 12) else "core_v0.16.1"
        reason = (
            f"NOT TESTED: no Megatron-LM checkout for Python {python}. Run: git clone --branch "
            f"{tag} https://github.com/NVIDIA/Megatron-LM ~/Megatron-LM-{tag} "
            f"or set MEGATRON_LM_DIR."
        )
    skipped = [pytest.mark.megatron_lm, pytest.mark.skip(reason=reason)]
    return pytest.mark.parametrize("checkout", [pytest.param(None, id="none", marks=skipped)])


def run_pretrain_gpt(
    checkout: Path,
    nproc: int,
    args: Iterable[str],
    launcher: str = "megatron_mergemix.megatron.cpu_mode",
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
) -> subprocess.CompletedProcess[str]:
    """Run the checkout's ``pretrain_gpt.py`` through a launcher module, on CPU ranks."""
    command = [str(checkout / "pretrain_gpt.py"), *args]
    environment = build_environment() | dict(env or {})
    return run_forked(launcher, nproc, command, environment, timeout, checkout)


def build_environment() -> dict[str, str]:
    """Return a PATH on which Megatron's Makefile finds the Python that runs the tests.

    The Makefile of the dataset helpers calls ``python3`` and ``python3-config``.
    """
    folders = [Path(sys.executable).parent, Path(sys.base_prefix) / "bin", os.environ["PATH"]]
    return {"PATH": os.pathsep.join(map(str, folders)), "PYTHONWARNINGS": "ignore"}


def training_losses(output: str) -> dict[int, float]:
    """Return the logged language model loss by iteration."""
    lines = re.finditer(r"iteration +(\d+)/.* lm loss: (\S+) ", output)
    return {int(line[1]): float(line[2]) for line in lines}


def validation_losses(output: str) -> dict[int, float]:
    """Return the validation loss by iteration, without the evaluation at the end."""
    lines = re.finditer(r"validation loss at iteration (\d+) \| lm loss value: (\S+) ", output)
    return {int(line[1]): float(line[2]) for line in lines}


def _for_this_interpreter(found: list[Path]) -> list[Path]:
    """Leave out what Python 3.11 runs as well, unless it was asked for: CI runs on both."""
    newer = [checkout for checkout in found if version(checkout) >= _NEEDS_PYTHON_312]
    return found if os.environ.get("MEGATRON_LM_DIR") else newer or found


def _fits(checkout: Path) -> bool:
    return version(checkout) < _NEEDS_PYTHON_312 or sys.version_info >= (3, 12)


def _missing_modules() -> list[str]:
    return [name for name in _NEEDED_MODULES if importlib.util.find_spec(name) is None]
