"""Where sparse attention has to be dense attention, and what each branch can see, token by token."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, nsa_attention, reference, selected_attention, window_attention
from tests import oracle
from tests.inputs import Strategy, assert_close, every_strategy, make_inputs


@every_strategy
@pytest.mark.parametrize("tokens", [1, 8, 63, 100])
def test_selecting_every_block_is_dense_attention(
    tokens: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=13)
    x, extra = make_inputs(config, tokens, batch=2, heads=6, kv_heads=2), strategy.arguments(2, tokens)
    _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config, **extra)
    out = selected_attention(x.q, x.k, x.v, indices, config, **extra)
    assert_close(out, F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True), 1e-12)
    assert_close(out, oracle.dense(x.q, x.k, x.v), 1e-12)


@every_strategy
@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (50, 50), (50, 51), (77, 4096)])
def test_a_window_over_all_tokens_is_dense_attention(
    tokens: int, window: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config = NSAConfig(window=window)
    x = make_inputs(config, tokens, batch=2, heads=6, kv_heads=2)
    out = window_attention(x.q, x.k, x.v, config, **strategy.arguments(2, tokens))
    assert_close(out, F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True), 1e-12)


@every_strategy
def test_compressed_blocks_of_one_token_are_dense_attention(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config = NSAConfig(compress_block=1, compress_stride=1, select_block=1, compress="mean")
    x = make_inputs(config, 61, heads=6, kv_heads=2)
    k_cmp, v_cmp = reference.mean_compress(x.k, config), reference.mean_compress(x.v, config)
    assert torch.equal(k_cmp, x.k)
    out, _ = compressed_attention(x.q, k_cmp, v_cmp, config, **strategy.arguments(1, 61))
    assert_close(out, F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True), 1e-12)


def test_each_gate_opens_its_own_branch() -> None:
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=9)
    x = make_inputs(config, 80)
    o_cmp, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config)
    o_slc = selected_attention(x.q, x.k, x.v, indices, config)
    o_win = window_attention(x.q, x.k_win, x.v_win, config)
    for i, branch in enumerate((o_cmp, o_slc, o_win)):
        gates = torch.zeros_like(x.gates)
        gates[..., i] = 1.0
        assert_close(nsa_attention(*x.required()[:5], gates, config, **x.extra()), branch, 1e-14)


@every_strategy
@pytest.mark.parametrize("window", [1, 2, 7, 16, 200])
def test_the_window_is_exactly_the_keys_with_a_gradient(
    window: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config, tokens = NSAConfig(window=window), 150
    for t in (0, 1, window - 1, window, 63, 64, 128, tokens - 1):
        if t >= tokens:
            continue
        x = make_inputs(config, tokens, heads=2, kv_heads=1, dim=4).requires_grad()
        out = window_attention(x.q, x.k, x.v, config, **strategy.arguments(1, tokens))
        out[:, :, t].square().sum().backward()
        seen = [s for s in range(tokens) if t - window < s <= t]
        assert len(seen) == min(window, t + 1)
        assert x.v.grad is not None
        assert x.v.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist() == seen
        if len(seen) > 1:  # one key alone has probability 1, whatever it is
            assert x.k.grad is not None
            assert x.k.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist() == seen


@every_strategy
def test_the_selection_is_exactly_the_keys_with_a_gradient(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config, tokens = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4), 103
    for t in (0, 7, 8, 50, tokens - 1):
        x = make_inputs(config, tokens, heads=2, kv_heads=1, dim=4).requires_grad()
        extra = strategy.arguments(1, tokens)
        _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config, **extra)
        selected_attention(x.q, x.k, x.v, indices, config, **extra)[:, :, t].square().sum().backward()
        blocks = {int(j) for j in indices[0, 0, t] if j >= 0}
        seen = [s for s in range(t + 1) if s // config.select_block in blocks]
        assert x.v.grad is not None
        assert x.v.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist() == seen


@every_strategy
def test_the_compressed_branch_sees_exactly_the_complete_blocks(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config, tokens = NSAConfig(compress_block=6, compress_stride=3, select_block=6), 50
    for t in (4, 5, 7, 8, 40, tokens - 1):
        x = make_inputs(config, tokens, heads=2, kv_heads=1, dim=4).requires_grad()
        out, _ = compressed_attention(x.q, x.k_cmp, x.v_cmp, config, **strategy.arguments(1, tokens))
        out[:, :, t].square().sum().backward()
        seen = [c for c in range(15) if c * 3 + 5 <= t]
        assert x.v_cmp.grad is not None
        assert x.v_cmp.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist() == seen


@every_strategy
def test_a_query_that_sees_no_compressed_block_gives_exact_zero_and_zero_gradient(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=8)
    for tokens in (1, 7, 30):
        x = make_inputs(config, tokens, dtype=torch.float32).requires_grad()
        out, indices = compressed_attention(x.q, x.k_cmp, x.v_cmp, config, **strategy.arguments(1, tokens))
        assert not out[:, :, :7].any()
        assert (indices[:, :, :7, 0] == 0).all()
        assert (indices[:, :, :7, 1:] == -1).all()
        (out[:, :, :7] * 3).sum().backward()
        for value in (x.q, x.k_cmp, x.v_cmp):
            assert value.grad is not None
            assert not value.grad.any()
        assert not torch.isnan(out).any()
