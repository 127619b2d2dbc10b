#!/usr/bin/env bash
# One dense and one sparse model on the tales: their losses side by side, and both on the same beginning.
#
#   samples/dense_and_sparse.sh                            minutes on two CPU cores
#   STEPS=1500 OUT=runs samples/dense_and_sparse.sh --seq-len 512
#
# STEPS: optimizer steps of each (300). OUT: folder of the checkpoints (a new temporary one). NSA: the command (nsa).
# Arguments go to both `nsa train`. stdout: two losses, two continuations.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -r -a nsa <<< "${NSA:-nsa}"
steps=${STEPS:-300}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"

beginning='1. Edda and the Silver Key

At midsummer, Mats, the tanner of Coldwell, sent for Edda.
'

for kind in dense sparse; do
    echo "training the $kind model in $out" >&2
    "${nsa[@]}" train "$here/tales.txt" "--$kind" --steps "$steps" --out "$out/$kind.safetensors" --overwrite "$@" \
        > /dev/null
done

for kind in dense sparse; do
    # Every metrics line is one JSON object; the last validation is near the end.
    loss=$(grep -o '"val_bits_per_byte": [0-9.]*' "$out/$kind.metrics.jsonl" | tail -n 1)
    echo "$kind: ${loss#*: } bits per byte on the held-out tales"
done

for kind in dense sparse; do
    echo "--- $kind"
    printf '%s' "$beginning" | "${nsa[@]}" sample "$out/$kind.safetensors" --whole --quiet --max-tokens 300
done
