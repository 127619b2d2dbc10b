"""What the kernels in Gluon share: names that Triton has changed, and boxes of the copy engine.

Gluon (triton.experimental.gluon, as the triton package has it from 3.6 on) says what every warp does, and its layouts;
Hopper's copy engine and tensor cores work asynchronously there. Triton's interpreter cannot run it: only a GPU's tests see what
these kernels compute, others that they compile (tests/compiling.py). Each of them has a portable one beside it, the definition.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_cli.ops.triton.problem import lawful_strides

memory = gl.shared_memory_descriptor
# Of each pair the first name is the newer one.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
view = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def make_tiles(d_x, COUNT: gl.constexpr):
    """COUNT buffers for d_x's boxes: as tiles [rows, width], and as boxes."""
    TILE: gl.constexpr = d_x.block_shape[2]
    WIDTH: gl.constexpr = d_x.block_shape[3]
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WIDTH], d_x.dtype)
    s_x = gl.allocate_shared_memory(d_x.dtype, [COUNT, TILE, WIDTH], FLAT)
    return s_x, view(s_x, d_x.dtype, [COUNT, 1, 1, TILE, WIDTH], d_x.layout)


def head_boxes(x: Tensor, rows: int, width: int, *, heads: int = 1) -> TensorDescriptor:
    """x [b, h, n, d] in boxes [1, heads, rows, width], zeros outside; what lies outside is not stored.

    `width` channels of at most 128 bytes are a panel on chip; more are panels, one behind the other.
    """
    shape, box = list(x.shape), [1, heads, rows, width]
    strides = [*lawful_strides(shape[:3], list(x.stride()[:3]), 16), 1]
    return TensorDescriptor(x, shape, strides, box, layout_of(*box, dtype=x.dtype))


@cache
def layout_of(*box: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory. (To find out takes the host 7 microseconds.)"""
    return gl.NVMMASharedLayout.get_default_for(list(box), DTYPES[dtype])
