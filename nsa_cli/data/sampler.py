"""Which tokens a step sees: a pure function of (seed, step), so that a resumed or a split run sees the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Windows = npt.NDArray[np.int64]


def training_batch(
    tokens: npt.NDArray[Any], *, seed: int, step: int, batch: int, context: int, rank: int = 0, world: int = 1
) -> tuple[Windows, Windows]:
    """Inputs and targets of one optimizer step: windows at random starts, drawn uniformly and with replacement.

    start[i] = Philox(key of seed, counter of step)[i] mod (N - context), input i = tokens[start : start + context]
    and its target is one token further on. `batch` counts the windows of the whole step; rank r of w gets the r-th of
    w equal consecutive parts, so that w ranks together see what one rank alone would.

    tokens: 1-D, unsigned, N >= context + 1. Returns two int64 arrays [batch / world, context].
    ValueError when N is too small or `world` does not divide `batch`.
    """
    if not 0 <= rank < world or batch % world:
        raise ValueError(f"batch = {batch}: must be a multiple of world = {world}, and rank = {rank} below it")
    starts = window_starts(step_draws(seed=seed, step=step, count=batch), len(tokens), context)
    share = batch // world
    places = starts[rank * share : (rank + 1) * share, None] + np.arange(context + 1)
    windows = tokens[places].astype(np.int64)
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def step_draws(*, seed: int, step: int, count: int, lane: int = 0) -> npt.NDArray[np.uint64]:
    """The random numbers of one step: Philox(key of seed, counter of step and lane), uniform in 0 .. 2^64 - 1.

    Lanes are independent streams. The raw stream of a bit generator is fixed for good, which Generator.integers is not.
    """
    key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, lane, step]).random_raw(count)


def window_starts(draws: npt.NDArray[np.uint64], tokens: int, context: int) -> npt.NDArray[np.int64]:
    """Where the windows of these draws begin in a text of N tokens: draw mod (N - context), int64 like draws.

    The modulo is biased by at most N / 2^64. ValueError when N < context + 1.
    """
    choices = tokens - context
    if choices < 1:
        raise ValueError(f"{tokens} tokens: must be at least context + 1 = {context + 1}")
    return (draws % np.uint64(choices)).astype(np.int64)


def validation_windows(
    tokens: npt.NDArray[Any], *, context: int, max_tokens: int
) -> Iterator[tuple[Windows, Windows]]:
    """The fixed windows of a validation pass: (input, target) pairs of int64 [context], in the order of the text.

    Windows follow one another without overlap; when they hold more than max_tokens tokens, max_tokens // context of
    them (at least one) are kept, evenly spread. The tail that fills no window is left out. ValueError when N <
    context + 1.
    """
    for start in validation_starts(len(tokens), context=context, max_tokens=max_tokens):
        window = tokens[start : start + context + 1].astype(np.int64)
        yield window[:-1], window[1:]


def validation_starts(tokens: int, *, context: int, max_tokens: int) -> list[int]:
    """Where the windows of a validation pass over so many tokens begin; see `validation_windows`."""
    total = (tokens - 1) // context
    if total < 1:
        raise ValueError(f"{tokens} tokens: must be at least context + 1 = {context + 1}")
    kept = min(total, max(1, max_tokens // context))
    return [place * total // kept * context for place in range(kept)]
