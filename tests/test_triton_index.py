"""The inverted index of a selection against one made with a dictionary, to the number (in the interpreter without a GPU)."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.config import NSAConfig
from tests.inputs import cu

Case = tuple[int, int, list[int], int, int, tuple[int, int, int], int, int]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: dict[str, Case] = {  # batch, groups, documents' tokens, offset, block, free + num_init + num_local, chunk, item
    "one token": (1, 2, [1], 0, 4, (3, 1, 2), 128, 2),
    "every block in every list": (1, 1, [150], 0, 64, (4, 0, 0), 128, 64),
    "units and tiles that end early": (2, 2, [300], 0, 8, (3, 1, 1), 256, 5),
    "items of one query": (1, 3, [129], 0, 16, (2, 1, 0), 128, 1),
    "more places than entries a step": (1, 1, [140], 0, 4, (30, 1, 2), 128, 8),
    "the last queries of a document": (2, 1, [70], 131, 8, (5, 0, 2), 128, 3),
    "packed documents": (1, 2, [1, 37, 0, 90, 5], 0, 4, (4, 1, 2), 128, 4),
    "packed documents, nothing forced": (1, 2, [30, 110], 0, 8, (5, 0, 0), 128, 4),
    "more blocks than a program counts": (1, 1, [400], 0, 4, (2, 1, 1), 384, 4),
}
"""What a GPU does besides: numbers of places that are no power of two, by which its compilers divide in their own ways."""
ON_A_GPU: dict[str, Case] = {
    f"{free} free places, {'packed' if len(lengths) > 1 else 'one document'}": (1, 2, lengths, 0, 16, (free, 1, 2), 1024, 64)
    for free in (1, 2, 3, 5, 6, 7, 9, 12, 13)
    for lengths in ([130, 1, 369, 400], [777])
}


def some_lists(batch: int, groups: int, current: list[int], places: tuple[int, int, int]) -> Tensor:
    """block_indices of queries whose own blocks are `current`. Where none is forced: any blocks, some of the future, and gaps."""
    _, init, local = places
    num = sum(places)
    lists = torch.full((batch * groups * len(current), num), -1, dtype=torch.int32)
    for row in range(len(lists)):
        at = current[row % len(current)]
        forced = set(range(min(init, at + 1))) | set(range(max(0, at + 1 - local), at + 1))
        others = torch.tensor(sorted(set(range(at + 1 if init + local else max(current) + 3)) - forced), dtype=torch.int32)
        chosen = others[torch.randperm(len(others))[: num - len(forced)]]
        if init + local:
            chosen = torch.cat((chosen, torch.tensor(sorted(forced), dtype=torch.int32))).sort().values
        lists[row, torch.randperm(num)[: len(chosen)] if init + local == 0 else slice(len(chosen))] = chosen
    return lists.reshape(batch, groups, len(current), num)


@pytest.mark.parametrize("scratch", [None, 1], ids=["a program a tile", "one program"])
@pytest.mark.parametrize("name", CASES)
def test_the_index_is_the_naive_one(name: str, scratch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_cli.ops.triton import index

    if scratch is not None:
        monkeypatch.setattr(index, "SCRATCH", scratch)
    assert_the_index_is_the_naive_one(CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *ON_A_GPU])
def test_the_index_is_the_naive_one_on_a_gpu(name: str) -> None:
    assert_the_index_is_the_naive_one((CASES | ON_A_GPU)[name])


def assert_the_index_is_the_naive_one(case: Case) -> None:
    from nsa_cli.ops.triton import index
    from nsa_cli.ops.triton.problem import make_documents

    batch, groups, lengths, offset, block, places, chunk, item = case
    free, init, local = places
    tokens = sum(lengths)
    position = [t + offset for length in lengths for t in range(length)]
    current = [p // block for p in position]
    starts = [sum(lengths[:d]) for d, length in enumerate(lengths) for _ in range(length)]
    counts = [-(-length // block) for length in lengths]
    bases = [sum(counts[:d]) for d, length in enumerate(lengths) for _ in range(length)]
    blocks, tables = -(-(tokens + offset) // block), {"start": None, "sel_base": None}
    if len(lengths) > 1:
        config = NSAConfig(compress_block=4, compress_stride=4, select_block=block, num_selected=3, window=8)
        documents = make_documents(cu(lengths), tokens, tokens // 4, config)
        blocks = len(documents.sel_start)
        assert (documents.start.tolist(), documents.sel_base.tolist()) == (starts, bases)
        tables = {"start": documents.start.to(DEVICE), "sel_base": documents.sel_base.to(DEVICE)}
    lists = some_lists(batch, groups, current, places)
    with poisoned(torch.device(DEVICE)):
        got = index.build_index(
            lists.to(DEVICE), select_block=block, num_init=init, num_local=local, blocks=blocks, chunk=chunk, item=item,
            offset=offset, **tables,
        )  # fmt: skip

    units = -(-tokens // chunk)
    queries: dict[int, list[int]] = defaultdict(list)
    for row, chosen in enumerate(lists.flatten(0, 2).tolist()):
        head, t = divmod(row, tokens)
        for place in range(free):
            j = chosen[init + place]
            if 0 <= j <= current[t] and (init + local == 0 or place < current[t] + 1 - init - local):
                queries[(head * units + t // chunk) * blocks + bases[t] + j].append(row * free + place)
    entries, ends, items, item_list, item_start = [], [0], [0], [], []
    for i in range(batch * groups * units * blocks):
        item_start += range(len(entries), len(entries) + len(queries[i]), item)
        item_list += [i] * (len(item_start) - len(item_list))
        entries += queries[i]
        ends.append(len(entries))
        items.append(len(item_list))
    assert (got.units, got.blocks, got.chunk, got.item) == (batch * groups * units, blocks, chunk, item)
    assert got.ends.tolist() == ends
    assert got.items.tolist() == items
    assert got.entries[: len(entries)].tolist() == entries
    assert got.item_list[: len(item_list)].tolist() == item_list
    assert got.item_start[: len(item_list)].tolist() == item_start
    assert got.most_items(got.units, len(got.entries)) >= len(item_list)
