"""Which blocks a query selects (eq. 11, 12): forced ones, ties, order, padding; and the needle that must be found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, reference, selected_attention
from nsa_cli.ops.selection import select_blocks
from tests import oracle
from tests.inputs import Strategy, every_strategy


def config_of(n: int, init: int = 0, local: int = 0, block: int = 4) -> NSAConfig:
    return NSAConfig(
        compress_block=block, compress_stride=block, select_block=block, num_selected=n, num_init=init, num_local=local
    )


def choose(importance: list[float], t: int, config: NSAConfig) -> list[int]:
    """What both implementations choose for one query at position t, which must agree."""
    row = torch.tensor(importance, dtype=torch.float32)[None, None, None]
    fast = select_blocks(row, torch.tensor([[t]]), config)
    double = select_blocks(row.double(), torch.tensor([[t]]), config)
    plain = reference.select(row.expand(1, 1, t + 1, -1), config)[:, :, -1:]
    assert fast.dtype == plain.dtype == torch.int32
    assert fast.tolist() == plain.tolist() == double.tolist()
    return fast[0, 0, 0].tolist()


def test_a_forced_block_takes_one_place_and_the_rest_go_to_the_most_important() -> None:
    assert choose([0, 5, 9, 1, 7, 0], 23, config_of(4, init=1, local=2)) == [0, 2, 4, 5]
    assert choose([0, 5, 9, 1, 7, 0], 23, config_of(5, init=1, local=2)) == [0, 1, 2, 4, 5]


def test_a_block_forced_twice_counts_once() -> None:
    # Query 5 is in block 1: init forces 0, local forces 0 and 1; two candidates, two places filled.
    assert choose([3, 1, 0], 5, config_of(4, init=1, local=2)) == [0, 1, -1, -1]
    # Query 9, block 2: init 0, local 1 and 2, all three once; n = 3 leaves nothing free.
    assert choose([3, 1, 8], 9, config_of(3, init=1, local=2)) == [0, 1, 2]
    # Query 13, block 3, init 2 and local 3 share block 1: four candidates, n = 5 covers all.
    assert choose([0, 0, 0, 0], 13, config_of(5, init=2, local=3)) == [0, 1, 2, 3, -1]
    # Query 17, block 4, init 3 and local 3 share block 2: five blocks, one of the six places stays empty.
    assert choose([0, 0, 0, 0, 0], 17, config_of(6, init=3, local=3)) == [0, 1, 2, 3, 4, -1]


def test_equal_importance_goes_to_the_lower_block() -> None:
    assert choose([2, 7, 7, 7, 2, 2], 23, config_of(2)) == [1, 2]
    assert choose([0, 0, 0, 0, 0, 0], 23, config_of(3)) == [0, 1, 2]
    assert choose([0, 4, 4, 0, 0, 0], 23, config_of(5, init=1, local=1)) == [0, 1, 2, 3, 5]


def test_negative_zero_ties_with_zero() -> None:
    assert choose([-0.0, 0.0, -0.0, 0.0], 15, config_of(2)) == [0, 1]


def test_a_query_with_fewer_candidates_than_places_takes_all_and_pads() -> None:
    assert choose([1, 2, 3, 4], 0, config_of(3)) == [0, -1, -1]
    assert choose([1, 2, 3, 4], 3, config_of(3, local=1)) == [0, -1, -1]
    assert choose([1, 2, 3, 4], 4, config_of(3)) == [0, 1, -1]
    assert choose([1, 2], 7, config_of(6)) == [0, 1, -1, -1, -1, -1]


def test_a_block_of_the_future_is_no_candidate_however_important() -> None:
    assert choose([1, 2, 99, 99], 7, config_of(3)) == [0, 1, -1]


def test_the_querys_own_block_is_a_candidate_like_any_other_without_local_blocks() -> None:
    assert choose([5, 0, 1], 11, config_of(1)) == [0]
    assert choose([0, 0, 1], 11, config_of(1)) == [2]


def test_subnormal_differences_decide() -> None:
    assert choose([1e-42, 3e-42, 2e-42, 0], 15, config_of(2)) == [1, 2]


@given(st.data())
def test_selection_is_the_oracles_for_any_importance_with_many_ties(data: st.DataObject) -> None:
    init, local = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    n = data.draw(st.integers(max(1, init + local), 9))
    config = config_of(n, init, local, block=data.draw(st.integers(1, 5)))
    tokens = data.draw(st.integers(1, 40))
    blocks = config.num_select_blocks(tokens)
    level = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.25])
    rows = data.draw(st.lists(level, min_size=2 * blocks, max_size=2 * blocks))
    imp = torch.tensor(rows).reshape(1, 2, 1, blocks).expand(1, 2, tokens, blocks)
    got = select_blocks(imp, torch.arange(tokens)[None], config)
    assert got.tolist() == oracle.select(imp, config).tolist()
    assert reference.select(imp, config).tolist() == got.tolist()


def test_selections_are_not_differentiable_and_carry_no_gradient() -> None:
    config = config_of(2)
    q, k = torch.randn(1, 2, 24, 4, requires_grad=True), torch.randn(1, 1, 6, 4, requires_grad=True)
    _, indices = compressed_attention(q, k, k, config)
    assert indices.dtype == torch.int32
    assert not indices.requires_grad


NEEDLE = NSAConfig(window=64)


def needle_inputs(depths: list[int], tokens: int = 1024, dim: int = 16) -> tuple[torch.Tensor, ...]:
    """One sequence a depth: noise, and one key at that depth which the query meets with a score of 4,000."""
    batch = len(depths)
    k, v = 0.02 * torch.randn(batch, 1, tokens, dim), torch.randn(batch, 1, tokens, dim)
    q = torch.ones(batch, 2, tokens, dim)
    k[range(batch), 0, depths] = 1000.0
    return q, k, v


@every_strategy
def test_the_needle_is_found_at_every_depth(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    tokens = 1024
    for first in range(0, tokens, 256):
        depths = list(range(first, first + 256, 1 if strategy.name == "by-block-at-positions" else 5))
        q, k, v = needle_inputs(depths, tokens)
        k_cmp, v_cmp = (reference.mean_compress(x, NEEDLE) for x in (k, v))
        # The last query and the one just after each needle, all against the whole document.
        at = torch.tensor([[tokens - 1, min(depth + 33, tokens - 1), depth] for depth in depths])
        q = q[:, :, :3]
        _, indices = compressed_attention(q, k_cmp, v_cmp, NEEDLE, positions=at)
        wanted = torch.tensor(depths)[:, None, None, None] // NEEDLE.select_block
        assert (indices == wanted).any(-1).all(), "a needle's block was not selected"
        out = selected_attention(q, k, v, indices, NEEDLE, positions=at)
        assert torch.equal(out, v[range(len(depths)), :, depths][:, :, None].expand_as(out))


def test_every_later_query_finds_the_needle_in_one_pass() -> None:
    for depth in (0, 63, 64, 127, 500, 777, 1023):
        q, k, v = needle_inputs([depth])
        k_cmp, v_cmp = (reference.mean_compress(x, NEEDLE) for x in (k, v))
        _, indices = compressed_attention(q, k_cmp, v_cmp, NEEDLE)
        out = selected_attention(q, k, v, indices, NEEDLE)
        assert (indices[:, :, depth:] == depth // NEEDLE.select_block).any(-1).all()
        assert torch.equal(out[:, :, depth:], v[:, :, depth : depth + 1].expand(1, 2, 1024 - depth, -1))
