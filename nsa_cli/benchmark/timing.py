"""How long something takes: a clock, repeats until a time budget is spent, and the median with its spread.

A clock runs a function once and says how many seconds that took, so that a test can put a clock of its own in. On a
GPU the time lies between two CUDA events and the L2 cache is overwritten before each run; on a CPU it is the wall
clock. Nothing here knows what is being timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MIN_REPEATS = 3
MAX_REPEATS = 100
LONG_BUDGETS = 3
FLUSH_BYTES = 256 * 2**20
"""More than any GPU's L2 cache: written before each timed run, so that no input is still there from the last."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of `repeats` runs: the median, and the 10th and 90th percentiles (linear between neighbours)."""

    median_s: float
    p10_s: float
    p90_s: float
    repeats: int


class Clock(Protocol):
    """Runs a function once and returns how many seconds it took."""

    method: str

    def seconds(self, work: Callable[[], Any]) -> float:
        """Run `work` once, to its end on the device too; return its seconds."""
        ...


class WallClock:
    """`time.perf_counter` around the call: for a CPU."""

    method = "wall clock (perf_counter)"

    def seconds(self, work: Callable[[], Any]) -> float:
        """Run `work` once; return its wall time in seconds."""
        start = time.perf_counter()
        kept = work()
        elapsed = time.perf_counter() - start
        del kept  # freed after the clock has stopped: giving memory back is not the work
        return elapsed


class CudaClock:
    """CUDA events around the call, after overwriting the L2 cache: for a GPU.

    The events are on the stream, so that gaps in which the GPU waits for launches count, as they do for a user.
    """

    method = "CUDA events, L2 flushed before each run"

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Run `work` once; return the seconds between the events before and after it."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._flush.device)
        self._flush.zero_()
        start.record()
        kept = work()
        stop.record()
        stop.synchronize()
        del kept
        return float(start.elapsed_time(stop)) / 1e3


def make_clock(device: torch.device) -> Clock:
    """The clock for a device: CUDA events on a GPU, the wall clock elsewhere."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 .. 1) of the values lie, linear between neighbours; ValueError when empty."""
    if not values:
        raise ValueError("values is empty: a percentile needs at least one")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(seconds: Sequence[float]) -> Timing:
    """Median, p10 and p90 of measured seconds."""
    return Timing(
        median_s=percentile(seconds, 0.5),
        p10_s=percentile(seconds, 0.1),
        p90_s=percentile(seconds, 0.9),
        repeats=len(seconds),
    )


def measure(
    work: Callable[[], Any],
    *,
    clock: Clock,
    budget_s: float,
    min_repeats: int = MIN_REPEATS,
    max_repeats: int = MAX_REPEATS,
    setup: Callable[[], Any] | None = None,
    before: Sequence[float] = (),
    remaining_s: Callable[[], float] = lambda: math.inf,
) -> Timing:
    """Run `work` until `budget_s` of timed seconds are spent, at least min_repeats and at most max_repeats times.

    One repeat is enough when it takes LONG_BUDGETS times the budget: long runs vary little, and time is short. setup runs,
    untimed, before each repeat. before: seconds of runs that were timed already, and count. When the next repeat, at the
    length of the last, would not fit into remaining_s() (the whole report's time), the repeats end early, but never before
    the first.
    """
    seconds = list(before)
    while not _enough(seconds, budget_s, min_repeats, max_repeats):
        if seconds and remaining_s() < seconds[-1]:
            break
        if setup is not None:
            setup()
        seconds.append(clock.seconds(work))
    return summarize(seconds)


def _enough(seconds: Sequence[float], budget_s: float, min_repeats: int, max_repeats: int) -> bool:
    count, spent_s = len(seconds), sum(seconds)
    least = 1 if spent_s >= LONG_BUDGETS * budget_s else min_repeats
    return count >= max_repeats or (count >= max(least, 1) and spent_s >= budget_s)


class Deadline:
    """What is left of a report's time, and whether a case of an expected cost still fits."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._start, self._limit_s = now, now(), limit_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._start

    def remaining_s(self) -> float:
        """Seconds left; negative when the limit has passed."""
        return self._limit_s - self.elapsed_s

    def allows(self, expected_s: float) -> bool:
        """Whether something of that length would end in time."""
        return expected_s <= self.remaining_s()
