#!/usr/bin/env bash
# Make a virtual environment with this project installed, or reuse it when nothing changed.
#   tools/venv.sh EXTRAS      prints the folder; PYTHON chooses the interpreter, VENV the folder
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:-}
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=${VENV:-.venv-$version}
stamp="$venv/.installed-${extras:-alone}"  # what the tests add must not make run.sh install again
wanted=$(cat setup.py constraints.txt megatron_mergemix/merge/kernel.c | cksum)

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $venv (once)" >&2
    [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --constraint constraints.txt torch setuptools wheel >&2
    "$venv/bin/pip" install --quiet --constraint constraints.txt --editable ".${extras:+[$extras]}" >&2
    echo "$wanted" > "$stamp"
fi
echo "$venv"
