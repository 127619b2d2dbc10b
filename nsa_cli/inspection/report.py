"""The shape of an inspection: dataclasses, their JSON and their arrays. Numbers only; how they look is cli/output.py's.

Token ranges are inclusive and count from 0 in the prompt as it was inspected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_cli.inspection.statistics import SelectionStatistics, Tag


@dataclass(frozen=True, kw_only=True)
class CompressedBlock:
    """Compressed block number `block`, visible to the query: its tokens are first .. last."""

    block: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class HeadView:
    """One query head: its probability of every visible compressed block (they sum to 1), and its gates (0 to 1)."""

    head: int
    group: int
    scores: tuple[float, ...]
    gate_cmp: float
    gate_slc: float
    gate_win: float


@dataclass(frozen=True, kw_only=True)
class SelectedBlock:
    """One selected block: the tokens first .. last of it that the query may see, why it is there, its importance."""

    block: int
    first: int
    last: int
    tag: Tag
    importance: float


@dataclass(frozen=True, kw_only=True)
class GroupSelection:
    """What one key/value group selected: ascending, at most n blocks; importance of every candidate 0 .. t // l'."""

    group: int
    importance: tuple[float, ...]
    selected: tuple[SelectedBlock, ...]
    statistics: SelectionStatistics


@dataclass(frozen=True, kw_only=True)
class QueryView:
    """One query of one layer. `blocks` are the visible compressed ones, which every head's `scores` follow."""

    layer: int
    query: int
    blocks: tuple[CompressedBlock, ...]
    heads: tuple[HeadView, ...]
    groups: tuple[GroupSelection, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Views of every chosen layer and, inside a layer, every chosen query; heads and groups as chosen."""

    kernel: str
    geometry: dict[str, Any]
    ids: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    queries: tuple[int, ...]
    views: tuple[QueryView, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, lossless: `json.dumps` keeps every bit of a float; None where there is no number."""
        plain: dict[str, Any] = _lists(dataclasses.asdict(self))
        return {"tokens": len(self.ids), **plain}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as arrays for `numpy.savez`, none of them of dtype object.

        L layers, Q queries, H heads, G groups as chosen; C compressed and J selection blocks that the newest of the
        queries sees; n places. ids [tokens], layers [L], queries [Q], heads [H], groups [G]: int64.
        scores: float32 [L, Q, H, C]; importance: float32 [L, Q, G, J]; 0 where a query does not see the block.
        gates: float32 [L, Q, H, 3], in the order cmp slc win.
        block_indices: int32 [L, Q, G, n], -1 padded; tags: str [L, Q, G, n], empty where padded.
        compressed_ranges, selection_ranges: int64 [C, 2] and [J, 2], first and last token.
        entropy_nats, entropy_share, selected_share, changed: float64 [L, Q, G], NaN where there is no number.
        """
        blocks = max((view.blocks for view in self.views), key=len, default=())
        width = max((len(group.importance) for view in self.views for group in view.groups), default=0)
        places, block = self.geometry["num_selected"], self.geometry["select_block"]
        shape = (len(self.layers), len(self.queries))
        starts = block * np.arange(width)
        last = np.minimum(starts + block - 1, len(self.ids) - 1)

        def heads(values: Callable[[HeadView], Any], size: int, dtype: Any) -> NDArray[Any]:
            rows = [_padded(values(head), size, 0.0) for view in self.views for head in view.heads]
            return np.array(rows, dtype=dtype).reshape(*shape, len(self.heads), size)

        def groups(values: Callable[[GroupSelection], Any], size: int, fill: Any, dtype: Any) -> NDArray[Any]:
            rows = [_padded(values(group), size, fill) for view in self.views for group in view.groups]
            return np.array(rows, dtype=dtype).reshape(*shape, len(self.groups), size)

        def statistic(name: str) -> NDArray[np.float64]:
            missing = float("nan")

            def value(group: GroupSelection) -> list[float]:
                number = getattr(group.statistics, name)
                return [missing if number is None else number]

            return groups(value, 1, missing, np.float64)[..., 0]

        return {
            "ids": np.array(self.ids, dtype=np.int64),
            "layers": np.array(self.layers, dtype=np.int64),
            "queries": np.array(self.queries, dtype=np.int64),
            "heads": np.array(self.heads, dtype=np.int64),
            "groups": np.array(self.groups, dtype=np.int64),
            "scores": heads(lambda head: head.scores, len(blocks), np.float32),
            "gates": heads(lambda head: (head.gate_cmp, head.gate_slc, head.gate_win), 3, np.float32),
            "importance": groups(lambda group: group.importance, width, 0.0, np.float32),
            "block_indices": groups(lambda group: [s.block for s in group.selected], places, -1, np.int32),
            "tags": groups(lambda group: [s.tag for s in group.selected], places, "", np.dtype("<U5")),
            "compressed_ranges": np.array([(b.first, b.last) for b in blocks], dtype=np.int64).reshape(-1, 2),
            "selection_ranges": np.stack([starts, last], axis=-1).astype(np.int64),
            "entropy_nats": statistic("entropy_nats"),
            "entropy_share": statistic("entropy_share"),
            "selected_share": statistic("selected_share"),
            "changed": statistic("changed"),
        }


def _padded(values: Any, size: int, fill: Any) -> list[Any]:
    return [*values, *[fill] * (size - len(values))]


def _lists(value: Any) -> Any:
    """Tuples become lists, so that what is written is what is read back."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return value
