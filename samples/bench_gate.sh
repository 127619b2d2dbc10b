#!/usr/bin/env bash
# Fails when attention has become slower than it was: for a nightly job, or before a commit.
#
#   samples/bench_gate.sh baseline.json              the first time it writes baseline.json, later it compares with it
#   SEQ_LEN=16384 TOLERANCE=0.15 samples/bench_gate.sh baseline.json
#
# SEQ_LEN: tokens (2048). TOLERANCE: how much slower a row may be (0.25: a machine that does other work is noisy).
# NSA: the command (nsa). More arguments go to `nsa bench`. Ends with 0, or with 6 when a row is too slow.
set -euo pipefail

baseline=${1:?name the file of the baseline, for example baseline.json}
shift
read -r -a nsa <<< "${NSA:-nsa}"
bench=("${nsa[@]}" bench --seq-len "${SEQ_LEN:-2048}" --no-ladder --group attention --quiet "$@")

if [[ ! -e $baseline ]]; then
    "${bench[@]}" --json > "$baseline.part"
    mv "$baseline.part" "$baseline"
    echo "wrote $baseline" >&2
    exit
fi

status=0
"${bench[@]}" --compare "$baseline" --tolerance "${TOLERANCE:-0.25}" || status=$?
if [[ $status -eq 6 ]]; then
    echo "slower than $baseline; if that is meant, remove it and run this again" >&2
fi
exit "$status"
