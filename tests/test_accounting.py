"""The closed forms against counting: masks entry by entry, parameters of the built model, bytes of the real cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.config import COMPRESSIONS, ModelConfig, NSAConfig
from nsa_cli.model import accounting, build_model
from nsa_cli.model.trace import record
from nsa_cli.ops import reference

PAPER = NSAConfig()
SMALL = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32)


@st.composite
def geometries(draw: st.DrawFn) -> NSAConfig:
    stride = draw(st.integers(1, 5))
    length = stride * draw(st.integers(1, 3))
    block = stride * draw(st.integers(length // stride, 6))
    init, local = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    selected = init + local + draw(st.integers(0, 3))
    return NSAConfig(
        compress_block=length, compress_stride=stride, select_block=block, num_selected=selected,
        num_init=init, num_local=local, window=draw(st.integers(1, 40)),
    )  # fmt: skip


@given(geometries(), st.integers(1, 150))
def test_pairs_are_exactly_the_visible_entries_of_the_masks(nsa: NSAConfig, tokens: int) -> None:
    blocks = nsa.num_compressed(tokens)
    visible = reference.compressed_visibility(tokens, blocks, nsa)
    assert accounting.compressed_pairs(tokens, nsa) == int(visible.sum())
    block_indices = reference.select(torch.rand(1, 1, tokens, nsa.num_select_blocks(tokens)), nsa)
    chosen = reference.selected_visibility(block_indices, tokens, nsa)
    assert accounting.selected_pairs(tokens, nsa) == int(chosen.sum())
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    assert accounting.window_pairs(tokens, nsa) == int(((distance >= 0) & (distance < nsa.window)).sum())
    assert accounting.dense_pairs(tokens) == int((distance >= 0).sum())
    last = int(visible[-1].sum() + chosen[0, 0, -1].sum() + ((distance[-1] >= 0) & (distance[-1] < nsa.window)).sum())
    assert accounting.decode_read_tokens(tokens, nsa) == last


def test_without_a_forced_own_block_the_selected_count_is_a_lower_bound() -> None:
    nsa = NSAConfig(compress_block=4, compress_stride=4, select_block=8, num_selected=2, num_init=1, num_local=0)
    block_indices = reference.select(torch.rand(1, 1, 100, nsa.num_select_blocks(100)), nsa)
    counted = int(reference.selected_visibility(block_indices, 100, nsa).sum())
    lower = accounting.selected_pairs(100, nsa)
    assert lower <= counted <= lower + 100 * nsa.select_block


def test_paper_geometry_at_64k_costs_what_its_kernels_are_measured_against() -> None:
    sparse = accounting.sparse_attention_flops(65536, 64, 128, PAPER)
    branches = [sparse.compressed, sparse.importance, sparse.selected, sparse.window]
    assert [flops / 1e12 for flops in branches] == pytest.approx([4.4, 2.2, 2.1, 1.1], rel=0.03)
    assert accounting.dense_attention_flops(65536, 64, 128) / 1e12 == pytest.approx(70.4, rel=1e-3)
    backward = accounting.sparse_attention_flops(65536, 64, 128, PAPER, backward=True)
    assert backward.importance == 0
    assert backward.total / 1e12 == pytest.approx(19, rel=0.02)
    assert accounting.decode_read_tokens(65536, PAPER) == 4095 + 1024 + 512
    dense, nsa = (ModelConfig(heads=64, kv_heads=4, dim_head=128, nsa=nsa) for nsa in (None, PAPER))
    reads = [accounting.decode_read_bytes(config, 65536, 2) for config in (dense, nsa)]
    assert reads[0] / reads[1] == pytest.approx(11.6, abs=0.05)
    assert reads[0] == 4 * 2 * 4 * 128 * 65536 * 2


def test_inputs_shorter_than_a_block_cost_nothing_in_the_compressed_branch() -> None:
    sparse = accounting.sparse_attention_flops(31, 8, 64, PAPER)
    assert (sparse.compressed, sparse.importance) == (0, 0)
    assert sparse.selected == sparse.window == accounting.dense_attention_flops(31, 8, 64)
    assert accounting.compression_flops(31, 2, 64, PAPER) == 0


VARIANTS = [
    None,
    *(
        NSAConfig(compress=compress, branch_kv=branch_kv, compress_block=8, compress_stride=4, select_block=16)
        for compress, branch_kv in itertools.product(COMPRESSIONS, ("independent", "shared"))
    ),
]


@pytest.mark.parametrize("nsa", VARIANTS, ids=lambda nsa: "dense" if nsa is None else f"{nsa.compress}-{nsa.branch_kv}")
@pytest.mark.parametrize(("ff", "tied"), [("gelu", True), ("swiglu", False)])
def test_parameters_by_part_are_those_of_the_built_model(nsa: NSAConfig | None, ff: str, tied: bool) -> None:
    config = ModelConfig(
        dim=48, depth=2, heads=6, kv_heads=2, dim_head=10, ff=ff, ff_mult=2.7, tie_embeddings=tied, nsa=nsa
    )
    model = build_model(config)
    counted = dict.fromkeys(("embedding", "attention", "compression", "gates", "feed_forward", "norms"), 0)
    for name, parameter in model.named_parameters():
        part = (
            "norms" if "norm" in name
            else "compression" if "compress" in name
            else "gates" if "to_gates" in name
            else "attention" if ".attn." in name
            else "feed_forward" if ".ff." in name
            else "embedding"
        )  # fmt: skip
        counted[part] += parameter.numel()
    parts = accounting.parameters_by_part(model)
    assert parts == {**counted, "total": sum(p.numel() for p in model.parameters())}
    assert parts == accounting.parameters_by_part(config)


def test_model_flops_are_two_a_parameter_and_the_attention() -> None:
    config = ModelConfig(context=64)
    parts = accounting.parameters_by_part(config)
    matrices = parts["attention"] + parts["feed_forward"] + config.vocab_size * config.dim
    attention = config.depth * accounting.dense_attention_flops(64, config.heads, config.dim_head) / 64
    flops = accounting.model_flops_per_token(config)
    assert flops.forward == pytest.approx(2 * matrices + attention)
    assert flops.training == pytest.approx(6 * matrices + 3.5 * attention)
    assert flops.necessary == pytest.approx(6 * matrices + 3 * attention)


def test_sparse_model_flops_count_networks_gates_and_importance_once() -> None:
    config = ModelConfig(context=256, nsa=SMALL)
    parts = accounting.parameters_by_part(config)
    gate_weights = parts["gates"] - config.depth * 3 * config.heads
    matrices = parts["attention"] + parts["feed_forward"] + gate_weights + config.vocab_size * config.dim
    networks = config.depth * accounting.compression_flops(256, config.kv_heads, config.dim_head, SMALL) / 256
    sizes = (256, config.heads, config.dim_head, SMALL)
    forward = config.depth * accounting.sparse_attention_flops(*sizes).total / 256
    backward = config.depth * accounting.sparse_attention_flops(*sizes, backward=True).total / 256
    flops = accounting.model_flops_per_token(config, 256)
    assert flops.forward == pytest.approx(2 * matrices + networks + forward)
    assert flops.training == pytest.approx(6 * matrices + 3 * networks + forward + backward)
    importance = config.depth * accounting.sparse_attention_flops(*sizes).importance / 256
    assert flops.necessary == pytest.approx(3 * (flops.forward - importance))


CACHED = [None, SMALL, NSAConfig(**{**SMALL.__dict__, "branch_kv": "shared"})]


@pytest.mark.parametrize("nsa", CACHED, ids=["dense", "independent", "shared"])
def test_a_cache_takes_the_bytes_of_the_formula_and_not_three_copies(nsa: NSAConfig | None) -> None:
    config = ModelConfig(dim=32, depth=2, heads=4, kv_heads=2, dim_head=8, nsa=nsa)
    model = build_model(config).eval()
    for tokens in (1, 7, 8, 61, 700):
        cache = model.make_cache(3, tokens)
        with torch.no_grad():
            model(torch.zeros(3, tokens, dtype=torch.int64), cache=cache)
            assert cache.nbytes == 3 * accounting.cache_bytes(config, tokens, 4)
            model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)
        assert cache.capacity > tokens
        assert cache.nbytes == 3 * accounting.cache_bytes(config, cache.capacity, 4)
    dense = accounting.cache_bytes(replace(config, nsa=None), 100_000, 4)
    assert accounting.cache_bytes(config, 100_000, 4) < (1 + 1 / SMALL.compress_stride + 0.001) * dense


def test_rings_hold_the_window_and_the_tokens_of_the_next_block() -> None:
    config = ModelConfig(nsa=NSAConfig(**{**SMALL.__dict__, "branch_kv": "shared"}), depth=1)
    one = config.kv_heads * config.dim_head * 4
    assert accounting.cache_bytes(config, 7, 4) == one * (2 * 7 + 7)
    assert accounting.cache_bytes(config, 8, 4) == one * (2 * (8 + 1) + 7)
    assert accounting.cache_bytes(config, 12, 4) == one * (2 * (12 + 2) + 7)
    own = ModelConfig(nsa=SMALL, depth=1)
    assert accounting.cache_bytes(own, 40, 4) == 2 * one * (40 + 9 + 7 + 32)


@pytest.mark.parametrize("nsa", CACHED, ids=["dense", "independent", "shared"])
@pytest.mark.parametrize("tokens", [5, 33, 90, 205])
def test_a_step_reads_the_bytes_of_the_formula_and_no_others(nsa: NSAConfig | None, tokens: int) -> None:
    """Every place that the formula does not count is made NaN, and the step's logits stay as they were."""
    config = ModelConfig(vocab_size=211, dim=32, depth=1, heads=4, kv_heads=2, dim_head=8, nsa=nsa)
    model = build_model(config).eval()
    ids = torch.randperm(211)[None, :tokens]
    cache = model.make_cache(1, 300)
    with torch.no_grad():
        if tokens > 1:
            model(ids[:, :-1], cache=cache)
        mark = cache.mark()
        with record(model) as layers:
            want = model(ids[:, -1:], cache=cache)
        cache.back_to(mark)
        read = 0
        for name, buffer in cache.layers[0].buffers.items():
            kept = torch.zeros(2, buffer.shape[2], dtype=torch.bool)
            if nsa is None:
                kept[:, :tokens] = True
            elif name in ("k_cmp", "v_cmp"):
                kept[:, : nsa.num_compressed(tokens)] = True
            elif name in ("k_slc", "v_slc"):
                blocks = layers[0].block_indices[0, :, 0]
                for head in range(2):
                    for block in blocks[head][blocks[head] >= 0].tolist():
                        kept[head, block * nsa.select_block : min((block + 1) * nsa.select_block, tokens)] = True
            else:
                kept[:, : min(tokens, buffer.shape[2])] = True
            if not name.endswith("raw_ring"):
                read += int(kept.sum()) * buffer.shape[3] * 4
            if nsa is not None and nsa.branch_kv == "shared" and name in ("k_slc", "v_slc"):
                kept[:, max(0, tokens - nsa.window) : tokens] = True
            buffer.masked_fill_(~kept[None, :, :, None], float("nan"))
        got = model(ids[:, -1:], cache=cache)
    assert torch.equal(got, want)
    if nsa is not None and nsa.branch_kv == "shared":  # the window reads the selected branch's keys once more
        read += 2 * 2 * 8 * 4 * min(nsa.window, tokens)
    assert read == accounting.decode_read_bytes(config, tokens, 4)

