#!/usr/bin/env bash
# The fidelity study on this machine's CPU: 2 h 41 min on two cores, installing included; start it again and it goes on.
#   ./examples/fidelity/run.sh [--seeds 1 2 3] [--parts headline shares ...] [--quick]
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=$(tools/venv.sh lm-eval,lightgbm,report)
export MERGEMIX_DEVICE=${MERGEMIX_DEVICE:-cpu}
data=runs/fidelity-data
mkdir -p "$data"
for domain in code headers prose readmes science math tables; do
    if [ ! -e "$data/$domain.idx" ]; then
        [ -e "$data/$domain.jsonl" ] ||
            "$venv/bin/python" examples/quickstart/make_corpus.py "$data" --seven
        "$venv/bin/mergemix" data "$data/$domain.jsonl" --output "$data/$domain" --held-out 0.1 \
            --overwrite  # a held-out part that a killed run has left
    fi
done
exec "$venv/bin/python" examples/fidelity/study.py "$@"
