"""No output, selection or gradient depends on a later token, at lengths where selection has a choice to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops import compressed_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from tests import oracle
from tests.inputs import (
    LONG,
    MAIN,
    STRATEGIES,
    Inputs,
    Strategy,
    assert_close,
    every_long_case,
    every_strategy,
    make_inputs,
    name_of,
)

Case = tuple[NSAConfig, int]
Branch = Callable[..., Tensor]


def run_compressed(x: Inputs, config: NSAConfig, indices: Tensor, **extra: Any) -> Tensor:
    return compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config, **extra)[0]


def run_selected(x: Inputs, config: NSAConfig, indices: Tensor, **extra: Any) -> Tensor:
    return selected_attention(x.q, x.k, x.v, indices, config, **extra)


def run_window(x: Inputs, config: NSAConfig, indices: Tensor, **extra: Any) -> Tensor:
    return window_attention(x.q, x.k_win, x.v_win, config, **extra)


def run_whole(x: Inputs, config: NSAConfig, indices: Tensor, **extra: Any) -> Tensor:
    return nsa_attention_and_selection(*x.required(), config, **x.extra(), **extra)[0]


BRANCHES: dict[str, Branch] = {"cmp": run_compressed, "slc": run_selected, "win": run_window, "whole": run_whole}
every_branch = pytest.mark.parametrize("branch", BRANCHES)


def sparse_enough(indices: Tensor, config: NSAConfig, tokens: int) -> bool:
    """12 selection blocks or more, two free places, and queries whose selection leaves candidates out."""
    free = config.num_selected - config.num_init - config.num_local
    return tokens >= 12 * config.select_block and free >= 2 and bool((indices[:, :, -1] >= 0).all())


def changed_from(x: Inputs, first: int, config: NSAConfig) -> Inputs:
    """Every token from `first` on replaced, queries and gates too, and each compressed block that holds one."""

    def change(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        if name in ("k_cmp", "v_cmp"):
            touched = [c for c in range(value.shape[2]) if oracle.compressed_tokens(c, config)[-1] >= first]
            value[:, :, touched] = 30 * torch.randn_like(value[:, :, touched])
        else:
            value[:, :, first:] = 30 * torch.randn_like(value[:, :, first:])
        return value

    return x.map(change)


def edges(config: NSAConfig, tokens: int) -> list[int]:
    """First changed tokens: around the edges of blocks in the middle, at the end, and where the first block completes."""
    middle = 7 * config.select_block
    around = [middle - 1, middle, middle + 1, middle + config.compress_stride, middle + config.compress_block - 1]
    return [1, config.compress_block - 1, config.compress_block, *around, tokens - 1]


@pytest.mark.parametrize(
    ("case", "strategy"),
    # The large geometry takes a second a run: one of each kind is enough.
    [(case, s) for case in LONG for s in STRATEGIES if case[1] < 500 or s in MAIN],
    ids=lambda value: value.name if isinstance(value, Strategy) else name_of(value),
)
@every_branch
def test_later_tokens_change_nothing(
    case: Case, branch: str, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = case
    strategy.force(monkeypatch)
    x = make_inputs(config, tokens, dim=4)
    extra = strategy.arguments(1, tokens)
    _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config, **extra)
    assert sparse_enough(indices, config, tokens)
    before = BRANCHES[branch](x, config, indices, **extra)
    for first in edges(config, tokens):
        y = changed_from(x, first, config)
        _, selection = compressed_attention(y.q_cmp, y.k_cmp, y.v_cmp, config, **extra)
        assert torch.equal(selection[:, :, :first], indices[:, :, :first]), f"selections before {first} changed"
        # Other queries may select other blocks and so reorder sums: equal up to rounding in float64.
        after = BRANCHES[branch](y, config, selection, **extra)
        assert_close(after[:, :, :first], before[:, :, :first], 1e-12)
        if branch != "cmp":
            assert (after[:, :, first] - before[:, :, first]).abs().max() > 0.1, "the change did not arrive"


@every_long_case
@every_branch
def test_no_gradient_reaches_later_tokens(case: Case, branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokens = case
    for strategy in MAIN[:3]:
        with monkeypatch.context() as patched:
            strategy.force(patched)
            for first in (config.compress_block, 7 * config.select_block + 1, 9 * config.select_block):
                x = make_inputs(config, tokens, dim=4).requires_grad()
                _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, config)
                BRANCHES[branch](x, config, indices)[:, :, :first].square().sum().backward()
                for name, value in x.tensors().items():
                    if value.grad is None:
                        continue
                    start = first
                    if name in ("k_cmp", "v_cmp"):
                        start = oracle.num_compressed(first, config)
                    assert not value.grad[:, :, start:].any(), f"{name} has a gradient from the past"
                    assert name[0] != "v" or value.grad[:, :, :start].any(), f"{name} has no gradient at all"


@every_long_case
@every_strategy
def test_a_prefix_of_the_input_gives_the_prefix_of_the_output(
    case: Case, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = case
    strategy.force(monkeypatch)
    x = make_inputs(config, tokens, dim=4)
    out, indices = nsa_attention_and_selection(*x.required(), config, **x.extra(), **strategy.arguments(1, tokens))
    block, length = config.select_block, config.compress_block
    for prefix in {1, length - 1, length, length + 1, block, 3 * block + 1, 12 * block - 1, tokens - 1} - {0}:
        part = x.prefix(prefix, config)
        got, chosen = nsa_attention_and_selection(
            *part.required(), config, **part.extra(), **strategy.arguments(1, prefix)
        )
        assert torch.equal(chosen, indices[:, :, :prefix])
        assert_close(got, out[:, :, :prefix], 1e-12)


@pytest.mark.parametrize("case", LONG[:3], ids=name_of)
@every_strategy
def test_queries_at_given_positions_are_those_of_the_full_pass(
    case: Case, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some queries against a longer cache, in any order and different in each sequence: what decoding does."""
    config, tokens = case
    x = make_inputs(config, tokens, dim=4, batch=2)
    out, indices = nsa_attention_and_selection(*x.required(), config, **x.extra())
    strategy.force(monkeypatch)
    at = torch.tensor([[tokens - 1, 0, 50, 51, 7], [tokens - 3, tokens // 2, 2, 0, 90]])

    def rows(value: Tensor) -> Tensor:
        return torch.stack([value[b, :, at[b]] for b in range(2)])

    # The cache is longer than the document, and what lies beyond is garbage.
    keys = {name: pad_keys(value) for name, value in x.tensors().items() if name[0] in "kv"}
    got, chosen = nsa_attention_and_selection(
        rows(x.q), keys["k"], keys["v"], keys["k_cmp"], keys["v_cmp"], rows(x.gates), config,
        q_cmp=rows(x.q_cmp), k_win=keys["k_win"], v_win=keys["v_win"], positions=at,
    )  # fmt: skip
    assert torch.equal(chosen, rows(indices))
    assert_close(got, rows(out), 1e-12)


def pad_keys(value: Tensor) -> Tensor:
    garbage = 1e6 * torch.randn(*value.shape[:2], 23, value.shape[3], dtype=value.dtype)
    return torch.cat([value, garbage], 2)
