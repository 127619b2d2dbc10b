"""Gradients against finite differences and against the oracle's formulas; the same bits every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, nsa_attention, reference, selected_attention, window_attention
from tests.inputs import MAIN, Inputs, Strategy, assert_close, every_strategy, make_inputs

SMALL = NSAConfig(compress_block=2, compress_stride=1, select_block=2, num_selected=3, num_local=1, window=3)
MEDIUM = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=9)


@every_strategy
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(11, 2, 1), (7, 3, 3), (9, 6, 2), (1, 2, 1)])
def test_gradients_are_finite_differences_for_every_input(
    tokens: int, heads: int, kv_heads: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(SMALL, tokens, heads=heads, kv_heads=kv_heads, dim=3, dim_v=2).requires_grad()
    extra = strategy.arguments(1, tokens)
    inputs = tuple(value for value in x.tensors().values() if value.numel())

    def whole(*values: Tensor) -> Tensor:
        given = dict(zip((name for name, value in x.tensors().items() if value.numel()), values, strict=True))
        y = Inputs(**{**x.tensors(), **given})
        return nsa_attention(*y.required(), SMALL, **y.extra(), **extra)

    assert gradcheck(whole, inputs, fast_mode=tokens > 1)


@every_strategy
def test_each_branchs_gradients_are_finite_differences_element_by_element(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(SMALL, 8, heads=2, kv_heads=1, dim=2).requires_grad()
    extra = strategy.arguments(1, 8)
    _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, SMALL, **extra)
    assert gradcheck(lambda q, k, v: compressed_attention(q, k, v, SMALL, **extra)[0], (x.q_cmp, x.k_cmp, x.v_cmp))
    assert gradcheck(lambda q, k, v: selected_attention(q, k, v, indices, SMALL, **extra), (x.q, x.k, x.v))
    assert gradcheck(lambda q, k, v: window_attention(q, k, v, SMALL, **extra), (x.q, x.k_win, x.v_win))


def gradients(x: Inputs, run: Any) -> dict[str, Tensor]:
    """Gradients of a fixed random weighting of the output."""
    y = x.requires_grad()
    out = run(y)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    return {name: value.grad for name, value in y.tensors().items() if value.grad is not None}


@every_strategy
def test_every_strategys_gradients_are_the_references(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(MEDIUM, 121, heads=6, kv_heads=2, dim=6, dim_v=5, batch=2)
    want = gradients(x, lambda y: reference.nsa_attention(*y.required(), MEDIUM, **y.extra()))
    strategy.force(monkeypatch)
    extra = strategy.arguments(2, 121)
    got = gradients(x, lambda y: nsa_attention(*y.required(), MEDIUM, **y.extra(), **extra))
    assert got.keys() == want.keys()
    assert len(got) == 9
    for name in got:
        assert_close(got[name], want[name], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_strategy
def test_gradients_come_in_the_inputs_dtype_and_precision(
    dtype: torch.dtype, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make_inputs(MEDIUM, 70, heads=4, kv_heads=2, dtype=dtype)
    _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, MEDIUM)

    def branches(y: Inputs, **extra: Any) -> Tensor:
        o_cmp, _ = compressed_attention(y.q_cmp, y.k_cmp, y.v_cmp, MEDIUM, **extra)
        o_slc = selected_attention(y.q, y.k, y.v, indices, MEDIUM, **extra)
        return reference.combine(o_cmp, o_slc, window_attention(y.q, y.k_win, y.v_win, MEDIUM, **extra), y.gates)

    want = gradients(x.map(lambda name, value: value.double()), branches)
    strategy.force(monkeypatch)
    got = gradients(x, lambda y: branches(y, **strategy.arguments(1, 70)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for name in want:
        assert got[name].dtype == dtype
        assert (got[name].double() - want[name]).norm() / want[name].norm() < tolerance, name


def test_only_what_requires_a_gradient_gets_one() -> None:
    x = make_inputs(MEDIUM, 40)
    for name in x.tensors():
        y = x.map(lambda other, value, name=name: value.detach().clone().requires_grad_(other == name))
        nsa_attention(*y.required(), MEDIUM, **y.extra()).sum().backward()
        assert {other for other, value in y.tensors().items() if value.grad is not None} == {name}


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits_forward_and_backward(
    dtype: torch.dtype, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(MEDIUM, 201, heads=4, kv_heads=2, dtype=dtype)
    extra = strategy.arguments(1, 201)
    outputs: list[Tensor] = []

    def run(y: Inputs) -> Tensor:
        outputs.append(nsa_attention(*y.required(), MEDIUM, **y.extra(), **extra))
        return outputs[-1]

    first, second = gradients(x, run), gradients(x, run)
    assert torch.equal(outputs[0], outputs[1])
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_threads_do_not_change_a_run() -> None:
    threads = torch.get_num_threads()
    x = make_inputs(MEDIUM, 150, heads=4, kv_heads=2, dim=16, dtype=torch.float32)
    try:
        torch.set_num_threads(2)
        run = lambda y: nsa_attention(*y.required(), MEDIUM, **y.extra())  # noqa: E731
        first, second = gradients(x, run), gradients(x, run)
        for name in first:
            assert torch.equal(first[name], second[name]), name
    finally:
        torch.set_num_threads(threads)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    """The backward is written by hand; differentiating it again must not give silent zeros."""
    for strategy in MAIN[:3]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            strategy.force(monkeypatch)
            x = make_inputs(SMALL, 9).requires_grad()
            out = nsa_attention(*x.required(), SMALL, **x.extra())
            (first,) = torch.autograd.grad(out.square().sum(), x.v, create_graph=True)
            step = 1e-6 * torch.randn_like(x.k)
            try:
                (second,) = torch.autograd.grad(first.square().sum(), x.k)
            except RuntimeError:
                continue
            sums = []
            for moved in (x.k + step, x.k - step):
                y = replace(x, k=moved)
                again = nsa_attention(*y.required(), SMALL, **y.extra())
                sums.append(torch.autograd.grad(again.square().sum(), y.v)[0].square().sum())
            assert_close((second * step).sum() * 1e6, (sums[0] - sums[1]) / 2 * 1e6, 1e-5)
