"""Random inputs for the ops, and the geometries that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops import torch_backend
from tests import oracle

# All have 12 selection blocks and more at these lengths, and at least two free places: shorter inputs select
# everything and cannot show a leak through selection.
LONG = [
    (NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=5, window=12), 107),
    (NSAConfig(compress_block=8, compress_stride=8, select_block=8, num_selected=4, num_local=1, window=5), 101),
    (
        NSAConfig(
            compress_block=4, compress_stride=4, select_block=12, num_selected=3, num_init=0, num_local=0, window=1
        ),
        151,
    ),
    (NSAConfig(compress_block=32, compress_stride=16, select_block=64, num_selected=5, window=96), 13 * 64 - 7),
]


def name_of(case: object) -> str:
    """Short id of a geometry for pytest."""
    if isinstance(case, tuple) and isinstance(case[0], NSAConfig):
        return f"{name_of(case[0])}-N{case[1]}"
    if isinstance(case, NSAConfig):
        c = case
        return f"l{c.compress_block}d{c.compress_stride}s{c.select_block}n{c.num_selected}w{c.window}"
    return str(case)


@dataclass
class Inputs:
    """All that nsa_attention takes, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    q_cmp: Tensor
    k_win: Tensor
    v_win: Tensor

    def required(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.k_cmp, self.v_cmp, self.gates

    def extra(self) -> dict[str, Tensor]:
        return {"q_cmp": self.q_cmp, "k_win": self.k_win, "v_win": self.v_win}

    def tensors(self) -> dict[str, Tensor]:
        return {member.name: getattr(self, member.name) for member in fields(self)}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        return Inputs(**{name: change(name, x) for name, x in self.tensors().items()})

    def prefix(self, tokens: int, config: NSAConfig) -> Inputs:
        """The first tokens, with the compressed blocks that fit into them."""
        blocks = oracle.num_compressed(tokens, config)
        return self.map(lambda name, x: x[:, :, :blocks] if name in ("k_cmp", "v_cmp") else x[:, :, :tokens])

    def requires_grad(self) -> Inputs:
        return self.map(lambda name, x: x.detach().clone().requires_grad_())


def make_inputs(
    config: NSAConfig,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float64,
    lengths: list[int] | None = None,
    device: str = "cpu",
) -> Inputs:
    """Normal inputs from torch's generator; gates in (0, 1). `lengths`: packed documents in the place of `tokens`."""
    dim_v = dim if dim_v is None else dim_v
    blocks = sum(oracle.num_compressed(length, config) for length in (lengths or [tokens]))
    tokens = sum(lengths) if lengths else tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype)

    return Inputs(
        q=normal(batch, heads, tokens, dim),
        k=normal(batch, kv_heads, tokens, dim),
        v=normal(batch, kv_heads, tokens, dim_v),
        k_cmp=normal(batch, kv_heads, blocks, dim),
        v_cmp=normal(batch, kv_heads, blocks, dim_v),
        gates=normal(batch, heads, tokens, 3).sigmoid(),
        q_cmp=normal(batch, heads, tokens, dim),
        k_win=normal(batch, kv_heads, tokens, dim),
        v_win=normal(batch, kv_heads, tokens, dim_v),
    )


def cu(lengths: list[int]) -> Tensor:
    """int32 [documents + 1] from document lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def assert_close(got: object, want: object, tolerance: float = 1e-10) -> None:
    """Equal within tolerance * max(1, largest |want|), everywhere; NaN never is."""
    got_, want_ = torch.from_numpy(oracle.f64(got)), torch.from_numpy(oracle.f64(want))
    assert got_.shape == want_.shape, (got_.shape, want_.shape)
    if want_.numel():
        error = (got_ - want_).abs().max().item()
        assert error <= tolerance * max(1.0, want_.abs().max().item()), f"off by {error:.3e}"


def relative_l2(got: object, want: object) -> float:
    got_, want_ = torch.from_numpy(oracle.f64(got)), torch.from_numpy(oracle.f64(want))
    return float((got_ - want_).norm() / want_.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class Strategy:
    """One way that the torch kernel may take: sizes decide, and a test forces it by moving the thresholds."""

    name: str
    patches: dict[str, Any] = field(default_factory=dict)
    explicit_positions: bool = False

    def force(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in self.patches.items():
            monkeypatch.setattr(torch_backend, name, value)

    def arguments(self, batch: int, tokens: int) -> dict[str, Any]:
        """Keyword arguments that the ops need for it."""
        return {"positions": torch.arange(tokens).expand(batch, tokens)} if self.explicit_positions else {}


_MANY = 10**9
_FUSED = {"FUSED_MASK_ELEMENTS": _MANY, "MASKED_UP_TO": _MANY, "WINDOW_FUSED_UP_TO": _MANY}
_CHUNKED = {"FUSED_MASK_ELEMENTS": 0, "MASKED_UP_TO": _MANY}
_BY_BLOCK = {"MASKED_UP_TO": 0, "WINDOW_FUSED_UP_TO": 0}
_SMALL_CHUNKS = {"CHUNK_ELEMENTS": {"cpu": 1}}
_NOT_GATHERED = {"GATHER_QUERIES": 0}
STRATEGIES = [
    Strategy("fused", _FUSED),
    Strategy("chunked", _CHUNKED),
    Strategy("in-small-chunks", {**_CHUNKED, **_SMALL_CHUNKS}),
    Strategy("by-block", _BY_BLOCK),
    Strategy("by-block-in-small-chunks", {**_BY_BLOCK, **_SMALL_CHUNKS}),
    Strategy("gathered", {"GATHER_QUERIES": _MANY}, explicit_positions=True),
    Strategy("fused-at-positions", {**_FUSED, **_NOT_GATHERED}, explicit_positions=True),
    Strategy("chunked-at-positions", {**_CHUNKED, **_SMALL_CHUNKS, **_NOT_GATHERED}, explicit_positions=True),
    Strategy("by-block-at-positions", {**_BY_BLOCK, **_NOT_GATHERED}, explicit_positions=True),
]
MAIN = [strategy for strategy in STRATEGIES if strategy.name in ("fused", "chunked", "by-block", "gathered")]
"""One of each kind, where all nine would tell nothing more."""

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
each_kind_of_strategy = pytest.mark.parametrize("strategy", MAIN, ids=lambda s: s.name)
every_long_case = pytest.mark.parametrize("case", LONG, ids=name_of)
