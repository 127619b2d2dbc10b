"""Queries that are the last tokens of a document, which is what each piece of a shared sequence is: the Triton kernels (in the
interpreter without a GPU) against the torch kernel, and against the same queries among all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops.dispatch import nsa_attention_and_selection

PLAIN = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=5, window=20)
NONE_FORCED = NSAConfig(compress_block=4, compress_stride=4, select_block=8, num_selected=3, num_init=0, num_local=0, window=9)
CASES = [(PLAIN, 2, 37, 21), (NONE_FORCED, 1, 53, 19), (PLAIN, 1, 3, 2), (PLAIN, 1, 64, 16)]
"""Geometry, batch, offset, queries."""


def passes(config: NSAConfig, inputs: list[Tensor], weights: Tensor, kernel: str, offset: int | None) -> list[Tensor]:
    """Output, selection, and gradients of all nine inputs, zeros where none flows."""
    q, k, v, k_cmp, v_cmp, gates, q_cmp, k_win, v_win = inputs
    out, indices = nsa_attention_and_selection(
        q, k, v, k_cmp, v_cmp, gates, config, q_cmp=q_cmp, k_win=k_win, v_win=v_win, kernel=kernel, offset=offset
    )
    grads = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    return [out.detach(), indices, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize(("config", "batch", "offset", "queries"), CASES)
def test_the_last_queries_of_a_document_have_their_outputs_and_gradients(
    config: NSAConfig, batch: int, offset: int, queries: int
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, heads, groups, dim = offset + queries, 4, 2, 16
    blocks = config.num_compressed(tokens)

    def make(heads: int, count: int, width: int = dim) -> Tensor:
        return torch.randn(batch, heads, count, width, device=device, requires_grad=True)

    rows = [make(heads, tokens), make(heads, tokens, 3), make(heads, tokens)]
    q, gates, q_cmp = (x.detach()[:, :, offset:].requires_grad_() for x in rows)
    keys = [make(groups, count) for count in (tokens, tokens, blocks, blocks, tokens, tokens)]
    k, v, k_cmp, v_cmp, k_win, v_win = keys
    weights = torch.zeros(batch, heads, tokens, dim, device=device)
    weights[:, :, offset:] = torch.randn(batch, heads, queries, dim, device=device)
    last = [q, k, v, k_cmp, v_cmp, gates, q_cmp, k_win, v_win]
    found = passes(config, last, weights[:, :, offset:], "triton", offset)
    wanted = passes(config, last, weights[:, :, offset:], "torch", offset)
    among_all = passes(config, [rows[0], k, v, k_cmp, v_cmp, rows[1], rows[2], k_win, v_win], weights, "torch", None)
    for i in (0, 1, 2, 7, 8):  # output, selection, gradients of q, gates and q_cmp
        among_all[i] = among_all[i][:, :, offset:]
    for right in (wanted, among_all):
        assert torch.equal(found[1], right[1])
        assert max(distance(a, b) for a, b in zip(found, right, strict=True)) < 1e-5


def test_an_offset_that_does_not_fit_the_keys_is_refused() -> None:
    q, k, gates = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 5, 3)
    k_cmp = torch.randn(1, 2, PLAIN.num_compressed(20), 16)
    nsa_attention_and_selection(q, k, k, k_cmp, k_cmp, gates, PLAIN, kernel="torch", offset=15)
    with pytest.raises(ValueError, match="offset = 14: must make k's tokens with q's"):
        nsa_attention_and_selection(q, k, k, k_cmp, k_cmp, gates, PLAIN, kernel="torch", offset=14)
    with pytest.raises(ValueError, match="k_cmp has 3 blocks"):
        nsa_attention_and_selection(q, k, k, k_cmp[:, :, 1:], k_cmp[:, :, 1:], gates, PLAIN, kernel="torch", offset=15)
