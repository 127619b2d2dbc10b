"""What the backward needs of every row, in one pass over do and the branches' outputs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ROWS", "N"])
def row_deltas(
    p_do, p_o, p_gates, p_delta, p_gate, p_dgates, ROWS, N, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    stride_gr, stride_branch, stride_row, H: tl.constexpr, E: tl.constexpr, DV: tl.constexpr, BRANCHES: tl.constexpr,
    GATED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """delta_b = rowsum(do * o_b), which is also the gradient of the branch's gate; gates in float32. Rows are (b t h)."""
    o_x = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m_x = o_x < ROWS
    o_h, o_t, o_b = o_x % H, o_x // H % N, o_x // H // N
    o_e = tl.arange(0, DV)
    m_e = m_x[:, None] & (o_e < E)[None, :]
    o_do = o_b * stride_ob + o_h * stride_oh + o_t * stride_ot
    b_do = tl.load(p_do + o_do[:, None] + o_e[None, :], mask=m_e, other=0.0).to(tl.float32)
    for r in tl.static_range(BRANCHES):
        b_o = tl.load(p_o + o_x[:, None] * stride_row + o_e[None, :], mask=m_e, other=0.0)
        b_delta = tl.sum(b_do * b_o.to(tl.float32), 1)
        tl.store(p_delta + o_x, b_delta, mask=m_x)
        if GATED:
            o_gate = o_b * stride_gb + o_h * stride_gh + o_t * stride_gt + r * stride_gr
            b_gate = tl.load(p_gates + o_gate, mask=m_x, other=0.0).to(tl.float32)
            tl.store(p_gate + o_x, b_gate, mask=m_x)
            tl.store(p_dgates + o_x * BRANCHES + r, b_delta.to(p_dgates.dtype.element_ty), mask=m_x)
            p_gate += ROWS
        p_o += stride_branch  # a step at a time: r * stride would overflow int32 where the stride itself does not
        p_delta += ROWS
