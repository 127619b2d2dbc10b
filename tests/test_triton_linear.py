"""Products of few rows with norm, activation, gate and sum, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.ops.triton import linear as module
from nsa_cli.ops.triton.linear import Tile, can_multiply, linear
from tests.inputs import relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def _check(
    rows: int, inner: int, out: int, dtype: torch.dtype, act: str | None, norm: bool, gated: bool, add: bool,
    tile: Tile | None = None,
) -> float:  # fmt: skip
    """The error; asserts that a second call has the same bits."""
    x, w, gate = (torch.randn(n, inner, device=DEVICE).to(dtype) for n in (rows, out, out))
    weight = torch.rand(inner, device=DEVICE) + 0.5
    before = torch.randn(rows, out, device=DEVICE).to(dtype)
    n = F.rms_norm(x.double(), (inner,), weight.double(), EPS) if norm else x.double()
    y = n @ w.double().mT
    y = y if act is None else (F.gelu(y) if act == "gelu" else F.silu(y))
    y = y * (n @ gate.double().mT) if gated else y
    y = y + before.double() if add else y

    def run() -> Tensor:
        place = before.clone() if add else None
        return linear(
            x, w, norm=weight if norm else None, eps=EPS, act=act, gate_weight=gate if gated else None, add=place, out=place,
            tile=tile,
        )  # fmt: skip

    if DEVICE == "cuda":
        torch.cuda.synchronize()  # weights are read before the kernel launched last is done
    with poisoned(torch.device(DEVICE)):
        first, again = run(), run()
    assert torch.equal(first, again)
    return relative_l2(first, y)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("inner", "out"), [(20, 37), (300, 17)])
def test_products_of_few_rows_are_pytorchs(rows: int, inner: int, out: int) -> None:
    for act, norm, gated, add in ((None, True, False, False), ("gelu", True, False, False), ("silu", True, True, False)):
        assert _check(rows, inner, out, torch.float32, act, norm, gated, add) < 1e-6
    assert _check(rows, inner, out, torch.float32, None, False, False, True) < 1e-6
    assert _check(rows, inner, out, torch.float32, "silu", False, True, True, Tile(8, 2)) < 1e-6


@pytest.mark.skipif(DEVICE != "cpu", reason="what Triton's interpreter shows")
def test_until_it_waits_a_program_reads_constants_alone_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, place, w, norm = torch.randn(2, 24), torch.randn(2, 40), torch.randn(40, 24), torch.rand(24)
    want = place.double() + F.rms_norm(x.double(), (24,), norm.double(), EPS) @ w.double().mT
    held: list[Tensor] = []
    waits = []

    def begin(OVERLAP: object) -> None:
        held[:] = [x.clone(), place.clone()]
        for tensor in (x, place):
            tensor.fill_(float("nan"))

    def wait(OVERLAP: object) -> None:
        assert place.isnan().all()
        waits.append(place.copy_(held[1]))
        x.copy_(held[0])

    monkeypatch.setattr(module, "release", begin)
    monkeypatch.setattr(module, "wait", wait)
    got = linear(x, w, norm=norm, eps=EPS, add=place, out=place, tile=Tile(16, 2))
    assert len(waits) == 3
    assert relative_l2(got, want) < 1e-6


def test_logits_may_have_a_precision_of_their_own() -> None:
    x, w = torch.randn(2, 24, device=DEVICE).half(), torch.randn(50, 24, device=DEVICE).half()
    out = torch.empty(2, 50, dtype=torch.float32, device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert linear(x, w, out=out) is out
    assert relative_l2(out, x.double() @ w.double().mT) < 1e-6


def test_more_rows_than_registers_hold_are_left_to_the_library() -> None:
    assert can_multiply(4, 4096, torch.float32)
    assert not can_multiply(4, 4097, torch.float32)
    assert not can_multiply(5, 16, torch.bfloat16)
    assert not can_multiply(0, 16, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_products_of_a_models_widths_on_a_gpu(rows: int, dtype: torch.dtype, most: float) -> None:
    for inner, out in ((20, 97), (384, 2706), (1024, 1840), (4096, 1024)):
        assert _check(rows, inner, out, dtype, None, True, False, False) < most
        assert _check(rows, inner, out, dtype, None, False, False, True) < most
        assert _check(rows, inner, out, dtype, "silu", True, True, False) < 2 * most
