"""The residual stream of a decoding step, and the tiles of Hopper's tensor cores behind it, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.ops.triton import linear_tiles
from nsa_cli.ops.triton.device import has_tiles
from nsa_cli.ops.triton.linear_tiles import CHIP, CHUNK, choose_tile
from nsa_cli.ops.triton.residual import MOST_TILES, Residual, make_counters, multiply
from tests.inputs import relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
HOPPER = has_tiles(torch.device(DEVICE))
needs_tiles = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def _pass(x: Tensor, ways: list[Tensor], norms: list[Tensor], act: str, gated: bool, stream: bool) -> tuple[Tensor, Tensor]:
    """Two layers' feed-forward and the logits; by `Residual`, or in the tensors' own precision by PyTorch."""
    w1, w3, w2, last = ways
    if stream:
        out = torch.empty(len(x), len(last), dtype=torch.float32, device=x.device)
        residual = Residual(x, norms, EPS, make_counters(x.device))
        for _ in "ab":
            residual.add(residual.project(w1, act=act, gate_weight=w3 if gated else None), w2)
        return residual.x, residual.project(last, out=out)
    for norm in norms[:-1]:
        n = F.rms_norm(x, norm.shape, norm, EPS)
        y = n @ w1.mT
        y = F.gelu(y) if act == "gelu" else F.silu(y)
        x = x + (y * (n @ w3.mT) if gated else y) @ w2.mT
    return x, F.rms_norm(x, norms[-1].shape, norms[-1], EPS) @ last.mT


def _errors(rows: int, dim: int, hidden: int, dtype: torch.dtype, act: str, gated: bool) -> tuple[float, float]:
    """Of the stream and of the logits; asserts that a second pass has the same bits."""
    torch.manual_seed(rows)
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden), (37, dim))
    ways = [(torch.randn(*shape, device=DEVICE) * shape[1] ** -0.5).to(dtype) for shape in shapes]
    norms = [(torch.rand(dim, device=DEVICE) + 0.5).to(dtype) for _ in range(3)]
    x = torch.randn(rows, dim, device=DEVICE).to(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # weights are read before the kernel launched last is done
    with poisoned(torch.device(DEVICE)):
        got, again = (_pass(x.clone(), ways, norms, act, gated, True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    want = _pass(x.double(), [w.double() for w in ways], [norm.double() for norm in norms], act, gated, False)
    stream, logits = (relative_l2(a, b) for a, b in zip(got, want, strict=True))
    return stream, logits


@pytest.mark.parametrize("rows", [2, 6])
def test_a_stream_is_pytorchs_by_whatever_multiplies(rows: int) -> None:
    assert max(_errors(rows, 24, 40, torch.float32, "gelu", False)) < 1e-5
    assert max(_errors(rows, 24, 40, torch.float32, "silu", True)) < 1e-5


@pytest.mark.gpu
@needs_tiles
@pytest.mark.parametrize("rows", [5, 40, 128])
def test_tiles_are_pytorchs_at_any_size_on_a_gpu(rows: int) -> None:
    assert max(_errors(rows, 72, 40, torch.bfloat16, "gelu", False)) < 1e-2
    assert max(_errors(rows, 1000, 264, torch.bfloat16, "silu", True)) < 1e-2
    assert max(_errors(rows, 384, 1536, torch.float16, "gelu", False)) < 2e-3


def _set_errors(sets: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> list[float]:
    """Of gelu(x w^T) of each of several products at once; asserts that a second time gives the same bits."""
    torch.manual_seed(rows)
    x = torch.randn(sets, rows, inner, device=DEVICE).to(dtype)
    w = (torch.randn(sets, columns, inner, device=DEVICE) * inner**-0.5).to(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # weights are read before the kernel launched last is done
    counters = make_counters(x.device)
    with poisoned(torch.device(DEVICE)):
        got, again = (multiply(x, w, act="gelu", counters=counters) for _ in "ab")
    assert torch.equal(got, again)
    assert not counters.any()
    want = F.gelu(x.double() @ w.double().mT)
    return [relative_l2(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_several_products_at_once_are_each_its_own(rows: int) -> None:
    assert max(_set_errors(3, rows, 40, 24, torch.float32)) < 1e-5


@pytest.mark.gpu
@needs_tiles
@pytest.mark.parametrize("rows", [2, 5, 40, 128])
def test_several_products_at_once_are_each_its_own_by_tiles_on_a_gpu(rows: int) -> None:
    assert max(_set_errors(2, rows, 2048, 64, torch.bfloat16)) < 6e-3
    assert max(_set_errors(2, rows, 72, 40, torch.bfloat16)) < 6e-3
    assert max(_set_errors(3, rows, 1000, 264, torch.float16)) < 2e-3


@pytest.mark.gpu
@needs_tiles
def test_counters_are_zeros_again_behind_shared_sums_on_a_gpu() -> None:
    x, w = torch.randn(64, 4096, device="cuda").bfloat16(), torch.randn(1024, 4096, device="cuda").bfloat16()
    counters = make_counters(x.device)
    torch.cuda.synchronize()
    residual = Residual(torch.zeros(64, 1024, dtype=x.dtype, device="cuda"), w[:2, :1024], EPS, counters)
    residual.add(x, w)
    assert residual.ahead is not None
    assert relative_l2(residual.x, x.double() @ w.double().mT) < 6e-3
    assert not counters.any()


@given(
    rows=st.integers(1, 128), inner=st.integers(1, 2**15), columns=st.integers(1, 2**18), gated=st.booleans(),
    cores=st.sampled_from([78, 132]), sets=st.integers(1, 2),
)  # fmt: skip
def test_a_tile_fits_on_a_chip_and_covers_the_inner_dimension(
    rows: int, inner: int, columns: int, gated: bool, cores: int, sets: int
) -> None:
    tile = choose_tile(rows, inner, columns, gated, cores, sets)
    if tile is None:
        return
    chunks = -(-inner // (tile.splits * CHUNK))
    weights = chunks * tile.columns * CHUNK * 2 * (1 + gated)
    assert weights + tile.stages * tile.rows * CHUNK * 2 <= CHIP
    assert tile.stages >= min(chunks, 2)
    assert tile.splits * chunks * CHUNK >= inner
    assert 64 in (tile.rows, tile.columns)  # what the product's left side has
    assert sets * -(-columns // tile.columns) * -(-rows // tile.rows) <= MOST_TILES


def test_other_sizes_are_left_to_other_ways() -> None:
    x = torch.randn(6, 24).bfloat16()
    for other in (x[:2], x.float(), x[:, :20].contiguous(), x.flatten()[1:97].view(4, 24)):
        assert linear_tiles.find_tile(other, other, None) is None
    assert choose_tile(64, 16384, 4096, False, 132) is None  # the library's, when weights take longer than launches
