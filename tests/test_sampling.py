"""Filters keep what they say, Gumbel-max draws from the filtered softmax, and noise depends on its place alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsa_cli.generation.sampling import (
    GumbelSource,
    SamplingConfig,
    apply_temperature,
    choose,
    filter_logits,
    filter_thres_count,
    gumbel_noise,
    keep_filter_thres,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
)

# Small integers, so that ties are common.
LOGITS = st.lists(st.integers(-4, 4), min_size=1, max_size=12).map(lambda xs: torch.tensor(xs, dtype=torch.float32))
CPU = torch.device("cpu")


def _kept(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero()[:, 0].tolist()


def _ranked(logits: Tensor) -> list[int]:
    """Ids from the highest logit to the lowest, the lower id first among equals."""
    return sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))


@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_the_k_highest_and_the_lower_id_at_a_tie(logits: Tensor, k: int) -> None:
    assert _kept(keep_top_k(logits, k)) == sorted(_ranked(logits)[:k])


@given(LOGITS, st.floats(0, 1))
def test_filter_thres_keeps_the_ceiling_of_its_share_and_at_least_one(logits: Tensor, thres: float) -> None:
    count = max(1, math.ceil(round((1 - thres) * len(logits), 9)))
    assert len(_kept(keep_filter_thres(logits, thres))) in (count, count + 1)
    assert _kept(keep_filter_thres(logits, thres)) == _kept(keep_top_k(logits, filter_thres_count(thres, len(logits))))


@pytest.mark.parametrize(
    ("thres", "vocab", "count"),
    [(0.9, 256, 26), (0.5, 256, 128), (0.7, 10, 3), (0.9, 10, 1), (1.0, 256, 1), (0.0, 256, 256)],
)
def test_filter_thres_counts_in_decimal(thres: float, vocab: int, count: int) -> None:
    assert filter_thres_count(thres, vocab) == count


@given(LOGITS, st.floats(0.001, 1))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits: Tensor, p: float) -> None:
    ranked = _ranked(logits)
    kept = _kept(keep_top_p(logits, p))
    probs = logits.double().softmax(-1)
    assert kept == sorted(ranked[: len(kept)])
    assert float(probs[kept].sum()) >= p - 1e-6
    assert len(kept) == 1 or float(probs[ranked[: len(kept) - 1]].sum()) < p + 1e-6


@given(LOGITS, st.floats(0, 1))
def test_min_p_keeps_tokens_that_are_likely_enough_beside_the_likeliest(logits: Tensor, p: float) -> None:
    probs = logits.double().softmax(-1)
    share = probs / probs.max()
    kept = set(_kept(keep_min_p(logits, p)))
    assert {i for i in range(len(logits)) if share[i] >= p + 1e-6} <= kept
    assert kept <= {i for i in range(len(logits)) if share[i] >= p - 1e-6}
    assert int(logits.argmax()) in kept


@given(LOGITS, st.sampled_from([1e-300, 1e-30, 0.01, 1.0, 3.0, 1e30]))
def test_every_filter_together_leaves_at_least_the_likeliest_and_no_nan(logits: Tensor, temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, top_k=3, filter_thres=0.9, top_p=1e-9, min_p=1.0)
    filtered = filter_logits(logits, config)
    assert _kept(filtered) == [_ranked(logits)[0]]
    assert not filtered.isnan().any()


def test_the_smallest_top_p_still_leaves_the_likeliest() -> None:
    assert _kept(keep_top_p(torch.tensor([0.0, 3.0, 1.0]), 1e-300)) == [1]


def test_filters_work_row_by_row() -> None:
    logits = torch.randn(3, 4, 20)
    config = SamplingConfig(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05)
    together = filter_logits(logits, config)
    for row, whole in zip(logits.flatten(0, 1), together.flatten(0, 1), strict=True):
        torch.testing.assert_close(filter_logits(row, config), whole)


def test_logits_are_not_changed_in_place() -> None:
    logits = torch.randn(2, 30)
    before = logits.clone()
    config = SamplingConfig(top_k=5, filter_thres=0.5, top_p=0.5, min_p=0.5)
    choose(logits, config, torch.zeros(2, 30))
    assert logits.equal(before)


def test_temperature_divides() -> None:
    logits = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(apply_temperature(logits, 0.5).softmax(-1), (logits / 0.5).softmax(-1))


@given(LOGITS)
def test_temperature_zero_takes_the_first_of_the_highest(logits: Tensor) -> None:
    config = SamplingConfig(temperature=0, top_k=2, top_p=0.3)
    assert int(choose(logits, config, None)) == _ranked(logits)[0]


def test_gumbel_max_draws_from_the_filtered_softmax() -> None:
    """100,000 draws: every frequency within five standard deviations, and never a token that a filter removed."""
    logits = torch.tensor([2.0, 1.5, 0.0, -1.0, -3.0])
    config = SamplingConfig(temperature=1.3, top_k=4)
    draws = 100_000
    noise = gumbel_noise(torch.tensor([12345]), 0, draws, 5)[0]
    counts = choose(logits.expand(draws, 5), config, noise).bincount(minlength=5)
    probs = filter_logits(logits, config).softmax(-1)
    assert counts[4] == 0
    deviation = (probs * (1 - probs) / draws).sqrt()
    assert ((counts / draws - probs).abs() <= 5 * deviation).all()


def test_noise_has_the_moments_of_gumbel_and_no_infinities() -> None:
    noise = gumbel_noise(torch.arange(4), 0, 50, 1000).double()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_noise_is_splitmix64_of_its_place() -> None:
    """Against the same arithmetic on Python's integers: it never changes, on any machine."""
    mask = (1 << 64) - 1

    def expected(key: int, position: int, token: int) -> float:
        bits = (key + ((position << 32) + token + 1) * 0x9E3779B97F4A7C15) & mask
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        bits ^= bits >> 31
        return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))

    keys = torch.tensor([0, 7, -(1 << 63), (1 << 63) - 5])
    noise = gumbel_noise(keys, 1000, 3, 11)
    wanted = [[[expected(int(key) & mask, 1000 + p, v) for v in range(11)] for p in range(3)] for key in keys]
    torch.testing.assert_close(noise, torch.tensor(wanted))


@pytest.mark.parametrize("vocab", [5, 256, 20_000])
def test_noise_depends_on_seed_prompt_continuation_and_position_alone(vocab: int) -> None:
    streams = [(0, 0), (0, 1), (1, 0), (5, 3)]
    together = GumbelSource(7, streams, vocab, CPU)
    rows = [together.at(position).clone() for position in range(70)]
    alone = GumbelSource(7, [(5, 3)], vocab, CPU)
    assert all(alone.at(position)[0].equal(rows[position][3]) for position in range(70))
    assert GumbelSource(7, [(1, 0)], vocab, CPU).at(69)[0].equal(rows[69][2])
    different = [*rows[0], rows[1][0], GumbelSource(8, [(0, 0)], vocab, CPU).at(0)[0]]
    assert len({tuple(noise.tolist()) for noise in different}) == len(different)


def test_rows_that_stay_keep_their_noise() -> None:
    whole, part = (GumbelSource(3, [(0, 0), (1, 0), (2, 0)], 256, CPU) for _ in range(2))
    assert part.at(4).equal(whole.at(4))
    part.select(torch.tensor([0, 2]))
    for position in (5, 63, 64, 200):
        assert part.at(position).equal(whole.at(position)[[0, 2]])


@pytest.mark.gpu
def test_a_gpu_makes_the_same_noise() -> None:
    keys = torch.tensor([1, -(1 << 62)])
    torch.testing.assert_close(gumbel_noise(keys.cuda(), 9, 4, 300).cpu(), gumbel_noise(keys, 9, 4, 300))


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(3, 10)
    ids = torch.tensor([1, 0, 9])
    wanted = logits.double().softmax(-1).log()[torch.arange(3), ids].float()
    torch.testing.assert_close(log_probabilities(logits, ids), wanted)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_k", True),
        ("filter_thres", -0.1),
        ("filter_thres", 1.1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("min_p", 2),
        ("max_tokens", -1),
        ("continuations", 0),
        ("seed", -1),
    ],
)
def test_a_wrong_value_is_refused_by_field_value_and_rule(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} = {value!r}: must be"):
        SamplingConfig(**{field: value})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().seed = 3  # type: ignore[misc]
