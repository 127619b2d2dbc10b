"""The Triton kernels on a GPU: all groups, head dims, geometries and dtypes; determinism, memory, graphs, long tensors.

The kernels are first compiled by many processes at once, unless pytest-xdist has many already.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.benchmark.parity import check_selection, near_tie_absolute
from nsa_cli.config import PRESETS, ModelConfig, NSAConfig
from nsa_cli.model import build_model
from nsa_cli.ops import nsa_attention, reference
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from nsa_cli.ops.triton import launch
from nsa_cli.ops.triton.device import has_tiles
from nsa_cli.ops.triton.problem import Problem
from tests.inputs import cu, relative_l2
from tests.triton_cases import (
    COLUMNS,
    Case,
    assert_each_branch_is_right,
    assert_selects,
    assert_the_operator_is_right,
    forward_and_backward,
    output_gradient,
    parse,
    table,
    warm_up,
)

pytestmark = pytest.mark.gpu

PAPER = NSAConfig()
CASES = table(f"""
{COLUMNS}
32/2 128 32,16,64 13+1+2 512 4133 1 own plain bf16
16/1 128 32,16,64 13+1+2 512 1537 1 own model f32
8/2 128 32,16,64 13+1+2 512 2500 1 shared model f16
2/2 64 32,16,64 13+1+2 512 1537 1 shared plain bf16
4/2 64 16,8,16 3+1+2 64 777 2 own model bf16
8/2 64 16,8,16 3+1+2 64 1500 1 own model bf16
16/2 64 32,16,64 13+1+2 512 1500 1 own model bf16
32/2 64 32,16,64 13+1+2 512 1500 1 own sliced bf16
9/3 80 16,8,16 5+1+2 100 777 2 own model bf16
6/1 96 32,32,64 5+1+2 200 1300 1 own plain bf16
2/1 256 16,16,128 2+1+2 300 1100 1 own model bf16
2/1 256 16,16,128 2+1+2 300 600 1 own model f32
8/1 192/128 32,16,64 13+1+2 512 1500 1 own model bf16
32/1 32 8,4,16 3+1+2 33 777 1 own model bf16
12/4 32 64,16,64 1+0+2 4096 1500 1 shared model f16
4/1 16 8,4,8 5+1+1 1 600 1 own model bf16
2/1 8 2,1,4 2+1+2 9 300 2 own plain f32
4/2 16 4,4,4 3+2+1 7 257 1 own turned bf16
8/2 16 8,8,8 4+0+0 20 400 1 own model bf16
4/2 8 4,2,8 61+1+2 12 777 1 own model bf16
16/2 128 64,16,64 0+1+2 512 777 1 own model bf16
8/2 64 12,4,24 4+1+0 60 500 1 own model bf16
8/2 64 32,16,64 13+1+2 512 1 2 own model bf16
8/2 64 32,16,64 13+1+2 512 31 1 own model bf16
32/2 128 32,16,64 13+1+2 512 1+69+1230+1+3699 1 own model bf16
8/2 64 8,4,16 3+1+2 64 130+1+369+400 1 shared model f32
3/1 32 16,8,16 2+1+1 20 257+300 1 own sliced bf16
16/2 64 32,16,64 13+1+2 512 0+700+0+33+1 1 shared sliced bf16
8/2 64 2,1,4 3+1+0 1 257 1 shared turned f16
4/4 128 8,4,16 0+0+1 33 1031 2 own plain bf16
6/2 96 12,4,24 3+0+2 1 777 2 shared turned f16
4/1 80 8,4,8 13+1+2 33 777 2 own sliced f32
8/1 128 32,16,64 13+1+2 512 2100 2 own model bf16
64/2 128 32,16,64 5+0+2 100 65+1+777+640 1 shared plain f16
16/1 128 16,8,64 9+2+1 1 1500 1 own turned bf16
16/2 128 32,16,64 13+1+2 512 1 2 own model bf16
32/2 128 32,16,64 13+1+2 512 20 1 own model f16
64/1 64 32,16,64 13+1+2 512 1+69+730 1 own model bf16
8/2 128 32,16,64 13+1+2 512 5003+ 1 own model bf16
8/2 64 16,8,16 3+1+2 64 4100+ 1 shared plain f32
6/2 64 32,16,64 13+1+2 512 2177 3 own sliced f16
8/2 48 32,16,64 13+1+2 512 1300 1 own model bf16
4/2 96/128 8,4,16 3+1+2 33 1900 1 own plain bf16
20/4 128 8,4,16 9+0+0 30 2100 1 own model bf16
""")
PORTABLE = [CASES[i] for i in (0, 2, 4, 8, 21, 24, 27, 29, 32, 33, 34)]
"""Cases that Hopper GPUs have kernels of their own for: for all parts, or for dk and dv alone."""
DIMS = (64, 128)
"""Head dims for which Hopper runs some, or all, of its own kernels."""
HOPPER = pytest.mark.skipif(
    not has_tiles(torch.device("cuda" if torch.cuda.is_available() else "cpu")), reason="needs a Hopper GPU"
)
BRANCHES = {CASES[i].name for i in (3, 5, 8, 18, 24)}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" not in os.environ:
        workers = min(len(CASES), max(1, (os.cpu_count() or 2) - 2))
        shares = [[(case, case.name in BRANCHES) for case in CASES[i::workers]] for i in range(workers)]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            list(pool.map(warm_up, shares, ["cuda"] * workers))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def poison() -> None:
    """What the caching allocator hands out next is NaN."""
    torch.full((2**28,), float("nan"), device="cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operator_and_its_gradients_are_the_torch_kernels(case: Case) -> None:
    poison()
    assert_the_operator_is_right(case, "cuda")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in BRANCHES], ids=lambda case: case.name)
def test_each_branch_alone_is_the_torch_kernels_also_on_arbitrary_block_lists(case: Case) -> None:
    poison()
    assert_each_branch_is_right(case, "cuda")


@HOPPER
@pytest.mark.parametrize("case", PORTABLE, ids=lambda case: case.name)
def test_the_portable_kernels_are_right_where_hopper_has_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_tiles", lambda device: False)
    poison()
    assert_the_operator_is_right(case, "cuda")


@HOPPER
@pytest.mark.parametrize("lengths", [[3000], [1000, 1, 1999]], ids=str)
def test_on_hopper_its_own_kernels_run_and_give_what_the_portable_ones_give(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_cli.ops.triton import attend_tiles, dkv_tiles, gradient_tiles, parts_tiles

    calls: list[str] = []

    def count(module: Any, name: str) -> None:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: calls.append(name) or own(*given))

    names = ["attend_dkv", "attend_dq", "attend_forward", "selected_gradient_parts", "selected_parts"]
    for name, module in zip(names, (dkv_tiles, attend_tiles, attend_tiles, gradient_tiles, parts_tiles), strict=True):
        count(module, name)
    sums = ["_attend_and_select"] * (len(lengths) == 1)
    count(launch, "_attend_and_select")
    case = parse(f"32/2 128 32,16,64 13+1+2 512 {'+'.join(map(str, lengths))} 1 shared model bf16")
    x, weights = case.inputs("cuda"), output_gradient(case, "cuda")
    _, chosen = forward_and_backward(case, x, weights)
    assert sorted(calls) == sums + ["attend_dkv"] * 3 + names  # dk and dv of four branches
    own = calls.copy()
    monkeypatch.setattr(launch, "has_tiles", lambda device: False)
    _, others = forward_and_backward(case, x, weights)
    assert calls == own
    for indices in (chosen, others):
        assert_selects(case, x, indices)  # each but for near ties; a query of which they made different blocks counts no further
    same = (chosen == others).all(-1).repeat_interleave(16, 1)[..., None]
    assert same.float().mean() > 0.99
    want, _ = forward_and_backward(case, x, weights * same)
    monkeypatch.undo()
    got, _ = forward_and_backward(case, x, weights * same)
    assert relative_l2(got.pop("out") * same, want.pop("out") * same) < 2e-2
    for name, value in got.items():
        assert relative_l2(value, want[name]) < 2e-2, name


@HOPPER
@pytest.mark.parametrize("dim", DIMS)
def test_blocks_chosen_from_stored_sums_are_float64s_but_for_ties_within_their_rounding(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where attention is sharp, so that nearly all blocks have next to nothing, and where sums are made in many chunks."""
    from nsa_cli.ops.triton import attend_tiles

    small = NSAConfig(compress_block=2, compress_stride=1, select_block=4, num_selected=16, window=9)
    for p, heads, tokens, offset, sharpness in (
        (PAPER, 16, 2500, 0, 1), (PAPER, 16, 2500, 0, 8), (PAPER, 6, 700, 2311, 60), (PAPER, 32, 300, 40000, 3),
        (small, 4, 200, 20000, 1), (small, 4, 200, 20000, 10),
    ):  # fmt: skip
        keys = p.num_compressed(tokens + offset)
        q = (torch.randn(2, heads, tokens, dim, device="cuda") * sharpness).bfloat16()
        k, v = (torch.randn(2, 2, keys, dim, device="cuda").bfloat16() for _ in range(2))
        problem = Problem(
            config=p, b=2, h=heads, g=2, n=tokens, d=dim, e=dim, dtype=q.dtype, device=q.device, scale=dim**-0.5, offset=offset
        )
        assert attend_tiles.sums_fit(problem)
        results = []
        for size in (2**30, 2**20):
            monkeypatch.setattr(launch, "SUM_BYTES", size)
            poison()
            out, lse = torch.empty_like(q), torch.empty(2, tokens, heads, device="cuda")
            results.append((launch.attend_and_select(q, k, v, out, lse, problem), out, lse))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), "chunks change something"
        at = torch.arange(offset, offset + tokens, device="cuda")
        scores = torch.einsum("bgrtd,bgcd->bgrtc", q.double().unflatten(1, (2, heads // 2)), k.double()) * dim**-0.5
        seen = torch.arange(keys, device="cuda") * p.compress_stride + p.compress_block - 1 <= at[:, None]
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        importance = reference.importance(probabilities, tokens + offset, p)
        absolute = near_tie_absolute(q.dtype, heads // 2)
        wrong = check_selection(results[0][0], importance, at, p, 2**-10 + 1e-5, absolute)
        assert not wrong, (wrong, p, heads, sharpness)


def leaves(tokens: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """q, k, v, k_cmp, v_cmp and gates of the paper's geometry in bfloat16."""
    blocks = PAPER.num_compressed(tokens)
    shapes = [(heads, tokens, dim)] + 2 * [(kv_heads, tokens, dim)] + 2 * [(kv_heads, blocks, dim)]
    tensors = [torch.randn(1, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    tensors.append(torch.rand(1, heads, tokens, 3, device="cuda", dtype=torch.bfloat16))
    return [tensor.requires_grad_() for tensor in tensors]


def test_the_same_input_gives_the_same_bits_also_where_every_query_selects_the_same_block() -> None:
    case = CASES[0]
    x, weights = case.inputs("cuda"), output_gradient(case, "cuda")
    with torch.no_grad():
        x.k_cmp[:, :, 60:64] = 0.3 * x.q_cmp.mean((1, 2), keepdim=True) + 0.4
        x.q_cmp += 0.5
    (one, indices), (two, again) = (forward_and_backward(case, x, weights) for _ in range(2))
    chosen = (indices[:, :, 2000:] == 15).any(-1).float().mean()
    assert chosen > 0.9, "no heavy list"
    assert torch.equal(indices, again)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@HOPPER
@pytest.mark.parametrize("lengths", [[3000], [1000, 1, 1999]], ids=str)
def test_many_runs_beside_other_work_give_the_same_bits(lengths: list[int]) -> None:
    """Warps of Hopper's own kernels hand buffers to one another: other work shifts when."""
    blocks = sum(PAPER.num_compressed(length) for length in lengths)
    x = [y[:, :, :blocks] if y.shape[2] == PAPER.num_compressed(3000) else y for y in leaves(3000, 32, 2, 128)]
    packed = {} if len(lengths) == 1 else {"cu_seqlens": cu(lengths).cuda()}
    weights = torch.randn(1, 32, 3000, 128, device="cuda", dtype=torch.bfloat16)
    beside, square = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    first: list[Tensor] = []
    for turn in range(40):
        with torch.cuda.stream(beside):
            for _ in range(turn % 5):
                square @ square
        out = nsa_attention(*x, PAPER, kernel="triton", **packed)
        results = [out, *torch.autograd.grad(out, x, weights)]
        first = first or results
        assert all(torch.equal(one, other) for one, other in zip(results, first, strict=True)), turn


@pytest.mark.parametrize("offset", [64, 700])
def test_the_last_queries_alone_have_what_they_have_among_all(offset: int) -> None:
    x = leaves(1500, 16, 2, 128)
    weights = torch.zeros_like(x[0])
    weights[:, :, offset:] = torch.randn_like(weights[:, :, offset:])
    out, chosen = nsa_attention_and_selection(*x, PAPER, kernel="triton")
    wanted = [out, *torch.autograd.grad(out, x, weights)]
    last = [y[:, :, offset:].detach().requires_grad_() if y.shape[1] == 16 else y for y in x]  # q and gates
    out, indices = nsa_attention_and_selection(*last, PAPER, kernel="triton", offset=offset)
    got = [out, *torch.autograd.grad(out, last, weights[:, :, offset:])]
    assert (indices != chosen[:, :, offset:]).any(-1).float().mean() < 5e-3
    for one, other in zip(got, wanted, strict=True):
        assert relative_l2(one, other[:, :, -one.shape[2] :]) < 2e-2


def test_more_than_two_to_the_31_elements_of_q_are_the_same_as_few() -> None:
    """The same sequence in every batch entry, without a copy of its own; then strides beyond int32."""
    one = [x.detach() for x in leaves(4096, 64, 4, 128)]
    want, chosen = nsa_attention_and_selection(*one, PAPER, kernel="triton")
    many = [x.expand(65, -1, -1, -1) for x in one]
    assert many[0].numel() > 2**31
    got, indices = nsa_attention_and_selection(*many, PAPER, kernel="triton")
    for entry in (0, 33, 64):
        assert torch.equal(got[entry], want[0])
        assert torch.equal(indices[entry], chosen[0])
    del got, many
    wide = torch.empty(1, 64, 4096, 128 * 72, device="cuda", dtype=torch.bfloat16)
    assert wide.numel() > 2**31
    q = wide[..., :128]
    q.copy_(one[0])
    assert torch.equal(nsa_attention(q, *one[1:], PAPER, kernel="triton"), want)


def repeated_gradients(one: list[Tensor], weights: Tensor, config: NSAConfig, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of a sequence alone, and of the same one in every batch entry, without copies of the inputs."""
    results = []
    for times in (1, batch):
        x = [tensor.detach().expand(times, -1, -1, -1).requires_grad_() for tensor in one]
        out = nsa_attention(*x, config, kernel="triton")
        results.append(list(torch.autograd.grad(out, x, weights.expand(times, -1, -1, -1))))
    return results[0], results[1]


def test_more_than_two_to_the_31_elements_of_q_have_the_gradients_of_few() -> None:
    one = leaves(4096, 64, 4, 128)
    want, got = repeated_gradients(one, torch.randn_like(one[0]), PAPER, 65)
    assert got[0].numel() > 2**31
    for entry in (0, 33, 64):
        assert torch.equal(got[0][entry], want[0][0])
        for name, many, few in zip(["k", "v", "k_cmp", "v_cmp", "gates"], got[1:], want[1:], strict=True):
            assert relative_l2(many[entry], few[0]) < 5e-3, name  # sums are split otherwise, and rounded to bfloat16


@pytest.mark.parametrize("dim", DIMS)
def test_forward_and_backward_never_wait_for_the_device(dim: int) -> None:
    x = leaves(1500, 16, 2, dim)
    nsa_attention(*x, PAPER, kernel="triton").sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nsa_attention(*x, PAPER, kernel="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dim", DIMS)
def test_a_captured_graph_replays_to_the_bits_of_eager_on_new_inputs(dim: int) -> None:
    x, weights = leaves(1500, 16, 2, dim), torch.randn(1, 16, 1500, dim, device="cuda", dtype=torch.bfloat16)

    def both() -> tuple[Tensor, ...]:
        out = nsa_attention(*x, PAPER, kernel="triton")
        return out, *torch.autograd.grad(out, x, weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for old, new in zip(x, leaves(1500, 16, 2, dim), strict=True):
            old.copy_(new)
    want = both()
    for _ in range(2):  # what a launch counts is zero again
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, want, strict=True))


@pytest.mark.parametrize("dim", DIMS)
def test_a_traced_operator_has_no_graph_break_and_eagers_bits(dim: int) -> None:
    x = leaves(1500, 16, 2, dim)

    def call(*tensors: Any) -> Tensor:
        return nsa_attention(*tensors, PAPER, kernel="triton")

    want = call(*x)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*x)
    weights = torch.randn_like(want)
    assert torch.equal(got, want)
    for one, other in zip(torch.autograd.grad(got, x, weights), torch.autograd.grad(want, x, weights), strict=True):
        assert torch.equal(one, other)


def test_64k_tokens_forward_and_backward_peak_at_9_gib_at_most() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = leaves(65536, 64, 4, 128)
    out = nsa_attention(*x, PAPER, kernel="triton")
    torch.autograd.grad(out, x, torch.randn_like(out))
    peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"peak {peak_gib:.2f} GiB")
    assert peak_gib <= 9.0


def test_captured_steps_of_small_have_the_losses_and_gradients_of_eager() -> None:
    """Dropout included: a replay draws what the pass that it stands for would have drawn."""
    from contextlib import nullcontext

    from nsa_cli.training.graphs import CapturedGradients

    preset = PRESETS["small"]
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(**preset["model"], nsa=NSAConfig(**preset["nsa"])), device="cuda", kernel="triton"
    ).train()
    batches = [torch.randint(0, 256, (8, 257), device="cuda") for _ in range(3)]

    def losses(captured: bool) -> list[tuple[float, float]]:
        torch.manual_seed(1)
        graphs = CapturedGradients(model, model.parameters(), nullcontext)
        seen = []
        for ids in batches:
            model.zero_grad()
            if captured:
                graphs.begin()
                loss = graphs(ids[:, :-1], ids[:, 1:], 0.5)
            else:
                loss = model(ids[:, :-1], ids[:, 1:]) * 0.5
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            seen.append((loss.item(), norm.item()))
        return seen

    for (loss, norm), (want, want_norm) in zip(losses(True), losses(False), strict=True):
        assert loss == pytest.approx(want, rel=1e-5)
        assert norm == pytest.approx(want_norm, rel=1e-3)


def test_the_widest_group_has_a_tile_of_its_own() -> None:
    assert_the_operator_is_right(parse("128/1 32 8,4,16 2+1+1 20 200 1 own model bf16"), "cuda")
