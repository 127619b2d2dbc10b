#!/usr/bin/env bash
# The figures of decoding: one layer's attention, whole models, and `nsa sample` itself, dense beside sparse.
#
#   samples/decode_table.sh                                 on a GPU, in minutes, most of them for reading prompts
#   ATTENTION= BASE="64,8192" TOKENS=0 samples/decode_table.sh --json
#
# ATTENTION: sequences and tokens of each step of one layer, 64 query heads, 4 key/value heads of 128 ("32,65536 16,131072 256,8192
# 1,65536"). BASE: the same of a model as large as the preset ("1,32768 1,131072 64,8192 128,8192"). TOKENS: how long a text a
# PRESET (small) with random weights samples, the second time with its kernels compiled (2000; 0 for none). NSA: the command
# (nsa). More arguments go to `nsa bench`. A side that does not fit into memory is left out and named.
set -euo pipefail

read -r -a nsa <<< "${NSA:-nsa}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

bench() { # sequences,tokens and the shape's flags
    IFS=, read -r batch tokens <<< "$1"
    "${nsa[@]}" bench --group decode --no-ladder --quiet --limit 300 --batch "$batch" --seq-len "$tokens" "${@:2}"
    echo
}

for case in ${ATTENTION-32,65536 16,131072 256,8192 1,65536}; do
    bench "$case" --branch-kv shared "$@"
done
for case in ${BASE-1,32768 1,131072 64,8192 128,8192}; do
    bench "$case" --heads 16 --kv-heads 2 --dim-head 64 --dim 1024 --depth 12 "$@"
done
if [ "${TOKENS:=2000}" -gt 0 ]; then
    "${nsa[@]}" train synthetic:copying,tokens=16 --sparse --preset "${PRESET:-small}" --steps 1 --eval-every 0 --quiet \
        --out "$out/random.safetensors" > /dev/null
    for _ in first again; do
        echo "hi" | "${nsa[@]}" sample "$out/random.safetensors" --max-tokens "$TOKENS" -v 2>&1 > /dev/null | tail -n 1
    done
fi
