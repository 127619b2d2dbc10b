"""Several sources as one: each window comes from one of them, chosen by weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nsa_cli.data.documents import Windows


class Source(Protocol):
    """What windows come from. A window is a function of one 64-bit draw alone, so that a run can go on anywhere."""

    def __len__(self) -> int:
        """Tokens."""

    @property
    def packed(self) -> bool:
        """Whether documents may begin inside windows."""

    @property
    def endless(self) -> bool:
        """Whether windows are made rather than cut from tokens."""

    def windows(self, draws: npt.NDArray[np.uint64], *, context: int) -> Windows:
        """A window for each draw."""

    def places(self, draws: npt.NDArray[np.uint64], *, context: int) -> list[int | str]:
        """Where those windows come from, for somebody who looks for a bad one."""

    def fixed_windows(self, *, context: int, max_tokens: int) -> Iterator[Windows]:
        """The windows of a validation pass, the same every time, one at a time."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights: of the parts, above 0, relative to their sum. names: of the parts, in validation; "" is not told apart."""

    parts: tuple[Source, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def packed(self) -> bool:
        return any(part.packed for part in self.parts)

    @property
    def endless(self) -> bool:
        return any(part.endless for part in self.parts)

    def windows(self, draws: npt.NDArray[np.uint64], *, context: int) -> Windows:
        """A window for each draw, from the part that a hash of the draw chooses."""
        chosen = self._chosen(draws)
        inputs = np.empty((len(draws), context), dtype=np.int64)
        targets, begins = np.empty_like(inputs), np.zeros(inputs.shape, dtype=np.bool_)
        for number, part in enumerate(self.parts):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                windows = part.windows(draws[rows], context=context)
                inputs[rows], targets[rows] = windows.inputs, windows.targets
                if windows.begins is not None:
                    begins[rows] = windows.begins
        begins[:, 0] = True
        return Windows(inputs, targets, begins)

    def places(self, draws: npt.NDArray[np.uint64], *, context: int) -> list[int | str]:
        """The part's name (or number) and the place in it."""
        found: list[int | str] = []
        for number, draw in zip(self._chosen(draws), draws, strict=True):
            (place,) = self.parts[number].places(np.array([draw]), context=context)
            found.append(f"{self.names[number] or number}:{place}")
        return found

    def _chosen(self, draws: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """The part of each draw."""
        bounds = np.cumsum(self.weights) / sum(self.weights)
        return np.searchsorted(bounds[:-1], _uniform(draws), side="right")

    def fixed_windows(self, *, context: int, max_tokens: int) -> Iterator[Windows]:
        """Each part's own windows, its share of max_tokens by weight, at least one."""
        for part, weight, name in zip(self.parts, self.weights, self.names, strict=True):
            share = round(max_tokens * weight / sum(self.weights))
            for window in part.fixed_windows(context=context, max_tokens=share):
                yield window._replace(source=name)


def _uniform(draws: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each draw, by splitmix64's mixing: what the draw itself is used for does not show in it."""
    with np.errstate(over="ignore"):
        z = draws + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
