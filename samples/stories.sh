#!/usr/bin/env bash
# A pipe from end to end: fresh tales are written, a sparse model is trained on them as they come, and it continues
# three beginnings; the JSON lines become text again at the end.
#
#   samples/stories.sh
#   STEPS=1500 SEED=7 samples/stories.sh > stories.txt
#
# STEPS: optimizer steps (300). SEED: of tales, training and sampling (1). OUT: folder of the checkpoint (a new
# temporary one). NSA: the command (nsa). PYTHON: for the two short scripts (python3). Arguments go to `nsa train`.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -r -a nsa <<< "${NSA:-nsa}"
read -r -a python <<< "${PYTHON:-python3}"
seed=${SEED:-1}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"

# stdout of train is the checkpoint's path and nothing else.
checkpoint=$(
    "${python[@]}" "$here/make_tales.py" --seed "$seed" --bytes 300000 |
        "${nsa[@]}" train - --sparse --steps "${STEPS:-300}" --seed "$seed" --out "$out/stories.safetensors" \
            --overwrite "$@"
)

printf '%s\n' \
    'In the thaw, Petra, the miller of Dunmoor, sent for ' \
    'On a narrow bridge sat Folke, who ' \
    '"Who sends you?" asked Greta. ' |
    "${nsa[@]}" sample "$checkpoint" --jsonl --quiet --seed "$seed" --max-tokens 160 --temperature 0.7 |
    "${python[@]}" -c '
import json, sys

for line in sys.stdin:
    record = json.loads(line)
    print(record["prompt"] + record["text"], end="\n\n* * *\n\n")
'
