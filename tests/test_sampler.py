"""Windows as a pure function of (seed, step), whatever the number of ranks, and validation windows that never move."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.data import training_batch, validation_windows

TOKENS = np.arange(50_000, dtype=np.uint16)


@given(st.integers(0, 2**70), st.integers(0, 2**40), st.integers(1, 20), st.integers(1, 9), st.integers(2, 300))
def test_windows_are_consecutive_tokens_and_targets_the_next_ones(
    seed: int, step: int, batch: int, context: int, count: int
) -> None:
    tokens = TOKENS[: count + context]
    inputs, targets = training_batch(tokens, seed=seed, step=step, batch=batch, context=context)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == (batch, context)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(context))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert inputs.min() >= 0
    assert targets.max() < len(tokens)


@given(st.integers(0, 2**32), st.integers(0, 10_000), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_together_see_what_one_rank_sees(seed: int, step: int, world: int) -> None:
    whole = training_batch(TOKENS, seed=seed, step=step, batch=12, context=8)
    parts = [
        training_batch(TOKENS, seed=seed, step=step, batch=12, context=8, rank=rank, world=world)
        for rank in range(world)
    ]
    for side in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[side] for part in parts]), whole[side])


def test_the_windows_of_a_seed_and_step_are_fixed_for_good() -> None:
    inputs, _ = training_batch(TOKENS, seed=1337, step=3, batch=4, context=8)
    assert inputs[:, 0].tolist() == [27037, 38618, 5747, 30905]


def test_steps_and_seeds_draw_independently() -> None:
    starts = {
        (seed, step): tuple(training_batch(TOKENS, seed=seed, step=step, batch=8, context=8)[0][:, 0])
        for seed in (0, 1, 2**64, 2**64 + 1)
        for step in range(100)
    }
    assert len(set(starts.values())) == len(starts)
    everything = [start for row in starts.values() for start in row]
    assert len(set(everything)) > 0.9 * len(everything), "two draws share more windows than chance explains"


def test_every_start_is_drawn_equally_often() -> None:
    counts = np.zeros(100)
    for step in range(200):
        inputs, _ = training_batch(TOKENS[:108], seed=7, step=step, batch=100, context=8)
        np.add.at(counts, inputs[:, 0], 1)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 60 < chi_square < 150, chi_square  # 99 degrees of freedom; fixed seed, so no chance is left
    assert counts.min() > 0


def test_one_window_more_than_the_context_is_enough_and_one_less_is_refused() -> None:
    inputs, targets = training_batch(TOKENS[:9], seed=0, step=0, batch=2, context=8)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets.tolist() == [list(range(1, 9))] * 2
    with pytest.raises(ValueError, match=r"8 tokens: must be at least context \+ 1 = 9"):
        training_batch(TOKENS[:8], seed=0, step=0, batch=2, context=8)
    with pytest.raises(ValueError, match="8 tokens"):
        list(validation_windows(TOKENS[:8], context=8, max_tokens=99))


@pytest.mark.parametrize(("rank", "world"), [(0, 5), (2, 2), (-1, 2)])
def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="batch = 4"):
        training_batch(TOKENS, seed=0, step=0, batch=4, context=8, rank=rank, world=world)


@given(st.integers(1, 12), st.integers(1, 200), st.integers(1, 300))
def test_validation_windows_are_disjoint_in_order_and_within_the_bound(context: int, extra: int, bound: int) -> None:
    tokens = TOKENS[: context + extra]
    pairs = list(validation_windows(tokens, context=context, max_tokens=bound))
    total = (len(tokens) - 1) // context
    assert len(pairs) == min(total, max(1, bound // context))
    starts = [int(inputs[0]) for inputs, _ in pairs]
    assert all(start % context == 0 for start in starts)
    assert all(b - a >= context for a, b in pairwise(starts))
    for inputs, targets in pairs:
        assert inputs.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(inputs, inputs[0] + np.arange(context))
        np.testing.assert_array_equal(targets, inputs + 1)
    again = list(validation_windows(tokens, context=context, max_tokens=bound))
    np.testing.assert_array_equal(np.array(pairs), np.array(again))


def test_a_bounded_validation_pass_is_spread_over_the_whole_text() -> None:
    starts = [int(x[0]) for x, _ in validation_windows(TOKENS[:10_001], context=10, max_tokens=100)]
    assert starts == list(range(0, 10_000, 1000))
