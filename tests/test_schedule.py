"""The learning rate is a pure function of the step that starts low, peaks at lr and ends where it says."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.config import SCHEDULES, TrainConfig
from nsa_cli.training.schedule import learning_rate, warmup_steps

DECAYING = [name for name in SCHEDULES if name != "constant"]


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "warmup": 10, "lr": 0.5, "min_lr_ratio": 0.1, **fields})


def rates(of: TrainConfig) -> list[float]:
    return [learning_rate(step, of) for step in range(1, of.steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_the_peak(schedule: Any) -> None:
    assert rates(config(schedule=schedule))[:10] == pytest.approx([0.05 * step for step in range(1, 11)])


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 20000])
@pytest.mark.parametrize("warmup", [0, 1, 10, 100000])
def test_a_decay_ends_exactly_at_its_floor(schedule: Any, steps: int, warmup: int) -> None:
    assert learning_rate(steps, config(schedule=schedule, steps=steps, warmup=warmup, lr=3e-4)) == 0.1 * 3e-4


def test_cosine_is_halfway_down_in_the_middle_of_its_decay() -> None:
    assert learning_rate(55, config(schedule="cosine")) == pytest.approx((0.5 + 0.05) / 2)
    quarter = 0.05 + 0.45 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(30, config(schedule="cosine", warmup=10, steps=90)) == pytest.approx(quarter)


def test_linear_falls_by_equal_parts() -> None:
    falls = rates(config(schedule="linear"))[9:]
    assert [a - b for a, b in pairwise(falls)] == pytest.approx([0.45 / 90] * 90)


def test_wsd_stays_at_the_peak_and_decays_over_its_last_part() -> None:
    values = rates(config(schedule="wsd", decay_ratio=0.25))
    assert values[9:75] == [0.5] * 66
    assert values[75:] == pytest.approx([0.5 - 0.45 * step / 25 for step in range(1, 26)])


def test_wsd_without_a_decay_ratio_still_ends_at_the_floor_and_not_before() -> None:
    assert rates(config(schedule="wsd", decay_ratio=0.0))[-2:] == [0.5, 0.05]


def test_constant_never_leaves_the_peak() -> None:
    assert set(rates(config(schedule="constant"))[9:]) == {0.5}


def test_constant_does_not_depend_on_the_number_of_steps() -> None:
    short, long = config(schedule="constant", steps=12), config(schedule="constant", steps=1000)
    assert rates(short) == rates(long)[:12]


@pytest.mark.parametrize("schedule", DECAYING)
def test_a_short_run_warms_up_over_at_most_half_of_it(schedule: Any) -> None:
    short = config(schedule=schedule, steps=20, warmup=100)
    assert warmup_steps(short) == 10
    assert max(rates(short)) == learning_rate(10, short) == 0.5


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_any_schedule_stays_between_zero_and_the_peak_rises_then_never_rises_again(
    schedule: str, steps: int, warmup: int, ratio: float, decay: float
) -> None:
    some = config(schedule=cast(Any, schedule), steps=steps, warmup=warmup, min_lr_ratio=ratio, decay_ratio=decay)
    values = rates(some)
    assert all(0 <= value <= 0.5 * (1 + 1e-12) for value in values)
    after = values[max(0, warmup_steps(some) - 1) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(after))
