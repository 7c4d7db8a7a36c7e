#!/usr/bin/env bash
# Install what the tests need and run them: style, types, unit, distributed, integration, e2e.
#   ./tools/test.sh [pytest arguments]      PYTHON chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(tools/venv.sh dev)
export MERGEMIX_DEVICE=cpu OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE  # Megatron-LM would be compiled anew by every process that imports it
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# Two files at a time: ranks of distributed tests spend much of their time importing.
exec "$venv/bin/pytest" --numprocesses 2 --dist loadfile "$@"
