"""Native Sparse Attention in Triton, forward and backward: the only place that imports triton.

    attend        attention over one contiguous range of keys: compressed, window, forced blocks
    selection     importance and the exact choice of blocks
    index         the inverted index of a selection
    selected      selected attention, key blocks outside; selected_gradient, its gradients
    *_tiles       what Hopper GPUs run instead where it is faster: attend_tiles, dkv_tiles, parts_tiles, gradient_tiles
    gates         what the backward needs of every row
    windows       compression's memory movement
    problem       sizes, packed documents' tables, descriptors of one call
    launch        grids and launches, a branch at a time
    decode        one query a sequence against its cache, kernels of its own
    group         the same in one launch, for batches; group_tiles, on Hopper's tensor cores
    append        a token's projections into the cache, before decode
    linear        products of a few rows, around both; linear_tiles, of a batch, on Hopper's tensor cores
    hopper        what the kernels in Gluon share; device, what launches ask of a GPU
    residual      which of them a step's products take, or PyTorch's
    overlap       launches that begin while the kernel before still runs
    operators     PyTorch's custom ops over them, with gradients
    tuning        launch configurations

Sizes that change from call to call are not specialised on: a new length compiles nothing. EXPERIMENTS.md is the log of what
was tried, predicted and measured.
"""

from nsa_cli.ops.triton.operators import (
    compressed_attention,
    nsa_attention,
    refusal,
    selected_attention,
    window_attention,
)

__all__ = ["compressed_attention", "nsa_attention", "refusal", "selected_attention", "window_attention"]
