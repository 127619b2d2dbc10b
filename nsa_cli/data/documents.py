"""Windows that keep documents apart: where one begins inside a window, attention and positions start anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from nsa_cli.data.sampler import validation_starts, window_starts

NO_TARGET = -1
"""The target where nothing is to be predicted, as the model takes it."""


class Windows(NamedTuple):
    """Some windows of one length.

    inputs: int64 [n, t]. targets: int64 [n, t], NO_TARGET where nothing is to be predicted. begins: bool [n, t], whether a
    document begins with the token (a window's first one is always taken to), or None: one document a window. source: the part of
    a mixture that they are of, "" where that is not told apart. graded: whether the targets are answers, right or wrong.
    """

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    begins: npt.NDArray[np.bool_] | None = None
    source: str = ""
    graded: bool = False


def join_windows(parts: Sequence[Windows]) -> Windows:
    """Windows of one source and length, one after another."""
    inputs, targets = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    begins = [part.begins for part in parts if part.begins is not None]
    return Windows(inputs, targets, np.concatenate(begins) if begins else None, parts[0].source, parts[0].graded)


@dataclass(frozen=True, eq=False)
class Documents:
    """The tokens [start, stop) of a text that is made of documents.

    tokens: 1-D ids of the whole text. offsets: int64 [documents + 1], ascending from 0 to len(tokens).
    """

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    start: int
    stop: int

    endless: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def packed(self) -> bool:
        """Whether documents may begin inside windows."""
        return len(self.offsets) > 2

    def windows(self, draws: npt.NDArray[np.uint64], *, context: int) -> Windows:
        """A window for each of the 64-bit draws: it begins at draw mod (N - context), as in `training_batch`."""
        return self.windows_at(window_starts(draws, len(self), context), context)

    def places(self, draws: npt.NDArray[np.uint64], *, context: int) -> list[int | str]:
        """Where those windows begin, from `start` on."""
        starts: list[int | str] = window_starts(draws, len(self), context).tolist()
        return starts

    def fixed_windows(self, *, context: int, max_tokens: int) -> Iterator[Windows]:
        """The windows of a validation pass, one at a time, where `validation_windows` puts them."""
        for start in validation_starts(len(self), context=context, max_tokens=max_tokens):
            yield self.windows_at(np.array([start]), context)

    def windows_at(self, starts: npt.NDArray[np.int64], context: int) -> Windows:
        """Windows that begin at these tokens. The last token of a document has no target: what follows is another's."""
        places = self.start + starts
        window = self.tokens[places[:, None] + np.arange(context + 1)].astype(np.int64)
        begins = np.zeros(window.shape, dtype=np.bool_)
        low = np.searchsorted(self.offsets, places, side="left")
        high = np.searchsorted(self.offsets, places + context, side="right")
        for row, place in enumerate(places):
            begins[row, self.offsets[low[row] : high[row]] - place] = True
        targets = np.where(begins[:, 1:], NO_TARGET, window[:, 1:])
        begins[:, 0] = True
        return Windows(window[:, :-1].copy(), targets, begins[:, :-1].copy())
