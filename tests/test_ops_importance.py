"""Importance of selection blocks (eq. 9, 10) against numbers worked out by hand, ties included.

The probabilities are made exact: a block whose key gives logit 0 against others at -1e9 leaves exact zeros and shares
of 1 / (a power of two), so that equal importances are equal to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, reference, selection
from tests import oracle


@dataclass
class Hand:
    """Query `t` of `tokens`; every head spreads its probability evenly over its own `open_blocks`."""

    name: str
    geometry: tuple[int, int, int]
    tokens: int
    open_blocks: list[list[int]]
    importance: list[float]
    selected: dict[int, list[int]]

    def config(self, n: int = 1) -> NSAConfig:
        length, stride, block = self.geometry
        return NSAConfig(
            compress_block=length, compress_stride=stride, select_block=block, num_selected=n, num_init=0, num_local=0
        )

    def probabilities(self) -> np.ndarray:
        """[1, heads, 1, blocks]"""
        config = self.config()
        p = np.zeros((1, len(self.open_blocks), 1, oracle.num_compressed(self.tokens, config)))
        for h, open_blocks in enumerate(self.open_blocks):
            p[0, h, 0, open_blocks] = 1 / len(open_blocks)
        return p


HAND = [
    # 15 blocks of 32 tokens every 16. Block 0 of 64 tokens holds 0, 1, 2 whole (weight 2) and half of 3 (48..79);
    # block 1 half of 3, whole 4, 5, 6, half of 7; block 2 half of 7, whole 8, 9, 10, half of 11; block 3 half of 11, whole
    # 12, 13, 14.
    Hand(
        "paper: straddling blocks count once on either side",
        (32, 16, 64), 256, [[3, 7, 11, 14]],
        # 3 -> (1, 1, 0, 0), 7 -> (0, 1, 1, 0), 11 -> (0, 0, 1, 1), 14 -> (0, 0, 0, 2), over 4
        [1 / 4, 2 / 4, 2 / 4, 3 / 4],
        {1: [3], 2: [1, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3], 6: [0, 1, 2, 3, -1, -1]},
    ),
    Hand(
        "paper: uniform over 16 blocks",
        (32, 16, 64), 272, [list(range(16))],
        # 2 + 2 + 2 + 1, then 1 + 2 + 2 + 2 + 1 three times, and block 15 (240..271) lends its last 16 tokens to block 4
        [7 / 16, 8 / 16, 8 / 16, 8 / 16, 1 / 16],
        {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4]},
    ),
    Hand(
        "paper: two heads add up",
        (32, 16, 64), 256, [[0, 7], [3, 11]],
        # head 0: 0 -> (2, 0, 0, 0), 7 -> (0, 1, 1, 0); head 1: 11 -> (0, 0, 1, 1), 3 -> (1, 1, 0, 0); each over 2
        [3 / 2, 2 / 2, 2 / 2, 1 / 2],
        {1: [0], 2: [0, 1], 3: [0, 1, 2]},
    ),
    # 11 blocks of 4 tokens every 2; 3 (6..9) and 7 (14..17) straddle the edges at 8 and 16.
    Hand(
        "(4, 2, 8): ties go to the lower block",
        (4, 2, 8), 24, [[0, 3, 4, 9]],
        # 0 -> (2, 0, 0), 3 -> (1, 1, 0), 4 -> (0, 2, 0), 9 -> (0, 0, 2), over 4
        [3 / 4, 3 / 4, 2 / 4],
        {1: [0], 2: [0, 1], 3: [0, 1, 2]},
    ),
    Hand(
        "(4, 2, 8): four heads, a tie of the last two",
        (4, 2, 8), 24, [[0], [3, 7], [7, 10], [4, 5]],
        # (2, 0, 0) + (1, 2, 1) / 2 + (0, 1, 3) / 2 + (0, 2, 0)
        [2.5, 3.5, 2.0],
        {1: [1], 2: [0, 1]},
    ),
    Hand(
        "(4, 2, 8): the last block is one token long",
        (4, 2, 8), 25, [[7], [8], [10], [3]],
        # 10 is 20..23, so that nothing reaches block 3 (token 24): 0.  (0,1,1,0) + (0,0,2,0) + (0,0,2,0) + (1,1,0,0)
        [1.0, 2.0, 5.0, 0.0],
        {1: [2], 2: [1, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]},
    ),
    # l = d: a compressed block is a selection block, and importance is the plain probability.
    Hand(
        "(8, 8, 8): plain sum, zeros tie",
        (8, 8, 8), 32, [[1, 3]],
        [0, 1 / 2, 0, 1 / 2],
        {1: [1], 2: [1, 3], 3: [0, 1, 3]},
    ),
    Hand(
        "(8, 8, 8): all equal",
        (8, 8, 8), 64, [list(range(8))],
        [1 / 8] * 8,
        {1: [0], 3: [0, 1, 2], 7: [0, 1, 2, 3, 4, 5, 6]},
    ),
    Hand("(8, 4, 8): three blocks touch one", (8, 4, 8), 24, [[1, 2]], [1 / 2, 3 / 2, 0.0], {1: [1], 2: [0, 1]}),
    Hand("(4, 1, 4): l = 4 d", (4, 1, 4), 8, [[0, 1, 3, 4]], [(4 + 3 + 1 + 0) / 4, (0 + 1 + 3 + 4) / 4], {1: [0]}),
]  # fmt: skip
by_hand = pytest.mark.parametrize("case", HAND, ids=lambda case: case.name)


@by_hand
def test_the_oracle_gives_the_numbers_worked_out_by_hand(case: Hand) -> None:
    p = np.repeat(case.probabilities(), case.tokens, axis=2)
    imp = oracle.importance(p, 1, case.config())
    assert imp[0, 0, -1].tolist() == case.importance
    for n, blocks in case.selected.items():
        assert oracle.select(imp, case.config(n))[0, 0, -1].tolist() == blocks


@by_hand
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_is_the_number_worked_out_by_hand(case: Hand, dtype: torch.dtype) -> None:
    p, config = torch.from_numpy(case.probabilities()).to(dtype), case.config()
    pooled = selection.pool_importance(p.sum(1, keepdim=True), len(case.importance), config)
    assert pooled[0, 0, 0].tolist() == case.importance
    plain = reference.importance(p[:, None], case.tokens, config)
    assert plain[0, 0, 0].tolist() == case.importance


@by_hand
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_op_selects_what_the_hand_would(case: Hand, dtype: torch.dtype) -> None:
    heads, config = len(case.open_blocks), case.config()
    blocks = oracle.num_compressed(case.tokens, config)
    # Head h reads channel h alone, where its open blocks have 0 and the others -1e9.
    k_cmp = torch.full((1, 1, blocks, heads), -1e9)
    for h, open_blocks in enumerate(case.open_blocks):
        k_cmp[0, 0, open_blocks, h] = 0.0
    q = torch.eye(heads)[None, :, None].expand(1, heads, case.tokens, heads)
    for n, expected in case.selected.items():
        _, indices = compressed_attention(q.to(dtype), k_cmp.to(dtype), k_cmp.to(dtype), case.config(n), scale=1.0)
        assert indices[0, 0, -1].tolist() == expected, n


def test_only_complete_blocks_count_for_a_query_in_the_middle() -> None:
    # Query 94 sees the blocks 0 .. 3 (block 4 ends at 95), query 95 also block 4, all evenly.
    config = NSAConfig(compress_block=32, compress_stride=16, select_block=64, num_selected=1, num_init=0, num_local=0)
    q, k_cmp = torch.ones(1, 1, 128, 1), torch.zeros(1, 1, 7, 1)
    out, _ = compressed_attention(q, k_cmp, torch.arange(7.0).reshape(1, 1, 7, 1), config)
    assert out[0, 0, 30].item() == 0.0
    assert out[0, 0, [94, 95, 111]].flatten().tolist() == pytest.approx([1.5, 2.0, 2.5])
    _, p = oracle.compressed(q, k_cmp, k_cmp, config)
    imp = oracle.importance(p, 1, config)
    assert imp[0, 0, 94].tolist() == pytest.approx([7 / 4, 1 / 4])
    assert imp[0, 0, 95].tolist() == pytest.approx([7 / 5, 3 / 5])


def test_importance_adds_probabilities_and_does_not_average_logits() -> None:
    # Logits favour block 1 (4 against 3), probabilities block 0 (0.018 + 2 * 0.818 against 0.982 + 2 * 0.182).
    config = NSAConfig(compress_block=4, compress_stride=4, select_block=4, num_selected=1, num_init=0, num_local=0)
    logits = torch.tensor([[0.0, 4.0], [1.5, 0.0], [1.5, 0.0]])
    q = torch.eye(3)[None, :, None].expand(1, 3, 8, 3)
    k_cmp = logits.T[None, None].contiguous()
    assert logits.sum(0).tolist() == [3.0, 4.0]
    assert logits.softmax(-1).sum(0).tolist() == pytest.approx([1.6531, 1.3469], abs=1e-4)
    _, indices = compressed_attention(q, k_cmp, k_cmp, config, scale=1.0)
    assert indices[0, 0, -1].tolist() == [0]
