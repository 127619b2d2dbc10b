"""The whole model, all parameters random: no logit depends on a later token; packing and batching change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_cli.config import COMPRESSIONS, ModelConfig
from nsa_cli.model import Transformer
from nsa_cli.model.trace import record
from tests import oracle
from tests.inputs import MAIN, Strategy, assert_close, cu
from tests.models import DENSE, NSA, TOKENS, random_ids, random_model, with_nsa

KINDS: dict[str, ModelConfig] = {
    "dense": DENSE,
    **{name: with_nsa(compress=name) for name in COMPRESSIONS},
    "shared": with_nsa(branch_kv="shared"),
    "block rotary": with_nsa(compress_rope="block"),
    "shared, block rotary": with_nsa(compress_rope="block", branch_kv="shared"),
    "nothing forced": with_nsa(num_init=0, num_local=0),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: Transformer, ids: torch.Tensor, **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **extra)


@every_kind
@pytest.mark.parametrize("strategy", MAIN[:3], ids=lambda s: s.name)
def test_later_tokens_change_no_logit_and_no_selection(
    kind: str, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy.force(monkeypatch)
    model, ids = random_model(KINDS[kind]), random_ids()
    assert 12 * NSA.select_block <= TOKENS
    with record(model) as before_layers:
        before = logits(model, ids)
    for first in (1, 3, 4, 55, 56, 57, 71, TOKENS - 1):
        changed = ids.clone()
        changed[:, first:] = (changed[:, first:] + torch.randint(1, 31, (TOKENS - first,))) % 31
        with record(model) as layers:
            after = logits(model, changed)
        assert_close(after[:, :first], before[:, :first], 1e-6)  # logits are float32
        assert (after[:, first:] - before[:, first:]).abs().max() > 1e-3
        assert len(layers) == (0 if kind == "dense" else model.config.depth)
        for mine, theirs in zip(layers, before_layers, strict=True):
            assert torch.equal(mine.block_indices[:, :, :first], theirs.block_indices[:, :, :first])


@every_kind
def test_no_gradient_reaches_a_later_token(kind: str) -> None:
    model, ids = random_model(KINDS[kind]), random_ids()
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.token_emb.register_forward_hook(keep)
    for t in (10, 60, 100):
        seen.clear()
        model(ids)[:, t].square().sum().backward()
        assert seen[0].grad is not None
        assert not seen[0].grad[:, t + 1 :].any()
        assert seen[0].grad[:, t].any()
        # Two layers of window 12 reach 22 back; compressed and selected blocks, and dense attention, the first token.
        assert seen[0].grad[:, 0].any()


@every_kind
def test_a_prefix_gives_the_prefix_of_the_logits(kind: str) -> None:
    model, ids = random_model(KINDS[kind]), random_ids()
    with record(model) as whole_layers:
        whole = logits(model, ids)
    for tokens in (1, 3, 4, 5, 7, 8, 61, 97, 108):
        with record(model) as layers:
            part = logits(model, ids[:, :tokens])
        assert_close(part, whole[:, :tokens], 1e-6)
        for mine, theirs in zip(layers, whole_layers, strict=True):
            assert torch.equal(mine.block_indices, theirs.block_indices[:, :, :tokens])


@every_kind
def test_packed_documents_get_the_logits_they_get_alone(kind: str) -> None:
    model, lengths = random_model(KINDS[kind]), [1, 50, 3, 4, 1, 37, 13]
    ids = random_ids(1, sum(lengths))
    packed = logits(model, ids, cu_seqlens=cu(lengths))
    alone = [logits(model, document) for document in ids.split(lengths, 1)]
    assert_close(packed, torch.cat(alone, 1), 1e-6)
    assert not torch.allclose(packed, logits(model, ids), atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "mlp", "shared, block rotary"])
def test_the_loss_of_packed_documents_is_the_mean_over_their_tokens(kind: str) -> None:
    model, lengths = random_model(KINDS[kind]), [20, 1, 41]
    ids, targets = random_ids(1, 62), random_ids(1, 62)
    packed = model(ids, targets, cu_seqlens=cu(lengths))
    pieces = zip(ids.split(lengths, 1), targets.split(lengths, 1), lengths, strict=True)
    assert_close(packed, sum(model(i, t) * n for i, t, n in pieces) / 62, 1e-6)


@every_kind
def test_padding_and_batch_order_change_no_sequence(kind: str) -> None:
    model, lengths = random_model(KINDS[kind]), [TOKENS, 1, 40, 77]
    ids = random_ids(4)
    batch = logits(model, ids)
    for row, tokens in enumerate(lengths):
        assert_close(batch[row : row + 1, :tokens], logits(model, ids[row : row + 1, :tokens]), 1e-6)
    order = [2, 0, 3, 1]
    assert_close(logits(model, ids[order]), batch[order], 1e-6)


@pytest.mark.parametrize("kind", ["dense", "mlp"])
def test_the_same_batch_gives_the_same_bits(kind: str) -> None:
    model = random_model(KINDS[kind], dtype=torch.float32)
    ids, targets = random_ids(2), random_ids(2)
    runs = []
    for _ in range(2):
        model.zero_grad()
        loss = model(ids, targets)
        loss.backward()
        runs.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@every_kind
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = random_model(KINDS[kind])
    model(random_ids(2), random_ids(2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_the_selection_of_a_model_is_the_oracles() -> None:
    for kind in ("mlp", "shared, block rotary", "nothing forced"):
        model = random_model(KINDS[kind])
        nsa = model.config.nsa
        assert nsa is not None
        with record(model) as layers:
            logits(model, random_ids(2))
        for layer in layers:
            _, p = oracle.compressed(layer.q_cmp, layer.k_cmp, layer.k_cmp, nsa)
            imp = oracle.importance(p, 2, nsa)
            oracle.check_selection(layer.block_indices, imp, nsa, relative=1e-9)
            assert_close(layer.scores(torch.arange(TOKENS)), p, 1e-9)
            assert_close(layer.importance(-1)[:, :, 0], imp[:, :, -1], 1e-9)
