"""The choice of blocks from every head's block sums, in Triton's interpreter; what stores them needs a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_cli.benchmark.parity import check_selection
from nsa_cli.config import NSAConfig
from nsa_cli.ops import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: tests/test_triton_gpu.py")

TILE, HEADROOM = 128, 12


def stored(scores: Tensor) -> tuple[Tensor, Tensor]:
    """sums and marks of scores [b, h, t, tiles, TILE] in log2 units: from the last tile that a row sees to the first."""
    b, h, t, tiles, _ = scores.shape
    sums = torch.full((b, h, t, tiles, TILE // 4), math.nan, dtype=torch.float16)
    marks = torch.full((b, h, t, tiles, 2), math.nan)
    for row in range(t):
        seen = [tile for tile in range(tiles) if bool((scores[0, 0, row, tile] > -math.inf).any())]
        top = torch.full((b, h), -1e30, dtype=scores.dtype)
        for tile in reversed(seen):
            tile_scores = scores[:, :, row, tile]
            top = torch.maximum(top, tile_scores.amax(-1) - HEADROOM)
            p = torch.exp2(tile_scores - top[..., None]).unflatten(-1, (-1, 4))
            before = torch.nn.functional.pad(p[..., :-1, 3], (1, 0))
            sums[:, :, row, tile] = (2 * p[..., :3].sum(-1) + p[..., 3] + before).half()
            marks[:, :, row, tile] = torch.stack([top, p[..., -1, 3]], -1).float()
    return sums, marks


@pytest.mark.parametrize(("tokens", "offset"), [(1, 0), (2, 0), (129, 0), (270, 0), (131, 140)])
def test_blocks_are_chosen_by_the_importance_that_sums_of_tiles_and_their_edges_add_up_to(tokens: int, offset: int) -> None:
    from nsa_cli.ops.triton import selection

    config = NSAConfig(compress_block=2, compress_stride=1, select_block=4, num_selected=9, window=4)
    b, h, g, dim = 1, 4, 2, 16
    keys = config.num_compressed(tokens + offset)
    tiles = max(-(-keys // TILE), 1)
    q, k = torch.randn(b, h, tokens, dim, dtype=torch.float64) * 3, torch.randn(b, g, keys, dim, dtype=torch.float64)
    at = torch.arange(offset, offset + tokens)
    scores = (q @ k.repeat_interleave(h // g, 1).mT) * (dim**-0.5 * math.log2(math.e))
    seen = torch.arange(keys) + 1 <= at[:, None]  # block c ends with token c + 1
    scores = torch.nn.functional.pad(scores.masked_fill(~seen, -math.inf), (0, tiles * TILE - keys), value=-math.inf)
    lse = torch.logsumexp(scores * math.log(2), -1) / math.log(2)
    probabilities = torch.exp2(scores - lse[..., None]).nan_to_num(0.0)[..., :keys]
    importance = reference.importance(probabilities.unflatten(1, (g, h // g)), tokens + offset, config)
    sums, marks = stored(scores.unflatten(-1, (tiles, TILE)))
    indices = torch.empty(b, g, tokens, config.num_selected, dtype=torch.int32)
    words = 1 << (-(-config.num_select_blocks(tokens + offset) // 32) - 1).bit_length()
    selection.select_from_sums[(b * g * tokens,)](
        sums, marks, torch.where(lse > -math.inf, lse, math.inf).transpose(1, 2).float().contiguous(), indices, 0, tokens,
        tokens, offset, tiles, G=g, R=h // g, LENGTH=2, STRIDE=1, BLOCK=4, NUM=9, NUM_INIT=1, NUM_LOCAL=2, PLACES=16, WORDS=words,
        AT_ONCE=2,
    )  # fmt: skip
    wrong = check_selection(indices, importance, at, config, 1e-3)
    assert not wrong, wrong


@pytest.mark.parametrize("keys", [1, 127, 300])
def test_spread_keys_give_every_thread_keys_side_by_side_and_zeros_beyond(keys: int) -> None:
    from nsa_cli.ops.triton import selection

    b, g, tiles = 2, 3, -(-keys // TILE)
    k, v = torch.randn(b, g, keys, 12), torch.randn(b, keys, g, 9).transpose(1, 2)
    out = torch.full((2, b, g, tiles * TILE, 16), math.nan)
    selection.spread_keys[(tiles * b * g, 2)](
        k, v, out, keys, b * g, *k.stride()[:3], *v.stride()[:3], G=g, D=12, E=9, WIDTH=16
    )
    for x, spread in zip((k, v), out, strict=True):
        columns = spread.unflatten(2, (tiles, TILE // 8, 4, 2))  # of the tensor cores: a thread has two of eight
        back = columns.transpose(3, 4).flatten(2, 5)
        assert torch.equal(back[:, :, :keys, : x.shape[3]], x)
        assert not back[:, :, keys:].any()
        assert not back[..., x.shape[3] :].any()


def simply(scores: list[float], current: int, num: int, init: int, local: int) -> list[int]:
    """The definition's choice: NaN is infinity, equal importance goes to the lower block."""
    forced = [j for j in range(current + 1) if j < init or j > current - local]
    free = sorted(set(range(current + 1)) - set(forced), key=lambda j: (-math.inf if math.isnan(scores[j]) else -scores[j], j))
    chosen = sorted(forced + free[: num - len(forced)])
    return chosen + [-1] * (num - len(chosen))


@pytest.mark.parametrize("kind", ["different", "few values", "equal", "zeros", "not numbers"])
@pytest.mark.parametrize(
    ("blocks", "num", "init", "local", "base"),
    [(1, 5, 1, 2, 0), (33, 5, 0, 0, 0), (64, 3, 1, 2, 40), (100, 40, 33, 2, 7), (130, 16, 1, 2, 0), (70, 8, 2, 0, 31)],
)
def test_the_choice_among_blocks_is_the_definitions_to_the_last_tie(
    kind: str, blocks: int, num: int, init: int, local: int, base: int
) -> None:
    """base: where the document's blocks begin among all; what a query may not see is larger than all it may."""
    from nsa_cli.ops.triton import selection

    rows = 3
    scores = torch.rand(1, rows, base + blocks + 2)
    if kind == "few values":
        scores = (scores * 4).floor()
    elif kind != "different":
        scores = torch.full_like(scores, 0.37 if kind == "equal" else 0.0)
    if kind == "not numbers":
        scores[torch.rand_like(scores) < 0.1] = math.nan
        scores[torch.rand_like(scores) < 0.1] = math.inf
    last = [blocks - 1, max(blocks - 2, 0), blocks // 2]  # a query's own block
    for row, current in enumerate(last):
        scores[0, row, base + current + 1 :] = 9.0
        scores[0, row, :base] = 9.0
    start = torch.tensor([row - 4 * current for row, current in enumerate(last)], dtype=torch.int32)  # queries are tokens 0, 1, 2
    indices = torch.full((1, rows, num), -7, dtype=torch.int32)
    places, words = 1 << (num - 1).bit_length(), 1 << ((blocks - 1) // 32).bit_length()
    selection.select_top[(rows,)](
        scores, indices, start, torch.full((rows,), base, dtype=torch.int32), 0, rows, rows, 0, scores.shape[2], BLOCK=4, NUM=num,
        NUM_INIT=init, NUM_LOCAL=local, PACKED=True, PLACES=places, WORDS=words,
    )  # fmt: skip
    for row, current in enumerate(last):
        assert indices[0, row].tolist() == simply(scores[0, row, base:].tolist(), current, num, init, local), current
