"""The torch kernel and the whole-matrix reference against the oracle: any geometry, each internal strategy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, nsa_attention, reference, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from tests import oracle
from tests.inputs import (
    STRATEGIES,
    Strategy,
    assert_close,
    each_kind_of_strategy,
    every_strategy,
    make_inputs,
    name_of,
    relative_l2,
)

GEOMETRIES = [
    NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=9),
    NSAConfig(compress_block=8, compress_stride=8, select_block=8, num_selected=3, num_init=0, num_local=1, window=1),
    NSAConfig(compress_block=6, compress_stride=2, select_block=10, num_selected=2, num_init=1, num_local=0, window=30),
    NSAConfig(compress_block=1, compress_stride=1, select_block=1, num_selected=5, num_init=2, num_local=3, window=3),
    NSAConfig(compress_block=5, compress_stride=5, select_block=15, num_selected=1, num_init=0, num_local=0, window=7),
]


@st.composite
def geometries(draw: st.DrawFn) -> NSAConfig:
    stride = draw(st.integers(1, 5))
    length = stride * draw(st.integers(1, 4))
    block = stride * draw(st.integers(length // stride, 6))
    init, local = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    return NSAConfig(
        compress_block=length,
        compress_stride=stride,
        select_block=block,
        num_init=init,
        num_local=local,
        num_selected=max(1, init + local + draw(st.integers(0, 3))),
        window=draw(st.integers(1, 40)),
    )


def check(config: NSAConfig, tokens: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Each branch and the whole against the oracle in float64, the selection included."""
    strategy.force(monkeypatch)
    x = make_inputs(config, tokens, **sizes)
    extra = strategy.arguments(x.q.shape[0], tokens)
    o_cmp, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config, **extra)
    want, p = oracle.compressed(x.q_cmp, x.k_cmp, x.v_cmp, config)
    imp = oracle.importance(p, x.k.shape[1], config)
    assert_close(o_cmp, want)
    oracle.check_selection(indices, imp, config, relative=1e-12)
    o_slc = selected_attention(x.q, x.k, x.v, indices, config, **extra)
    assert_close(o_slc, oracle.selected(x.q, x.k, x.v, indices, config))
    o_win = window_attention(x.q, x.k_win, x.v_win, config, **extra)
    assert_close(o_win, oracle.window(x.q, x.k_win, x.v_win, config))
    out, again = nsa_attention_and_selection(*x.required(), config, **x.extra(), **extra)
    assert torch.equal(again, indices)
    assert_close(out, oracle.nsa(*x.required(), config, **x.extra(), block_indices=indices))


@every_strategy
@pytest.mark.parametrize("config", GEOMETRIES, ids=name_of)
def test_each_strategy_is_the_definition(
    strategy: Strategy, config: NSAConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(config, 67, strategy, monkeypatch, batch=2, heads=6, kv_heads=2, dim=6, dim_v=5)


@given(
    config=geometries(),
    tokens=st.integers(1, 90),
    group=st.sampled_from([1, 2, 3, 4]),
    kv_heads=st.integers(1, 2),
    dim=st.integers(1, 9),
    dim_v=st.integers(1, 9),
    batch=st.integers(1, 2),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 2**31),
)
def test_any_geometry_is_the_definition(
    config: NSAConfig,
    tokens: int,
    group: int,
    kv_heads: int,
    dim: int,
    dim_v: int,
    batch: int,
    strategy: Strategy,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        sizes = {"batch": batch, "heads": group * kv_heads, "kv_heads": kv_heads, "dim": dim, "dim_v": dim_v}
        check(config, tokens, strategy, monkeypatch, **sizes)


@given(config=geometries(), tokens=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_the_reference_is_the_definition(config: NSAConfig, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = make_inputs(config, tokens, heads=4, kv_heads=2, dim=5, dim_v=3)
    o_cmp, indices = reference.compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config)
    want, p = oracle.compressed(x.q_cmp, x.k_cmp, x.v_cmp, config)
    assert_close(o_cmp, want)
    oracle.check_selection(indices, oracle.importance(p, 2, config), config, relative=1e-12)
    out = reference.nsa_attention(*x.required(), config, **x.extra())
    assert_close(out, oracle.nsa(*x.required(), config, **x.extra(), block_indices=indices))
    assert_close(reference.mean_compress(x.k, config), mean_blocks(x.k, config))


def mean_blocks(x: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    blocks = range(oracle.num_compressed(x.shape[2], config))
    means = [x[:, :, list(oracle.compressed_tokens(c, config))].mean(2) for c in blocks]
    return torch.stack(means, 2) if means else x[:, :, :0]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 16])
@each_kind_of_strategy
def test_every_group_size(group: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    check(GEOMETRIES[0], 43, strategy, monkeypatch, heads=2 * group, kv_heads=2, dim=4)


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(1, 2), (2, 1), (64, 128), (80, 80), (96, 33), (128, 64), (192, 128), (256, 256)]
)
@each_kind_of_strategy
def test_every_head_dim_and_values_of_another(
    dim: int, dim_v: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(GEOMETRIES[0], 37, strategy, monkeypatch, heads=2, kv_heads=1, dim=dim, dim_v=dim_v)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 61, 64, 97, 127])
@every_strategy
def test_odd_lengths(tokens: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    check(GEOMETRIES[0], tokens, strategy, monkeypatch, heads=2, kv_heads=1, dim=4)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 47, 48, 63, 64, 65, 127, 331])
@each_kind_of_strategy
def test_odd_lengths_of_the_papers_geometry(
    tokens: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NSAConfig(num_selected=3, window=50)
    check(config, tokens, strategy, monkeypatch, heads=2, kv_heads=1, dim=4)


def test_the_strategies_are_those_that_sizes_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same document with and without forced thresholds: the default choice is one of the tested ones."""
    config = NSAConfig(compress_block=4, compress_stride=4, select_block=4, num_selected=3, window=4)
    for tokens in (3, 48, 49, 200):
        x = make_inputs(config, tokens)
        default = nsa_attention(*x.required(), config, **x.extra())
        for strategy in STRATEGIES:
            with monkeypatch.context() as patched:
                strategy.force(patched)
                forced = nsa_attention(*x.required(), config, **x.extra(), **strategy.arguments(1, tokens))
            assert_close(forced, default, 1e-12)


@every_strategy
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)],
)
def test_every_dtype_computes_in_float32_or_better(
    dtype: torch.dtype, tolerance: float, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    config, tokens = GEOMETRIES[0], 67
    x = make_inputs(config, tokens, dtype=dtype)
    extra = strategy.arguments(1, tokens)
    out, indices = nsa_attention_and_selection(*x.required(), config, **x.extra(), **extra)
    assert out.dtype == dtype
    want = oracle.nsa(*x.required(), config, **x.extra(), block_indices=indices)
    assert relative_l2(out, want) < tolerance
    # The inputs are exact in float64, so that the selection may differ only where float32 cannot tell two blocks apart.
    _, p = oracle.compressed(x.q_cmp, x.k_cmp, x.v_cmp, config)
    oracle.check_selection(indices, oracle.importance(p, 2, config), config, relative=1e-5)


@every_strategy
def test_a_given_scale_replaces_the_default(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    config = GEOMETRIES[0]
    x = make_inputs(config, 50)
    out = nsa_attention(*x.required(), config, **x.extra(), scale=0.9, **strategy.arguments(1, 50))
    assert_close(out, oracle.nsa(*x.required(), config, **x.extra(), scale=0.9))


def test_what_is_left_out_is_q_k_and_v() -> None:
    config = GEOMETRIES[0]
    x = make_inputs(config, 50)
    out = nsa_attention(*x.required(), config)
    assert torch.equal(out, nsa_attention(*x.required(), config, q_cmp=x.q, k_win=x.k, v_win=x.v))
    assert_close(out, oracle.nsa(*x.required(), config))
