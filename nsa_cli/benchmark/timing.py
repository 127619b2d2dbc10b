"""How long something takes: a clock, repeats until a time budget is spent, and the median with its spread.

A clock runs a function and says how many seconds each run took, so that a test can put a clock of its own in. On a
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

Work = Callable[[], Any]
MIN_REPEATS = 3
MAX_REPEATS = 100
LONG_BUDGETS = 3
TICK_S = 1e-7
"""What a run takes at least: some clocks are coarse."""
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
    """Runs a function and returns how many seconds that took."""

    method: str

    def seconds(self, work: Work, setup: Work | None = None, repeats: int = 1) -> list[float]:
        """Run `work` so many times, `setup` untimed before each, to the end on the device too; the seconds of each."""
        ...


class WallClock:
    """`time.perf_counter` around the call: for a CPU."""

    method = "wall clock (perf_counter)"

    def seconds(self, work: Work, setup: Work | None = None, repeats: int = 1) -> list[float]:
        """Run `work`; return the wall time of each run in seconds."""
        elapsed = []
        for _ in range(repeats):
            if setup is not None:
                setup()
            start = time.perf_counter()
            kept = work()
            elapsed.append(time.perf_counter() - start)
            del kept  # freed after the clock has stopped: giving memory back is not the work
        return elapsed


class CudaClock:
    """CUDA events around the call, after overwriting the L2 cache: for a GPU.

    The runs are queued behind one another, as a training loop's steps and `triton.testing.do_bench`'s are: the first of them
    waits for the host, the others only if the host takes longer than the GPU.
    """

    method = "CUDA events, runs queued, L2 flushed before each"

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, work: Work, setup: Work | None = None, repeats: int = 1) -> list[float]:
        """Run `work`; return the seconds between the events before and after each run."""
        spans = []
        torch.cuda.synchronize(self._flush.device)
        for _ in range(repeats):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if setup is not None:
                setup()
            self._flush.zero_()
            start.record()
            kept = work()
            stop.record()
            del kept
            spans.append((start, stop))
        torch.cuda.synchronize(self._flush.device)
        return [float(start.elapsed_time(stop)) / 1e3 for start, stop in spans]


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
    untimed, before each repeat. before: seconds of runs that were timed already, and count. The first repeat says how many
    more go into the budget; these are timed in one go. When the next, at the length of the last, would not fit into
    remaining_s() (the whole report's time), the repeats end early, but never before the first.
    """
    seconds = list(before)
    while (missing := _missing(seconds, budget_s, min_repeats, max_repeats)) > 0:
        if seconds:
            missing = min(missing, int(max(0.0, min(remaining_s() / max(seconds[-1], TICK_S), max_repeats))))
        if missing == 0:
            break
        seconds += clock.seconds(work, setup, missing)
    return summarize(seconds)


def _missing(seconds: Sequence[float], budget_s: float, min_repeats: int, max_repeats: int) -> int:
    """How many repeats are still to be made, as far as those made tell."""
    if not seconds:
        return 1
    count, spent_s = len(seconds), sum(seconds)

    def until(total_s: float) -> int:
        return math.ceil(max(0.0, total_s - spent_s) / max(seconds[-1], TICK_S))

    wanted = max(until(budget_s), min(min_repeats - count, until(LONG_BUDGETS * budget_s)))
    return min(wanted, max_repeats - count)


class Deadline:
    """What is left of a report's time, and whether a case of an expected cost still fits.

    stopped: whether the user wants the report to end now, asked before everything that would take time.
    """

    def __init__(
        self, limit_s: float, now: Callable[[], float] = time.perf_counter, *, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._now, self._start, self._limit_s, self.stopped = now, now(), limit_s, stopped

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._start

    def remaining_s(self) -> float:
        """Seconds left; negative when the limit has passed, none once stopped."""
        return 0.0 if self.stopped() else self._limit_s - self.elapsed_s

    def allows(self, expected_s: float) -> bool:
        """Whether something of that length would end in time."""
        return expected_s <= self.remaining_s()
