#!/usr/bin/env bash
# The whole of MergeMix on this machine's CPU: four domains of real text, from scratch to a blend.
# Start it again and it continues, or only shows the result.
#   ./examples/quickstart/run.sh [--set key=value ...]      settings: examples/quickstart/mix.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=$(tools/venv.sh lm-eval,report)
export MERGEMIX_DEVICE=${MERGEMIX_DEVICE:-cpu}
data=runs/quickstart-data
mkdir -p "$data"
for domain in code prose science math; do
    if [ ! -e "$data/$domain.idx" ]; then
        [ -e "$data/$domain.jsonl" ] || "$venv/bin/python" examples/quickstart/make_corpus.py "$data"
        "$venv/bin/mergemix" data "$data/$domain.jsonl" --output "$data/$domain" --held-out 0.1 \
            --overwrite  # a held-out part that a killed run has left
    fi
done
[ -e "$data/math_cloze.jsonl" ] || "$venv/bin/python" examples/quickstart/make_questions.py "$data"
"$venv/bin/mergemix" run examples/quickstart/mix.yaml "$@"
"$venv/bin/mergemix" validate examples/quickstart/mix.yaml "$@"  # the proof: references, trained
"$venv/bin/mergemix" report examples/quickstart/mix.yaml "$@"
