#!/usr/bin/env bash
# The table of the Triton kernels: attention forward and backward beside PyTorch's fastest dense attention, shape by shape.
#
#   samples/kernel_table.sh                          on a GPU: the paper's geometry, three shapes, 8k to 128k tokens
#   SHAPES="16,4,128" SEQ_LENS="32768" samples/kernel_table.sh --json
#
# SHAPES: query heads, key/value heads and head dim of each ("64,4,128 16,4,128 16,16,64"). SEQ_LENS: tokens
# ("8192 32768 65536 131072"). NSA: the command (nsa). More arguments go to `nsa bench`. Inputs are random, which leaves
# neighbouring queries nothing to share: the hardest case. Ends with 6 when a kernel disagrees with the reference.
set -euo pipefail

read -r -a nsa <<< "${NSA:-nsa}"
lengths=()
for length in ${SEQ_LENS:-8192 32768 65536 131072}; do lengths+=(--seq-len "$length"); done

for shape in ${SHAPES:-64,4,128 16,4,128 16,16,64}; do
    IFS=, read -r heads kv_heads dim_head <<< "$shape"
    "${nsa[@]}" bench "${lengths[@]}" --no-ladder --group attention --branch-kv shared --kernel triton \
        --heads "$heads" --kv-heads "$kv_heads" --dim-head "$dim_head" --limit 300 --quiet "$@"
    echo
done
