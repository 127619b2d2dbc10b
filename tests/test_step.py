"""`Step`, the kernels' way to decode one token a row, against the model's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.model import Cache, Transformer, build_model
from nsa_cli.model import captured as captured_module
from nsa_cli.model.captured import CapturedStep
from nsa_cli.model.compress import NETWORKS
from nsa_cli.model.rotary import Rotary, rotate
from nsa_cli.model.step import Step, can_step
from nsa_cli.ops.triton import append, decode, group, group_tiles, linear, linear_tiles, residual
from nsa_cli.ops.triton.decode import dense_attention
from tests.inputs import relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY: dict[str, Any] = {"compress_block": 4, "compress_stride": 2, "select_block": 8, "num_selected": 4, "window": 6}
SHAPE: dict[str, Any] = {"vocab_size": 33, "dim": 16, "depth": 1, "heads": 4, "kv_heads": 2, "dim_head": 8, "context": 64}

CASES: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    ({}, {}),
    ({"branch_kv": "shared", "compress": "gated"}, {"ff": "swiglu"}),
    ({"branch_kv": "shared", "compress": "mean", "compress_rope": "block"}, {"tie_embeddings": False, "depth": 2}),
    ({"compress_rope": "block"}, {"heads": 3, "kv_heads": 3, "dim_head": 12}),
    ({"compress_block": 1, "compress_stride": 1, "select_block": 1, "window": 1}, {"kv_heads": 1}),
    ({"compress_block": 12, "compress_stride": 4, "select_block": 24, "num_selected": 3}, {"dim_head": 20}),
    (None, {}),
    (None, {"heads": 6, "kv_heads": 1, "dim_head": 20, "ff": "swiglu"}),
]


def _models(nsa: dict[str, Any] | None, shape: dict[str, Any]) -> tuple[Transformer, Transformer]:
    """One model for both ways: the kernels' (for `Step`) and torch's, which is the measure."""
    geometry = None if nsa is None else NSAConfig(**{**GEOMETRY, **nsa})
    config = ModelConfig(**{**SHAPE, **shape, "nsa": geometry})
    torch.manual_seed(0)
    ours = build_model(config, device=DEVICE, kernel="auto" if nsa is None else "triton").eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # gates' biases, too, start as zeros
            parameter.normal_(std=0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    theirs = build_model(config, device=DEVICE, kernel="torch").eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _filled(model: Transformer, ids: torch.Tensor, counts: list[int], capacity: int) -> Cache:
    cache = model.make_cache(len(counts), capacity)
    model(ids[:, : max(counts)], cache=cache, counts=counts)
    return cache


def _next(ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    return ids[torch.arange(len(ids)), torch.tensor(cache.host_lengths)]


@pytest.mark.parametrize(("nsa", "shape"), CASES, ids=str)
@torch.inference_mode()
def test_steps_by_kernels_are_the_models_own(nsa: dict[str, Any] | None, shape: dict[str, Any]) -> None:
    """Rows of different lengths, from before the first block to past the window, and blocks completed in some of them."""
    ours, theirs = _models(nsa, shape)
    ids, counts = torch.randint(33, (2, 40), device=DEVICE), [2, 13]
    want, got = (_filled(theirs, ids, counts, 19) for _ in "ab")
    step = Step(ours)
    step.reserve(got)
    for place in range(5):
        new = _next(ids, want)
        expected = theirs(new[:, None], cache=want)[:, 0]
        with poisoned(torch.device(DEVICE)):
            logits = step(new, got, blocks=step.completes(got))
        got.host_lengths = [n + 1 for n in got.host_lengths]
        assert relative_l2(logits, expected) < 1e-5, place
    assert got.lengths.tolist() == want.lengths.tolist() == want.host_lengths == got.host_lengths


@pytest.mark.parametrize("ff", ["gelu", "swiglu"])
@torch.inference_mode()
def test_products_of_more_rows_are_the_librarys_and_the_same(ff: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = _models(None, {"ff": ff, "depth": 2, "tie_embeddings": ff == "gelu"})
    ids, counts = torch.randint(33, (2, 20), device=DEVICE), [3, 9]
    few, many = (_filled(theirs, ids, counts, 19) for _ in "ab")
    step, new = Step(ours), _next(ids, few)
    logits = step(new, few, blocks=False)
    monkeypatch.setattr(linear, "MOST_ROWS", 1)
    assert relative_l2(step(new, many, blocks=False), logits) < 1e-5


@pytest.mark.parametrize("nsa", [{}, {"branch_kv": "shared"}, None], ids=["independent", "shared", "dense"])
@torch.inference_mode()
def test_a_step_leaves_the_cache_as_the_model_does(nsa: dict[str, Any] | None) -> None:
    ours, theirs = _models(nsa, {})
    ids, counts = torch.randint(33, (2, 40), device=DEVICE), [6, 13]
    want, got = (_filled(theirs, ids, counts, 40) for _ in "ab")
    step = Step(ours)
    for _ in range(4):
        new = _next(ids, want)
        theirs(new[:, None], cache=want)
        step(new, got, blocks=True)  # as well where no row completes one
    for mine, other in zip(got.layers, want.layers, strict=True):
        assert mine.buffers.keys() == other.buffers.keys()
        for name, buffer in mine.buffers.items():
            assert torch.allclose(buffer, other.buffers[name], atol=1e-5), name


@torch.inference_mode()
def test_steps_beyond_the_capacity_grow_the_cache_and_leave_complete_blocks_alone() -> None:
    """The first token beyond the old capacity completes a block."""
    ours, theirs = _models({}, {})
    ids = torch.randint(33, (1, 40), device=DEVICE)
    cache = _filled(theirs, ids, [19], 19)  # l 4, d 2: token 19 is the last of block 8
    captured = CapturedStep(Step(ours), cache)
    got = torch.stack([captured(ids[:, t], capture=False) for t in range(19, 23)], 1)
    assert relative_l2(got, theirs(ids[:, :23])[:, 19:]) < 1e-5
    assert cache.host_lengths == [23]


class FakeGraph:
    """Stands in for a CUDA graph on a CPU: a replay is the step again, into the logits of the capture."""

    def __init__(self) -> None:
        self.again: Any = None

    def pool(self) -> int:
        return 0

    def replay(self) -> None:
        step, ids, cache, blocks, logits = self.again
        logits.copy_(step(ids, cache, blocks=blocks))


@pytest.fixture
def graphs_without_gpu(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Captures on a CPU: what is captured does not happen, and the replayed graph does it."""
    made: list[FakeGraph] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    last: dict[str, Any] = {}
    run = Step.__call__

    def call(self: Step, ids: torch.Tensor, cache: Cache, *, blocks: bool) -> torch.Tensor:
        last.update(zip(("step", "ids", "cache", "blocks"), (self, ids, cache, blocks), strict=True))
        last["logits"] = run(self, ids, cache, blocks=blocks)
        return last["logits"]

    @contextmanager
    def capture(graph: FakeGraph, **options: Any) -> Iterator[None]:
        cache = last["cache"]
        before = [{name: x.clone() for name, x in layer.buffers.items()} for layer in cache.layers]
        lengths = cache.lengths.clone()
        yield
        for layer, kept in zip(cache.layers, before, strict=True):
            for name, x in kept.items():
                layer.buffers[name].copy_(x)
        cache.lengths.copy_(lengths)
        graph.again = (lambda *a, **k: run(last["step"], *a, **k), last["ids"], cache, last["blocks"], last["logits"])
        made.append(graph)

    monkeypatch.setattr(Step, "__call__", call)
    monkeypatch.setattr(captured_module, "_stream", lambda device: stream)
    for name, fake in (("current_stream", lambda *a: stream), ("stream", lambda s: nullcontext()), ("CUDAGraph", FakeGraph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made


@pytest.mark.parametrize("nsa", [{"branch_kv": "shared", "compress": "mean"}, None], ids=["sparse", "dense"])
@torch.inference_mode()
def test_replayed_steps_are_the_models_own(nsa: dict[str, Any] | None, graphs_without_gpu: list[FakeGraph]) -> None:
    """One graph for steps that complete a block and one for the others, made anew when the cache grows."""
    if DEVICE != "cpu":
        pytest.skip("a GPU has graphs of its own")
    ours, theirs = _models(nsa, {})
    ids, counts = torch.randint(33, (2, 40)), [6, 14]
    want, got = (_filled(theirs, ids, counts, 18) for _ in "ab")
    captured = CapturedStep(Step(ours), got)
    for place in range(8):
        if place == 1:
            marks = want.mark(), got.mark()
        if place == 3:
            want.back_to(marks[0])
            got.back_to(marks[1])
        new = _next(ids, want)
        expected = theirs(new[:, None], cache=want)[:, 0]
        assert relative_l2(captured(new), expected) < 1e-5, place
        assert got.host_lengths == got.lengths.tolist() == want.host_lengths
    assert len(graphs_without_gpu) >= (3 if nsa is not None else 2)


@torch.inference_mode()
def test_kernels_that_cannot_run_leave_the_steps_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler: told once, with the cache as it was before."""
    ours, theirs = _models(None, {})
    ids = torch.randint(33, (2, 40), device=DEVICE)
    want, got = (_filled(theirs, ids, [5, 14], 40) for _ in "ab")

    def broken(*args: Any, **named: Any) -> torch.Tensor:
        raise ValueError("no compiler\nmore")

    monkeypatch.setattr(decode, "dense_attention", broken)
    step = Step(ours)
    with pytest.warns(UserWarning, match="cannot run here: no compiler$"):
        first = CapturedStep(step, got)(_next(ids, want))
    assert relative_l2(first, theirs(_next(ids, want)[:, None], cache=want)[:, 0]) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            new = _next(ids, want)
            assert relative_l2(CapturedStep(step, got)(new), theirs(new[:, None], cache=want)[:, 0]) < 1e-5
    assert got.host_lengths == got.lengths.tolist() == want.host_lengths


@pytest.mark.parametrize(("h", "g", "d", "places"), [(4, 2, 8, 40), (3, 1, 20, 300), (5, 5, 128, 130), (16, 1, 64, 1)])
def test_dense_attention_of_one_query_reads_its_own_past_alone(h: int, g: int, d: int, places: int) -> None:
    b = 3
    q, k, v = torch.randn(b, h, 1, d), torch.randn(b, g, places, d), torch.randn(b, g, places, d)
    at = torch.tensor([0, places // 2, places - 1])
    for row in range(b):
        k[row, :, at[row] + 1 :] = v[row, :, at[row] + 1 :] = float("nan")
    q, k, v, at = (x.to(DEVICE) for x in (q, k, v, at))
    with poisoned(q.device):
        out = dense_attention(q, k, v, positions=at, scale=0.3)
    for row in range(b):
        keys, values = (x[row, :, : at[row] + 1].repeat_interleave(h // g, 0).double() for x in (k, v))
        want = (q[row].double() @ keys.mT * 0.3).softmax(-1) @ values
        assert relative_l2(out[row], want) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention_of_one_query_merges_many_splits_on_a_gpu(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, heads, n, 64, device="cuda").to(dtype) for heads, n in ((8, 1), (2, 70_000), (2, 70_000)))
    at = torch.tensor([69_999, 123], device="cuda")
    with poisoned(q.device):
        out = dense_attention(q, k, v, positions=at, scale=0.2)
    for row in range(2):
        keys, values = (x[row, :, : at[row] + 1].repeat_interleave(4, 0).double() for x in (k, v))
        want = (q[row].double() @ keys.mT * 0.2).softmax(-1) @ values
        assert relative_l2(out[row], want) < (5e-6 if dtype == torch.float32 else 1e-2)


def test_steps_by_kernels_are_for_gpus_alone() -> None:
    assert not can_step(_models(None, {})[0].cpu())


def test_a_token_is_turned_right_at_a_far_position() -> None:
    """Turns in float32 would be off by a thousandth."""
    at, rotary, x = torch.tensor([131_071], device=DEVICE), Rotary(4, 10_000.0), torch.randn(1, 3 * 4 + 4, device=DEVICE)
    k, v = (torch.zeros(1, 1, 131_072, 4, device=DEVICE) for _ in "kv")
    q, _, _ = append.append(x, rotary.turns(x.device), at, append.Places(k, v), heads=2, sets=1, config=None)
    got = torch.cat([q[0, :, 0], k[0, :, -1]])
    torch.testing.assert_close(got, rotate(x[0, :12].view(3, 4), rotary.cos_sin(at)), rtol=0, atol=1e-5)
    assert torch.equal(v[0, 0, -1], x[0, 12:])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "nsa", [*({"compress": name} for name in NETWORKS), {"branch_kv": "shared", "compress_rope": "block"}, None], ids=str
)
@torch.inference_mode()
def test_captured_steps_are_the_models_own_on_a_gpu(
    nsa: dict[str, Any] | None, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both graphs, from a ragged prompt, across the room that there was; several rows as many are."""
    monkeypatch.setattr(group_tiles, "KEY_BYTES", math.inf if rows > 2 else 0)
    monkeypatch.setattr(group_tiles, "TILE_BYTES", (2**13, 2**13))  # several tiles of compressed keys
    geometry = None if nsa is None else NSAConfig(**nsa)
    config = ModelConfig(**{**SHAPE, "dim": 256, "heads": 8, "kv_heads": 2, "dim_head": 64, "context": 4096, "nsa": geometry})
    torch.manual_seed(1)
    model = build_model(config, device="cuda", dtype=dtype).eval()
    assert can_step(model)
    ids = torch.randint(33, (rows, 1200), device="cuda")
    want, got = (_filled(model, ids, [900, 1100, 701, 1003, 850][:rows], 1110) for _ in "ab")
    captured = CapturedStep(Step(model), got)
    errors = []
    for _ in range(60):
        new = _next(ids, want)
        expected = model(new[:, None], cache=want)[:, 0]
        errors.append(relative_l2(captured(new), expected))
    assert captured.step.can_run
    assert captured.step.can_capture
    assert len(captured.graphs) == (1 if nsa is None else 2)
    errors.sort()
    assert errors[len(errors) // 2] < (1e-4 if dtype == torch.float32 else 3e-2)  # a near tie selects another block now and then
    assert errors[-1] < (1e-4 if dtype == torch.float32 else 2e-1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("nsa", [{}, {"branch_kv": "shared"}, None], ids=["independent", "shared", "dense"])
@torch.inference_mode()
def test_kernels_that_begin_early_give_the_same_bits_as_in_turn_on_a_gpu(
    nsa: dict[str, Any] | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = None if nsa is None else NSAConfig(**nsa)
    config = ModelConfig(
        **{**SHAPE, "dim": 256, "depth": 2, "heads": 8, "kv_heads": 2, "dim_head": 64, "context": 4096, "nsa": geometry}
    )
    model = build_model(config, device="cuda", dtype=torch.bfloat16).eval()
    monkeypatch.setattr(group_tiles, "KEY_BYTES", math.inf if rows > 2 else 0)
    monkeypatch.setattr(group_tiles, "TILE_BYTES", (2**13, 2**13))  # several tiles of compressed keys
    ids, runs = torch.randint(33, (rows, 1600), device="cuda"), []
    for early in (True, False):
        if not early:
            for module in (decode, group, group_tiles, append, linear, linear_tiles, residual):
                monkeypatch.setattr(module, "overlap", lambda device: {"OVERLAP": False})
        cache = _filled(model, ids, [1500, 1203, 900, 1450, 1111][:rows], 1600)
        captured = CapturedStep(Step(model), cache)
        runs.append(torch.stack([captured(ids[:, 1500 + t]).clone() for t in range(40)]))
    assert torch.equal(*runs)
