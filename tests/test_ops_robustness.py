"""Any strides, memory that was never written, logits of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, nsa_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from tests import oracle
from tests.inputs import Inputs, Strategy, assert_close, every_strategy, make_inputs

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=9)
TOKENS = 101


def run(x: Inputs, **extra: Any) -> Tensor:
    return nsa_attention(*x.required(), CONFIG, **x.extra(), **extra)


def token_major(x: Tensor) -> Tensor:
    """As a projection leaves it: memory [b, t, h, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(x: Tensor) -> Tensor:
    """A head dim that is not contiguous."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_other(x: Tensor) -> Tensor:
    """A step of 2 in tokens and channels, with NaN between."""
    spaced = x.new_full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), float("nan"))
    spaced[:, :, ::2, ::2] = x
    return spaced[:, :, ::2, ::2]


def inside_nan(x: Tensor) -> Tensor:
    """A view into the middle of a larger buffer of NaN, as a cache's prefix is."""
    b, h, t, d = x.shape
    buffer = x.new_full((b + 1, h + 2, t + 9, d + 3), float("nan"))
    buffer[:b, 1 : h + 1, 4 : t + 4, :d] = x
    return buffer[:b, 1 : h + 1, 4 : t + 4, :d]


@every_strategy
@pytest.mark.parametrize("layout", [token_major, channels_first, every_other, inside_nan])
def test_any_strides_give_the_same_result(layout: Any, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, TOKENS, batch=2)
    extra = strategy.arguments(2, TOKENS)
    leaves = x.requires_grad()
    plain = run(leaves, **extra)
    plain.square().sum().backward()
    strided_leaves = x.requires_grad()
    strided = strided_leaves.map(lambda name, value: layout(value))
    assert not any(value.is_contiguous() for value in strided.tensors().values())
    out = run(strided, **extra)
    out.square().sum().backward()
    assert_close(out, plain, 1e-13)
    for name, value in strided_leaves.tensors().items():
        assert_close(value.grad, leaves.tensors()[name].grad, 1e-12)


@every_strategy
def test_expanded_inputs_are_read_and_not_written(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, TOKENS, batch=1, heads=1, kv_heads=1)
    expanded = x.map(lambda name, value: value.expand(3, 4 if name in ("q", "q_cmp", "gates") else 2, -1, -1))
    before = x.map(lambda name, value: value.clone())
    out = run(expanded, **strategy.arguments(3, TOKENS))
    assert_close(out, run(x).expand(3, 4, -1, -1), 1e-12)
    for name, value in x.tensors().items():
        assert torch.equal(value, before.tensors()[name]), f"{name} was changed in place"
    leaf = x.requires_grad()
    expanded = leaf.map(lambda name, value: value.expand(3, 4 if name in ("q", "q_cmp", "gates") else 2, -1, -1))
    run(expanded, **strategy.arguments(3, TOKENS)).sum().backward()
    whole = x.map(lambda name, value: value.expand(3, 4 if name in ("q", "q_cmp", "gates") else 2, -1, -1))
    whole = whole.requires_grad()
    run(whole, **strategy.arguments(3, TOKENS)).sum().backward()
    for name, value in leaf.tensors().items():
        grad = whole.tensors()[name].grad
        assert grad is not None
        assert_close(value.grad, grad.sum((0, 1), keepdim=True), 1e-12)


def test_an_expanded_gradient_is_accepted() -> None:
    """sum() sends a gradient whose strides are all 0."""
    x = make_inputs(CONFIG, TOKENS)
    for branch in range(3):
        y, z = x.requires_grad(), x.requires_grad()
        for inputs, expand in ((y, True), (z, False)):
            out = [
                lambda i: compressed_attention(i.q, i.k_cmp, i.v_cmp, CONFIG)[0],
                lambda i: selected_attention(i.q, i.k, i.v, torch.zeros(1, 2, TOKENS, 4).int(), CONFIG),
                lambda i: window_attention(i.q, i.k, i.v, CONFIG),
            ][branch](inputs)
            ones = torch.ones((), dtype=out.dtype).expand_as(out) if expand else torch.ones_like(out)
            out.backward(ones)
        assert y.q.grad is not None
        assert torch.equal(y.q.grad, z.q.grad)


def poisoned(make: Any) -> Any:
    def fill(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = make(*args, **kwargs)
        with torch.no_grad():
            whole = 1 if out.dtype == torch.bool else 99
            return out.fill_(float("nan") if out.is_floating_point() else whole)

    return fill


@every_strategy
def test_memory_that_was_never_written_is_never_read(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    packed = torch.tensor([0, 1, 40, 44, TOKENS], dtype=torch.int32)
    blocks = sum(oracle.num_compressed(n, CONFIG) for n in (1, 39, 4, TOKENS - 44))
    for dtype in (torch.float32, torch.bfloat16):
        x = make_inputs(CONFIG, TOKENS, dtype=dtype)
        y = x.map(lambda name, value: value[:, :, :blocks] if name in ("k_cmp", "v_cmp") else value)
        variants = [(x, strategy.arguments(1, TOKENS))]
        variants += [] if strategy.explicit_positions else [(y, {"cu_seqlens": packed})]
        for inputs, extra in variants:
            clean = inputs.requires_grad()
            want = run(clean, **extra)
            want.float().square().sum().backward()
            with monkeypatch.context() as patched:
                for name in ("empty", "empty_like", "empty_strided"):
                    patched.setattr(torch, name, poisoned(getattr(torch, name)))
                for name in ("new_empty", "new_empty_strided"):
                    patched.setattr(Tensor, name, poisoned(getattr(Tensor, name)))
                dirty = inputs.requires_grad()
                out = run(dirty, **extra)
                out.float().square().sum().backward()
            assert torch.equal(out, want)
            for name, value in clean.tensors().items():
                grad = dirty.tensors()[name].grad
                assert (grad is None) == (value.grad is None)
                assert grad is None or torch.equal(grad, value.grad), f"gradient of {name}"


@every_strategy
def test_pytorchs_own_fill_of_fresh_memory_changes_nothing(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under use_deterministic_algorithms PyTorch fills what its own kernels leave unwritten, too."""
    strategy.force(monkeypatch)
    x, extra = make_inputs(CONFIG, TOKENS), strategy.arguments(1, TOKENS)
    want = run(x, **extra)
    try:
        torch.use_deterministic_algorithms(True)
        y = x.requires_grad()
        out = run(y, **extra)
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, want)
    assert not any(value.grad is None or value.grad.isnan().any() for value in y.tensors().values())


LOGITS = [-1e30, -1e9, -3e4, 3e4, 1e9, 1e30]


@every_strategy
@pytest.mark.parametrize("logit", LOGITS)
def test_logits_of_any_size_leak_nothing_from_hidden_keys(
    logit: float, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All visible keys score `logit`, and a hidden key may not win over them, however low they are."""
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, TOKENS, dtype=torch.float32, dim=1)
    # Every query is 1 and every key `logit`: each branch averages the values that it sees, evenly.
    x = x.map(lambda name, value: value if name in ("v", "v_cmp", "v_win", "gates") else torch.ones_like(value))
    x = x.map(lambda name, value: value * logit if name in ("k", "k_cmp", "k_win") else value)
    out, indices = nsa_attention_and_selection(
        *x.required(), CONFIG, **x.extra(), scale=1.0, **strategy.arguments(1, TOKENS)
    )
    want = oracle.nsa(*x.required(), CONFIG, **x.extra(), scale=1.0, block_indices=indices)
    assert_close(out, want, 1e-5)


@every_strategy
def test_logits_near_the_largest_float_leak_nothing(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are exact: no finite stand-in for minus infinity is low enough for scores of -2e38."""
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, 40, dtype=torch.float32, dim=1)
    fill = {"q": 1.0, "k": -2e38}
    x = x.map(lambda name, value: torch.full_like(value, fill[name[0]]) if name[0] in fill else value)
    extra = {"scale": 1.0, **strategy.arguments(1, 40)}
    out, indices = nsa_attention_and_selection(*x.required(), CONFIG, **x.extra(), **extra)
    want = oracle.nsa(*x.required(), CONFIG, **x.extra(), scale=1.0, block_indices=indices)
    assert_close(out, want, 1e-5)


@every_strategy
def test_one_overwhelming_key_among_large_logits_takes_all(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, TOKENS, dtype=torch.float32)
    x = x.map(lambda name, value: 300 * value if name in ("q", "k", "q_cmp", "k_cmp", "k_win") else value)
    y = x.requires_grad()
    out, indices = nsa_attention_and_selection(
        *y.required(), CONFIG, **y.extra(), **strategy.arguments(1, TOKENS)
    )
    want = oracle.nsa(*x.required(), CONFIG, **x.extra(), block_indices=indices)
    error = (out.double() - torch.from_numpy(want)).norm() / torch.from_numpy(want).norm()
    assert error < 5e-3  # scores of 1e5 carry a float32 rounding of 1e-2, which matters where two are that close
    out.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in y.tensors().values())


@every_strategy
def test_the_gradient_is_right_at_logits_of_hundreds(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, 60, dtype=torch.float32)
    x = x.map(lambda name, value: 15 * value if name in ("q", "k", "q_cmp", "k_cmp", "k_win") else value)
    _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, CONFIG)
    grads = []
    for y in (x.requires_grad(), x.map(lambda name, value: value.double()).requires_grad()):
        out = compressed_attention(y.q_cmp, y.k_cmp, y.v_cmp, CONFIG, **strategy.arguments(1, 60))[0]
        out = out + selected_attention(y.q, y.k, y.v, indices, CONFIG, **strategy.arguments(1, 60))
        (out + window_attention(y.q, y.k_win, y.v_win, CONFIG, **strategy.arguments(1, 60))).square().sum().backward()
        grads.append({name: value.grad for name, value in y.tensors().items() if value.grad is not None})
    for name, want in grads[1].items():
        assert (grads[0][name].double() - want).norm() / want.norm() < 1e-3, name
