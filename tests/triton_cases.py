"""What the tests of the Triton kernels share: cases in one line each, and their comparison with the torch kernel.

Given the same block indices, outputs and gradients are compared with the torch kernel in a wider dtype; the selection with
the definition's importance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from nsa_cli.benchmark.parity import check_selection, compare, near_tie_absolute
from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, reference, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from tests.inputs import Inputs, cu, make_inputs

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
NEAR_TIE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
LAYOUTS = ("plain", "model", "sliced", "turned")
COLUMNS = "heads dim blocks n window tokens batch keys layout dtype"


@dataclass(frozen=True)
class Case:
    """One call of the operator. lengths: packed documents, or, not packed, the one length of every sequence of the batch.

    shared: q_cmp, k_win and v_win are left out. layout: of the inputs in memory, see `arrange`.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    config: NSAConfig
    lengths: tuple[int, ...]
    packed: bool
    batch: int
    shared: bool
    layout: str
    dtype: torch.dtype

    @property
    def cu_seqlens(self) -> Tensor | None:
        return cu(list(self.lengths)) if self.packed else None

    def inputs(self, device: str) -> Inputs:
        x = make_inputs(
            self.config, self.lengths[0], batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, dim=self.dim,
            dim_v=self.dim_v, dtype=self.dtype, lengths=list(self.lengths) if self.packed else None, device=device,
        )  # fmt: skip
        return x.map(lambda name, tensor: arrange(tensor, self.layout).requires_grad_())


def parse(line: str) -> Case:
    """The case of a line of COLUMNS: `8/2 192/128 8,4,16 5+1+2 33 65 2 shared model f32`.

    heads: Hq/Hkv. dim: of queries and keys, and of the values where it is another. n: free places + num_init + num_local.
    tokens: packed documents joined by +; "90+" is a single one.
    """
    heads, dim, blocks, n, window, tokens, batch, keys, layout, dtype = line.split()
    length, stride, block = (int(size) for size in blocks.split(","))
    places = [int(count) for count in n.split("+")]
    config = NSAConfig(
        compress_block=length, compress_stride=stride, select_block=block, num_selected=sum(places), num_init=places[1],
        num_local=places[2], window=int(window),
    )  # fmt: skip
    dims = [int(size) for size in dim.split("/")]
    hq, hkv = (int(count) for count in heads.split("/"))
    lengths = tuple(int(length) for length in tokens.split("+") if length)
    name = "-".join(line.split()).replace("/", ":")
    packed = "+" in tokens
    return Case(name, hq, hkv, dims[0], dims[-1], config, lengths, packed, int(batch), keys == "shared", layout, DTYPES[dtype])


def table(text: str) -> list[Case]:
    """The cases of a table whose first line is COLUMNS."""
    head, *lines = (line for line in text.splitlines() if line.strip())
    assert head.split() == COLUMNS.split()
    return [parse(line) for line in lines]


def arrange(x: Tensor, layout: str) -> Tensor:
    """x [b, h, t, d] with the same values, detached, laid out in memory in one of the ways that callers have them.

    plain: contiguous. model: [b, t, h, d], as a projection leaves it. sliced: a part of wider rows that begin off any
    boundary, in a wider batch. turned: head dim outermost but one, so that no row is contiguous.
    """
    x = x.detach()
    if layout == "plain":
        return x.contiguous().clone()
    if layout == "model":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    b, h, t, d = x.shape
    wide = x.new_full((b, h + 1, t + 2, d + 3), float("nan"))
    wide[:, 1:, 1:-1, 1:-2] = x
    return wide[:, 1:, 1:-1, 1:-2]


def arguments(x: Inputs, case: Case) -> dict[str, Tensor]:
    """The keyword arguments of the operator beside those it requires."""
    packed = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens.to(x.q.device)}
    return packed if case.shared else {**x.extra(), **packed}


def leaves_of(x: Inputs, case: Case) -> dict[str, Tensor]:
    """The tensors whose gradients are asked for."""
    return {name: value for name, value in x.tensors().items() if not (case.shared and name in x.extra())}


def widened(x: Inputs, case: Case, dtype: torch.dtype) -> Inputs:
    """Leaves of another dtype with the same values; with shared keys, one tensor in the place of two."""
    y = x.map(lambda name, value: value.detach().to(dtype).contiguous().requires_grad_())
    return replace(y, q_cmp=y.q, k_win=y.k, v_win=y.v) if case.shared else y


def reference_dtype(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype == torch.float32 else torch.float32


def gradients(out: Tensor, leaves: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype), allow_unused=True, materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def forward_and_backward(case: Case, x: Inputs, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """({"out": .., "dq": .., ..}, block_indices) of the Triton kernels."""
    out, indices = nsa_attention_and_selection(*x.required(), case.config, **arguments(x, case), kernel="triton")
    assert (out.dtype, out.shape) == (case.dtype, (*x.q.shape[:3], case.dim_v))
    return {"out": out, **gradients(out, leaves_of(x, case), weights)}, indices


def expected(case: Case, x: Inputs, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The same from the torch kernel in a wider dtype, given the selection."""
    y = widened(x, case, reference_dtype(case))
    packed = {"kernel": "torch", "cu_seqlens": None if case.cu_seqlens is None else case.cu_seqlens.to(x.q.device)}
    o_cmp, _ = compressed_attention(y.q_cmp, y.k_cmp, y.v_cmp, case.config, **packed)
    o_slc = selected_attention(y.q, y.k, y.v, indices, case.config, **packed)
    o_win = window_attention(y.q, y.k_win, y.v_win, case.config, **packed)
    g_cmp, g_slc, g_win = y.gates.unsqueeze(-1).unbind(-2)
    out = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win
    return {"out": out, **gradients(out, leaves_of(y, case), weights)}


def assert_agrees(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative L2 of every tensor; of those that are zero in truth, relative to the largest of the others."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.shape == want[name].shape, name
    outputs = [(name, got[name], want[name]) for name in got if not name.startswith("d")]
    grads = [(name, got[name], want[name]) for name in got if name.startswith("d")]
    for named in (outputs, grads):
        parity = compare(named, tolerance)
        assert parity.ok, parity.detail


def documents(case: Case) -> Iterator[tuple[slice, slice]]:
    """(tokens, compressed blocks) of every document that is not empty."""
    ends = [0, *torch.tensor(case.lengths).cumsum(0).tolist()]
    block = 0
    for start, stop in pairwise(ends):
        count = case.config.num_compressed(stop - start)
        if stop > start:
            yield slice(start, stop), slice(block, block + count)
        block += count


def assert_selects(case: Case, x: Inputs, indices: Tensor) -> None:
    """Every query's selection is the definition's, near ties excepted."""
    q = (x.q if case.shared else x.q_cmp).detach()
    shape = (case.batch, case.kv_heads, q.shape[2], case.config.num_selected)
    assert (indices.dtype, tuple(indices.shape)) == (torch.int32, shape)
    dtype, absolute = reference_dtype(case), near_tie_absolute(case.dtype, case.heads // case.kv_heads)
    for rows, blocks in documents(case):
        tokens = rows.stop - rows.start
        p = reference.compressed_probabilities(q[:, :, rows].to(dtype), x.k_cmp.detach()[:, :, blocks].to(dtype), case.config)
        importance = reference.importance(p, tokens, case.config)
        at = torch.arange(tokens, device=q.device)
        wrong = check_selection(indices[:, :, rows], importance, at, case.config, NEAR_TIE[case.dtype], absolute)
        assert not wrong, wrong


def output_gradient(case: Case, device: str) -> Tensor:
    """In another layout than the inputs."""
    weights = torch.randn(case.batch, case.heads, sum(case.lengths), case.dim_v, device=device).to(case.dtype)
    return arrange(weights, LAYOUTS[(LAYOUTS.index(case.layout) + 1) % len(LAYOUTS)])


def assert_the_operator_is_right(case: Case, device: str) -> None:
    x, weights = case.inputs(device), output_gradient(case, device)
    got, indices = forward_and_backward(case, x, weights)
    assert_selects(case, x, indices)
    assert_agrees(got, expected(case, x, indices, weights), TOLERANCE[case.dtype])


def any_blocks(case: Case, device: str) -> Tensor:
    """block_indices that hold whatever they like: no block is forced, places are empty anywhere, some are of the future."""
    tokens, places = sum(case.lengths), case.config.num_selected
    count = case.config.num_select_blocks(max(case.lengths)) + 1
    ranks = torch.rand(case.batch, case.kv_heads, tokens, max(count, places), device=device)
    ranks = ranks.argsort(-1)[..., :places]
    return torch.where(ranks < count, ranks, -1).int()


def assert_each_branch_is_right(case: Case, device: str) -> None:
    """The three ops alone; the selected branch on arbitrary lists."""
    x, weights = case.inputs(device), output_gradient(case, device)
    packed = {"cu_seqlens": None if case.cu_seqlens is None else case.cu_seqlens.to(device)}
    y = x.map(lambda name, value: value.detach().to(reference_dtype(case)).contiguous().requires_grad_())
    lists = any_blocks(case, device)
    results: list[list[dict[str, Tensor]]] = []
    for z, kernel in ((x, "triton"), (y, "torch")):
        o_cmp, indices = compressed_attention(z.q_cmp, z.k_cmp, z.v_cmp, case.config, kernel=kernel, **packed)
        o_slc = selected_attention(z.q, z.k, z.v, lists, case.config, kernel=kernel, **packed)
        o_win = window_attention(z.q, z.k_win, z.v_win, case.config, kernel=kernel, **packed)
        if kernel == "triton":
            assert_selects(replace(case, shared=False), x, indices)
        cmp = {"q_cmp": z.q_cmp, "k_cmp": z.k_cmp, "v_cmp": z.v_cmp}
        slc, win = {"q": z.q, "k": z.k, "v": z.v}, {"q": z.q, "k_win": z.k_win, "v_win": z.v_win}
        results.append(
            [{"out": out, **gradients(out, leaves, weights)} for out, leaves in ((o_cmp, cmp), (o_slc, slc), (o_win, win))]
        )
    for got, want in zip(*results, strict=True):
        assert_agrees(got, want, TOLERANCE[case.dtype])


def warm_up(cases: list[tuple[Case, bool]], device: str) -> int:
    """Runs every (case, each branch too) once, to compile its kernels into Triton's cache; returns how many failed."""
    failed = 0
    for case, branches in cases:
        try:
            assert_the_operator_is_right(case, device)
            if branches:
                assert_each_branch_is_right(case, device)
        except Exception:  # it fails again in its own test, where it is reported
            failed += 1
    return failed
