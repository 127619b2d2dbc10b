"""Packing, padding and the order of a batch change no document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from tests import oracle
from tests.inputs import Inputs, Strategy, assert_close, cu, every_strategy, make_inputs

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=9)
LENGTHS = [1, 3, 4, 5, 37, 1, 1, 64, 8, 103, 2]


def run(x: Inputs, config: NSAConfig = CONFIG, **extra: Any) -> tuple[Tensor, Tensor]:
    return nsa_attention_and_selection(*x.required(), config, **x.extra(), **extra)


def documents(x: Inputs, lengths: list[int], config: NSAConfig = CONFIG) -> list[Inputs]:
    """Every packed document on its own."""
    pieces = oracle.compressed_documents(sum(lengths), cu(lengths), config)
    return [
        x.map(lambda name, value, t=t, c=c: value[:, :, c] if name in ("k_cmp", "v_cmp") else value[:, :, t])
        for t, c in pieces
    ]


def test_packed_documents_are_the_oracles() -> None:
    x = make_inputs(CONFIG, 0, lengths=LENGTHS)
    out, indices = run(x, cu_seqlens=cu(LENGTHS))
    want = oracle.nsa(*x.required(), CONFIG, **x.extra(), cu_seqlens=cu(LENGTHS), block_indices=indices)
    assert_close(out, want)
    assert_close(out, oracle.nsa(*x.required(), CONFIG, **x.extra(), cu_seqlens=cu(LENGTHS)))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    d=st.integers(1, 3),
    length=st.integers(1, 3),
    block=st.integers(3, 5),
    seed=st.integers(0, 2**31),
)
def test_any_packing_gives_each_document_its_own_result(
    lengths: list[int], d: int, length: int, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    config = NSAConfig(
        compress_block=d * length, compress_stride=d, select_block=d * block, num_selected=3, num_local=1, window=6
    )
    x = make_inputs(config, 0, lengths=lengths, dim=4)
    out, indices = run(x, config, cu_seqlens=cu(lengths))
    parts = [run(part, config) for part in documents(x, lengths, config)]
    assert torch.equal(indices, torch.cat([chosen for _, chosen in parts], 2))
    assert_close(out, torch.cat([alone for alone, _ in parts], 2), 1e-12)


def test_each_branch_takes_packed_documents() -> None:
    x, packed = make_inputs(CONFIG, 0, lengths=LENGTHS), {"cu_seqlens": cu(LENGTHS)}
    o_cmp, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, CONFIG, **packed)
    o_slc = selected_attention(x.q, x.k, x.v, indices, CONFIG, **packed)
    o_win = window_attention(x.q, x.k_win, x.v_win, CONFIG, **packed)
    row = 0
    for part, tokens in zip(documents(x, LENGTHS), LENGTHS, strict=True):
        at = slice(row, row + tokens)
        want, chosen = compressed_attention(part.q_cmp, part.k_cmp, part.v_cmp, CONFIG)
        assert torch.equal(indices[:, :, at], chosen)
        assert_close(o_cmp[:, :, at], want, 1e-12)
        assert_close(o_slc[:, :, at], selected_attention(part.q, part.k, part.v, chosen, CONFIG), 1e-12)
        assert_close(o_win[:, :, at], window_attention(part.q, part.k_win, part.v_win, CONFIG), 1e-12)
        row += tokens


def test_packing_changes_no_gradient_and_leaks_none_across_documents() -> None:
    x = make_inputs(CONFIG, 0, lengths=LENGTHS)
    packed = x.requires_grad()
    out, _ = run(packed, cu_seqlens=cu(LENGTHS))
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    for i, part in enumerate(documents(x, LENGTHS)):
        alone = part.requires_grad()
        own, _ = run(alone)
        start = sum(LENGTHS[:i])
        (own * weights[:, :, start : start + LENGTHS[i]]).sum().backward()
        for name, grad in piece_grads(packed, LENGTHS, i).items():
            want = alone.tensors()[name].grad
            assert want is not None
            assert_close(grad, want, 1e-11)


def piece_grads(x: Inputs, lengths: list[int], i: int) -> dict[str, Tensor]:
    grads = x.map(lambda name, value: value.grad if value.grad is not None else torch.zeros_like(value))
    return documents(grads, lengths)[i].tensors()


def test_another_document_may_be_anything() -> None:
    x = make_inputs(CONFIG, 0, lengths=[60, 70, 50])
    out, indices = run(x, cu_seqlens=cu([60, 70, 50]))
    # documents() gives views: fill the first and the last with other numbers.
    y = x.map(lambda name, value: value.clone())
    for i in (0, 2):
        for value in documents(y, [60, 70, 50])[i].tensors().values():
            value.mul_(1e4)
    again, chosen = run(y, cu_seqlens=cu([60, 70, 50]))
    assert torch.equal(again[:, :, 60:130], out[:, :, 60:130])
    assert torch.equal(chosen[:, :, 60:130], indices[:, :, 60:130])


@every_strategy
def test_padding_on_the_right_changes_no_document(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    lengths = [1, 7, 50, 103]
    longest = max(lengths)
    x = make_inputs(CONFIG, longest, batch=len(lengths))
    extra = strategy.arguments(len(lengths), longest)
    out, indices = run(x, **extra)
    for row, tokens in enumerate(lengths):
        alone = x.map(lambda name, value, row=row: value[row : row + 1]).prefix(tokens, CONFIG)
        want, chosen = run(alone)
        assert torch.equal(indices[row, :, :tokens], chosen[0])
        assert_close(out[row, :, :tokens], want[0], 1e-12)


@every_strategy
def test_the_order_of_a_batch_changes_nothing(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, 107, batch=4)
    extra = strategy.arguments(4, 107)
    order = [2, 0, 3, 1]
    out, indices = run(x, **extra)
    shuffled, chosen = run(x.map(lambda name, value: value[order]), **extra)
    assert torch.equal(chosen, indices[order])
    assert_close(shuffled, out[order], 1e-13)


@every_strategy
def test_one_sequence_of_a_batch_may_be_anything(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy.force(monkeypatch)
    x = make_inputs(CONFIG, 107, batch=3)
    extra = strategy.arguments(3, 107)
    out, indices = run(x, **extra)
    y = x.map(lambda name, value: torch.cat([value[:1], 1e3 * torch.randn_like(value[1:2]), value[2:]]))
    again, chosen = run(y, **extra)
    for row in (0, 2):
        assert torch.equal(chosen[row], indices[row])
        assert_close(again[row], out[row], 1e-13)
