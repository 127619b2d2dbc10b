"""One call's sizes, tables and tensor descriptors: what every launch of it has in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_cli.config import NSAConfig

LOG2E = 1.4426950408889634
DKV_PROGRAMS, MOST_SPLITS = 2048, 64
"""The queries of a compressed key tile's gradient are split until there are about as many programs, which evens out the triangle;
and the parts, float32, that are added up in order, at most."""
LEAST_DIM = 16
"""tl.dot's least inner dimension; smaller head dims are padded with zeros on chip."""


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n. (Triton's takes 10 microseconds a call on the host; a launch takes 30.)"""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Documents:
    """Tables of packed documents, int32, made on the device without asking it anything.

    ends [documents + 1]: cu_seqlens. document, start, end [t]: a token's, its number and where it lies. base [t]: its first
    compressed block. sel_base [t]: its first selection block. first, last [c]: the queries [first, last) that see a compressed
    block. sel_start, sel_end [j]: a selection block's first token, and its document's end. sel_first, sel_last [j]: its first
    compressed block, and its document's end among them.
    """

    ends: Tensor
    document: Tensor
    start: Tensor
    end: Tensor
    base: Tensor
    sel_base: Tensor
    first: Tensor
    last: Tensor
    sel_start: Tensor
    sel_end: Tensor
    sel_first: Tensor
    sel_last: Tensor


def make_documents(cu_seqlens: Tensor, tokens: int, compressed: int, config: NSAConfig) -> Documents:
    """The tables for cu_seqlens, int32 [documents + 1] ascending from 0 to `tokens`; empty documents are passed over."""
    length, stride, block = config.compress_block, config.compress_stride, config.select_block
    device = cu_seqlens.device

    def before(counts: Tensor) -> Tensor:
        return F.pad(counts.cumsum(0), (1, 0))

    def document_of(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(count, device=device)
        return at, torch.searchsorted(ends[1:].contiguous(), at, right=True).clamp(max=len(ends) - 2)

    ends = cu_seqlens.long()
    tokens_of = ends.diff()
    blocks = before(torch.where(tokens_of >= length, (tokens_of - length) // stride + 1, 0))
    selects = before((tokens_of + block - 1) // block)
    _, of_token = document_of(ends, tokens)
    c, of_block = document_of(blocks, max(compressed, 1))
    j, of_select = document_of(selects, tokens // block + len(ends) - 1)
    tables = (
        ends,
        of_token,
        ends[of_token],
        ends[of_token + 1],
        blocks[of_token],
        selects[of_token],
        ends[of_block] + (c - blocks[of_block]) * stride + length - 1,
        ends[of_block + 1],
        ends[of_select] + (j - selects[of_select]) * block,
        ends[of_select + 1],
        blocks[of_select] + (j - selects[of_select]) * (block // stride),
        blocks[of_select + 1],
    )
    return Documents(*(table.int() for table in tables))


def padded_dim(dim: int) -> int:
    """A head dim as tiles have it."""
    return max(LEAST_DIM, next_power_of_2(dim))


@dataclass(frozen=True)
class Problem:
    """Sizes of one attention call; letters as in nsa_cli.ops. e: head dim of the values. scale: of the scores, natural units."""

    config: NSAConfig
    b: int
    h: int
    g: int
    n: int
    d: int
    e: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    documents: Documents | None = None
    offset: int = 0
    """The first query's token: the queries are the last n of offset + n tokens. Packed documents have none."""

    @cached_property
    def keys(self) -> int:
        """Tokens that keys and values have."""
        return self.offset + self.n

    @cached_property
    def r(self) -> int:
        """Heads of a group."""
        return self.h // self.g

    @cached_property
    def rp(self) -> int:
        """r rounded up to a power of two: the rows that a token takes in a tile."""
        return next_power_of_2(self.r)

    @cached_property
    def dk(self) -> int:
        return padded_dim(self.d)

    @cached_property
    def dv(self) -> int:
        return padded_dim(self.e)

    @cached_property
    def scale_log2(self) -> float:
        return self.scale * LOG2E

    @cached_property
    def precision(self) -> str:
        """float32 products are exact float32, never TF32."""
        return "ieee" if self.dtype == torch.float32 else "tf32"

    @cached_property
    def packed(self) -> bool:
        return self.documents is not None

    @cached_property
    def select_blocks(self) -> int:
        """Selection blocks over all documents (a bound on them, where lengths are on the device)."""
        return self.config.num_select_blocks(self.keys) if self.documents is None else len(self.documents.sel_start)

    def table(self, name: str) -> Tensor | None:
        """A table of the packed documents, None without them."""
        if self.documents is None:
            return None
        table: Tensor = getattr(self.documents, name)
        assert table.is_contiguous(), name  # kernels go through it by its first address
        return table

    def bounds(self) -> dict[str, int | bool]:
        """The constants that attend.key_bounds and query_bounds take."""
        config = self.config
        return {
            "LENGTH": config.compress_block, "STRIDE": config.compress_stride, "BLOCK": config.select_block,
            "NUM_INIT": config.num_init, "NUM_LOCAL": config.num_local, "WINDOW": config.window, "PACKED": self.packed,
        }  # fmt: skip

    def empty_rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised [b, h, n, width], heads beside each other in memory, rows fit for the copy engine."""
        return empty_rows(self.b, self.h, self.n, width, dtype or self.dtype, self.device)


def empty_rows(b: int, h: int, n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [b, h, n, width] in the memory order b n h, every row a multiple of 16 bytes."""
    step = 16 // dtype.itemsize
    padded = -(-width // step) * step
    return torch.empty(b, n, h, padded, dtype=dtype, device=device)[..., :width].transpose(1, 2)


def aligned(x: Tensor) -> Tensor:
    """x [b, h, n, d], or a copy, as the copy engine takes it: d contiguous, other strides and the start multiples of 16 bytes."""
    step = 16 // x.element_size()
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    if (x.stride(3) == 1 or x.shape[3] == 1) and all(s % step == 0 for s in strides) and x.data_ptr() % 16 == 0:
        return x
    out = empty_rows(x.shape[0], x.shape[1], x.shape[2], x.shape[3], x.dtype, x.device)
    return out.copy_(x)


def lawful_strides(shape: list[int], strides: list[int], step: int) -> list[int]:
    """Strides with those of dimensions of size 1 made lawful."""
    return [stride if size > 1 else step for size, stride in zip(shape, strides, strict=True)]


def split_queries(branch: str, tiles: int, step: int, p: Problem) -> tuple[int, int]:
    """In how many parts the queries of a key tile's gradients are taken, and how many tokens a part has, whole steps of `step`.

    Keys of the compressed branch and of the first blocks ("cmp", "init", "first") have long ranges of queries. tiles: of all
    batch entries and groups.
    """
    splits = 1
    if branch in ("cmp", "init", "first"):
        splits = max(1, min(DKV_PROGRAMS // tiles, cdiv(p.n, 8 * step), MOST_SPLITS))
    return splits, cdiv(cdiv(p.n, splits), step) * step


def head_rows(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head of x [b, h, n, d]; width: d rounded up."""
    shape = list(x.shape)
    strides = [*lawful_strides(shape[:3], list(x.stride()[:3]), 16), 1]
    return TensorDescriptor(x, shape, strides, [1, 1, rows, width])


def group_rows(x: Tensor, groups: int, rp: int, rows: int, width: int) -> TensorDescriptor:
    """Tiles of `rows` rows, rows / rp tokens of one group's heads, of x [b, h, n, d]."""
    if rp == 1:
        return head_rows(x, rows, width)
    b, h, n, d = x.shape
    shape = [b, groups, n, h // groups, d]
    strides = lawful_strides(shape[:4], [x.stride(0), x.stride(1) * (h // groups), x.stride(2), x.stride(1)], 16)
    return TensorDescriptor(x, shape, [*strides, 1], [1, 1, rows // rp, rp, width])
