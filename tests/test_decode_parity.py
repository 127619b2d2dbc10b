"""Prefill of any length, then one token at a time, gives the logits of the full forward pass (float32, 1e-4)."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from nsa_cli.config import COMPRESSIONS, ModelConfig, NSAConfig
from nsa_cli.model import Transformer, build_model

TOLERANCE = 1e-4
VOCAB = 97
CONTEXT = 24

# (l, d, l', n, w): l = 2 d; l = d = l'; odd sizes and a window of the query alone; stride 1.
GEOMETRIES = [(4, 2, 8, 4, 6), (4, 4, 4, 3, 5), (6, 3, 12, 3, 1), (2, 1, 4, 5, 9)]
HEADS = [(2, 2), (4, 2), (3, 1), (6, 1)]
AXES = (GEOMETRIES, HEADS, ["independent", "shared"], list(COMPRESSIONS), ["none", "block"])


def _pairwise() -> list[tuple[object, ...]]:
    """Few cases in which any two values of different axes meet (greedy; the same list every time)."""
    rng = random.Random(0)
    cases = list(itertools.product(*map(range, map(len, AXES))))
    rng.shuffle(cases)

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(tuple(axis[i] for axis, i in zip(AXES, best, strict=True)))
        missing -= pairs(best)
    return chosen


def _sparse(case: tuple[object, ...], **changes: object) -> ModelConfig:
    (length, stride, block, selected, window), (heads, kv_heads), branch_kv, compress, rope = case
    forced = {"num_init": min(1, selected - 1), "num_local": 1}
    nsa = NSAConfig(
        compress_block=length, compress_stride=stride, select_block=block, num_selected=selected, window=window,
        branch_kv=branch_kv, compress=compress, compress_rope=rope, **forced,
    )  # fmt: skip
    return _config(heads=heads, kv_heads=kv_heads, nsa=nsa, **changes)


def _config(**changes: object) -> ModelConfig:
    values = {"vocab_size": VOCAB, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 8, "context": CONTEXT}
    return ModelConfig(**(values | changes))


def _model(config: ModelConfig) -> Transformer:
    model = build_model(config, kernel="torch").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # A sensible layer's deviation: attention is neither flat nor one-hot, and no zero is left to hide anything.
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return model


def _ids(batch: int, tokens: int) -> Tensor:
    """No token twice in a row of the batch: equal tokens make equal compressed blocks in the first layer, whose tied
    importance rounding may then order differently in passes of different shapes."""
    return torch.stack([torch.randperm(VOCAB)[:tokens] for _ in range(batch)])


def _decode(model: Transformer, ids: Tensor, prefill: list[int]) -> Tensor:
    """Logits of all of ids, read in pieces of the given lengths and then token by token."""
    cache = model.make_cache(ids.shape[0], 8)
    sizes = [*prefill, *[1] * (ids.shape[1] - sum(prefill))]
    return torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, 1)], 1)


def _name(case: tuple[object, ...]) -> str:
    return "-".join(str(part).replace(" ", "") for part in case)


CASES = _pairwise()
EXTREMES = [
    ((1, 1, 1, 6, 4), (4, 2), "independent", "mlp", "none"),
    ((8, 2, 8, 3, 16), (2, 2), "shared", "attention-pool", "block"),
    ((16, 8, 16, 1, 100), (8, 1), "independent", "gated", "block"),
]


@pytest.mark.parametrize("case", CASES + EXTREMES, ids=_name)
@torch.inference_mode()
def test_prefill_then_token_by_token_gives_the_full_forward_pass(case: tuple[object, ...]) -> None:
    """Twice the trained context, prefilled to an odd length."""
    config = _sparse(case)
    model, ids = _model(config), _ids(2, 2 * CONTEXT + 7)
    torch.testing.assert_close(_decode(model, ids, [29]), model(ids), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("prefill", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 40])
@torch.inference_mode()
def test_any_length_of_prefill_gives_the_same_logits(prefill: int) -> None:
    config = _sparse((GEOMETRIES[0], (4, 2), "independent", "mlp", "block"))
    model, ids = _model(config), _ids(1, 41)
    decoded = _decode(model, ids, [prefill] if prefill else [])
    torch.testing.assert_close(decoded, model(ids), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", CASES[::3], ids=_name)
@torch.inference_mode()
def test_prefill_in_chunks_gives_the_full_forward_pass(case: tuple[object, ...]) -> None:
    model, ids = _model(_sparse(case)), _ids(2, 61)
    torch.testing.assert_close(_decode(model, ids, [13, 1, 17, 2, 11]), model(ids), atol=TOLERANCE, rtol=TOLERANCE)


def _ragged(model: Transformer, ids: Tensor, lengths: list[int], chunk: int) -> None:
    """Right-padded prefill, lengths cut back, then every row's next tokens: all as the row alone has them."""
    width = max(lengths)
    padded = ids[:, :width].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = torch.randint(VOCAB, (width - length,))
    cache = model.make_cache(len(lengths), 4)
    full = model(ids)
    for start in range(0, width, chunk):
        counts = [min(max(length - start, 0), chunk) for length in lengths]
        logits = model(padded[:, start : start + chunk], cache=cache, counts=counts)
        for row, count in enumerate(counts):
            here = slice(start, start + count)
            torch.testing.assert_close(logits[row, :count], full[row, here], atol=TOLERANCE, rtol=TOLERANCE)
    assert cache.lengths.tolist() == cache.host_lengths == lengths
    for step in range(ids.shape[1] - width):
        here = torch.tensor([length + step for length in lengths])
        rows = torch.arange(len(lengths))
        logits = model(ids[rows, here][:, None], cache=cache)[:, 0]
        torch.testing.assert_close(logits, full[rows, here], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", CASES[1::3], ids=_name)
@torch.inference_mode()
def test_a_batch_of_different_lengths_decodes_like_each_row_alone(case: tuple[object, ...]) -> None:
    _ragged(_model(_sparse(case)), _ids(4, 60), [1, 30, 13, 22], chunk=64)


@pytest.mark.parametrize("case", CASES[2::3], ids=_name)
@torch.inference_mode()
def test_different_lengths_may_be_prefilled_in_chunks(case: tuple[object, ...]) -> None:
    _ragged(_model(_sparse(case)), _ids(3, 55), [3, 33, 16], chunk=7)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tie", [True, False])
@torch.inference_mode()
def test_the_dense_model_decodes_like_its_full_forward_pass(heads: tuple[int, int], tie: bool) -> None:
    model = _model(_config(heads=heads[0], kv_heads=heads[1], tie_embeddings=tie))
    ids = _ids(3, 2 * CONTEXT)
    torch.testing.assert_close(_decode(model, ids, [9]), model(ids), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(_decode(model, ids, [20, 1, 7]), model(ids), atol=TOLERANCE, rtol=TOLERANCE)
    _ragged(model, ids, [1, 30, 13], chunk=7)


@pytest.mark.parametrize("case", CASES[::4], ids=_name)
@torch.inference_mode()
def test_chosen_and_repeated_rows_of_a_cache_go_on_as_they_would_have(case: tuple[object, ...]) -> None:
    model, ids = _model(_sparse(case)), _ids(3, 50)
    lengths = torch.tensor([20, 11, 25])
    cache = model.make_cache(3, 25)
    model(ids[:, :25], cache=cache, counts=lengths.tolist())
    picked = torch.tensor([2, 0, 2])
    branch = cache.select(picked)
    full, again = model(ids), model(ids[picked])
    for step in range(20):
        here = lengths[picked] + step
        logits = model(ids[picked, here][:, None], cache=branch)[:, 0]
        torch.testing.assert_close(logits, again[torch.arange(3), here], atol=TOLERANCE, rtol=TOLERANCE)
    # The cache that was copied from has not moved.
    logits = model(ids[torch.arange(3), lengths][:, None], cache=cache)[:, 0]
    torch.testing.assert_close(logits, full[torch.arange(3), lengths], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", CASES[:4], ids=_name)
@torch.inference_mode()
def test_tokens_that_were_taken_back_leave_no_trace(case: tuple[object, ...]) -> None:
    """Back to a mark, then on with other tokens, in pieces and one by one."""
    model, ids = _model(_sparse(case)), _ids(1, 48)
    full = model(ids)
    for kept, pieces in ((1, 3), (7, 1), (8, 40), (24, 1), (39, 3)):
        cache = model.make_cache(1, 64)
        model(ids[:, :kept], cache=cache)
        mark = cache.mark()
        for piece in _ids(1, 40 - kept).split(pieces, 1):
            model(piece, cache=cache)
        cache.back_to(mark)
        logits = torch.cat([model(piece, cache=cache) for piece in ids[:, kept:].split(pieces, 1)], 1)
        torch.testing.assert_close(logits, full[:, kept:], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", CASES[::6], ids=_name)
@torch.inference_mode()
def test_bfloat16_decodes_like_its_full_forward_pass_within_its_rounding(case: tuple[object, ...]) -> None:
    """The median token is within 2 %: a near tie of rounded scores may select another block for a few."""
    model, ids = _model(_sparse(case)).bfloat16(), _ids(2, 50)
    full, decoded = model(ids), _decode(model, ids, [17, 5])
    errors = (decoded - full).norm(dim=-1) / full.norm(dim=-1)
    assert errors.median() < 2e-2
    assert errors.quantile(0.75) < 5e-2


@pytest.mark.parametrize("branch_kv", ["independent", "shared"])
@torch.inference_mode()
def test_decoding_past_32k_tokens_is_right(branch_kv: str) -> None:
    nsa = NSAConfig(compress_block=32, compress_stride=16, num_selected=6, window=128, branch_kv=branch_kv)
    model = _model(_config(depth=1, dim=16, heads=1, kv_heads=1, vocab_size=512, nsa=nsa))
    ids = torch.randint(512, (1, 32_790))
    cache = model.make_cache(1, 32_790)
    for piece in ids[:, :32_780].split(16_390, 1):
        model(piece, cache=cache, last=True)
    logits = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(32_780, 32_790)], 1)
    torch.testing.assert_close(logits, model(ids)[:, 32_780:], atol=TOLERANCE, rtol=TOLERANCE)


def test_the_cases_cover_every_pair_of_choices() -> None:
    """Some thirty cases instead of the full product, and no pair of choices is left out."""
    assert len(CASES) <= 36
    for a, b in itertools.combinations(range(len(AXES)), 2):
        assert {(str(case[a]), str(case[b])) for case in CASES} == {(str(x), str(y)) for x in AXES[a] for y in AXES[b]}
