"""What is timed: attention operators with their inputs, their costs, and the definition of some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_cli.benchmark import parity
from nsa_cli.benchmark.dense import Variant
from nsa_cli.benchmark.options import Shape
from nsa_cli.config import NSAConfig
from nsa_cli.model import accounting
from nsa_cli.ops import compressed_attention, nsa_attention, reference, selected_attention, window_attention

BRANCHES = ("compressed + selection", "selected", "window", "combine")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A differentiable function of tensors, and all that a report says about it besides its speed.

    run(*inputs) -> out [b, h, t, d]. rows(*inputs) -> the same of the sampled queries [b, h, m, d], in float32, by
    the definition. flops, backward_flops: what it needs. kernel: what runs it.
    """

    name: str
    kernel: str
    inputs: Mapping[str, Tensor]
    run: Callable[..., Tensor]
    rows: Callable[..., Tensor]
    flops: int
    backward_flops: int

    def moved_bytes(self, *, backward: bool) -> int:
        """Least traffic: every input read and the output written once; backward reads and writes twice that."""
        q = self.inputs.get("q", next(iter(self.inputs.values())))
        inputs = sum(x.numel() * x.element_size() for x in self.inputs.values())
        out = q.numel() * q.element_size()
        return 2 * inputs + 2 * out if backward else inputs + out


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Random attention inputs of one length, all of them leaves that require gradients, and the queries to compare.

    tensors: q, k, v; k_cmp, v_cmp [b, g, c, d]; gates [b, h, t, 3] in (0, 1); k_win, v_win unless the branches share
    keys.
    """

    tokens: int
    shape: Shape
    batch: int
    nsa: NSAConfig
    tensors: Mapping[str, Tensor]
    queries: Tensor

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.queries.device


def make_workload(
    tokens: int, shape: Shape, batch: int, nsa: NSAConfig, *, device: torch.device, dtype: torch.dtype, seed: int
) -> Workload:
    """Fresh normal inputs (and sigmoid gates), drawn on the device from (seed, tokens)."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + tokens)

    def draw(heads: int, places: int, width: int) -> Tensor:
        return torch.randn(batch, heads, places, width, generator=generator, device=device).to(dtype)

    width, blocks = shape.dim_head, nsa.num_compressed(tokens)
    tensors = {"q": draw(shape.heads, tokens, width)}
    tensors |= {name: draw(shape.kv_heads, tokens, width) for name in ("k", "v")}
    tensors |= {name: draw(shape.kv_heads, blocks, width) for name in ("k_cmp", "v_cmp")}
    tensors["gates"] = draw(shape.heads, tokens, 3).float().sigmoid().to(dtype)
    if nsa.branch_kv == "independent":
        tensors |= {name: draw(shape.kv_heads, tokens, width) for name in ("k_win", "v_win")}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    queries = parity.sample_queries(tokens, nsa, seed).to(device)
    return Workload(tokens=tokens, shape=shape, batch=batch, nsa=nsa, tensors=tensors, queries=queries)


def dense_operator(work: Workload, variant: Variant) -> Operator:
    """Dense causal attention over the workload's q, k and v."""
    costs = (work.tokens, work.shape.heads, work.shape.dim_head)
    return Operator(
        name="dense",
        kernel=variant.name,
        inputs={name: work.tensors[name] for name in ("q", "k", "v")},
        run=variant,
        rows=lambda q, k, v: parity.dense_rows(q[:, :, work.queries], k, v, work.queries),
        flops=work.batch * accounting.dense_attention_flops(*costs),
        backward_flops=work.batch * accounting.dense_attention_flops(*costs, backward=True),
    )


def _costs(work: Workload, parts: Sequence[str]) -> tuple[int, int]:
    """Forward and backward operations of some parts of sparse attention.

    Importance is none of them: it needs no product that the compressed branch does not need, and a kernel that makes one a second
    time for it is not credited with that.
    """
    sizes = (work.tokens, work.shape.heads, work.shape.dim_head, work.nsa)
    forward = accounting.sparse_attention_flops(*sizes)
    backward = accounting.sparse_attention_flops(*sizes, backward=True)
    return tuple(work.batch * sum(getattr(way, part) for part in parts) for way in (forward, backward))


def select(work: Workload, kernel: str) -> Tensor:
    """The kernel's own selection [b, g, t, n] on this workload: what its outputs are compared under."""
    with torch.no_grad():
        _, block_indices = compressed_attention(
            work.tensors["q"], work.tensors["k_cmp"], work.tensors["v_cmp"], work.nsa, kernel=kernel
        )
    return block_indices


def selection_parity(work: Workload, block_indices: Tensor) -> str:
    """What is wrong with the sampled queries' selection, "" if nothing (parity.check_selection)."""
    q, k_cmp, v_cmp = (work.tensors[name].detach() for name in ("q", "k_cmp", "v_cmp"))
    rows = work.queries
    _, importance = parity.compressed_rows(q[:, :, rows], k_cmp, v_cmp, rows, work.tokens, work.nsa)
    absolute = parity.near_tie_absolute(q.dtype, q.shape[1] // k_cmp.shape[1])
    return parity.check_selection(block_indices[:, :, rows], importance, rows, work.nsa, parity.NEAR_TIE[q.dtype], absolute)


def sparse_operator(work: Workload, kernel: str, block_indices: Tensor) -> Operator:
    """All of sparse attention: what the model calls, as one operator."""
    names = list(work.tensors)

    def run(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        return nsa_attention(
            given["q"], given["k"], given["v"], given["k_cmp"], given["v_cmp"], given["gates"], work.nsa,
            k_win=given.get("k_win"), v_win=given.get("v_win"), kernel=kernel,
        )  # fmt: skip

    def rows(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        at, nsa = work.queries, work.nsa
        q, k, v = given["q"][:, :, at], given["k"], given["v"]
        o_cmp, _ = parity.compressed_rows(q, given["k_cmp"], given["v_cmp"], at, work.tokens, nsa)
        o_slc = parity.selected_rows(q, k, v, at, block_indices[:, :, at], nsa)
        o_win = parity.window_rows(q, given.get("k_win", k), given.get("v_win", v), at, nsa)
        return reference.combine(o_cmp, o_slc, o_win, given["gates"][:, :, at].float())

    flops, backward = _costs(work, ("compressed", "selected", "window", "combine"))
    return Operator(name="sparse", kernel=kernel, inputs=work.tensors, run=run, rows=rows, flops=flops, backward_flops=backward)


def branch_operators(work: Workload, kernel: str, block_indices: Tensor) -> list[Operator]:
    """Sparse attention's parts, in BRANCHES' order, each alone."""
    nsa, at, tensors = work.nsa, work.queries, work.tensors
    window_keys = ("k_win", "v_win") if "k_win" in tensors else ("k", "v")

    def make(name: str, inputs: Mapping[str, Tensor], parts: Sequence[str], run: Callable[..., Tensor],
             rows: Callable[..., Tensor]) -> Operator:  # fmt: skip
        flops, backward = _costs(work, parts)
        return Operator(name=name, kernel=kernel, inputs=inputs, run=run, rows=rows, flops=flops, backward_flops=backward)

    def named(*names: str) -> dict[str, Tensor]:
        return {name: tensors[name] for name in names}

    outputs = {name: torch.randn_like(tensors["q"]).requires_grad_() for name in ("o_cmp", "o_slc", "o_win")}
    return [
        make(
            BRANCHES[0], named("q", "k_cmp", "v_cmp"), ("compressed",),
            lambda q, k, v: compressed_attention(q, k, v, nsa, kernel=kernel)[0],
            lambda q, k, v: parity.compressed_rows(q[:, :, at], k, v, at, work.tokens, nsa)[0],
        ),
        make(
            BRANCHES[1], named("q", "k", "v"), ("selected",),
            lambda q, k, v: selected_attention(q, k, v, block_indices, nsa, kernel=kernel),
            lambda q, k, v: parity.selected_rows(q[:, :, at], k, v, at, block_indices[:, :, at], nsa),
        ),
        make(
            BRANCHES[2], named("q", *window_keys), ("window",),
            lambda q, k, v: window_attention(q, k, v, nsa, kernel=kernel),
            lambda q, k, v: parity.window_rows(q[:, :, at], k, v, at, nsa),
        ),
        make(
            BRANCHES[3], {**outputs, **named("gates")}, ("combine",),
            reference.combine,
            lambda *x: reference.combine(*(part[:, :, at].float() for part in x)),
        ),
    ]  # fmt: skip
