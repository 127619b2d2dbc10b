"""Compression's Triton kernels against the torch path: in Triton's interpreter on a CPU, and on a GPU where there is one.

Fresh memory is NaN here, so that an output left unwritten shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.config import COMPRESSIONS, NSAConfig
from nsa_cli.model import compress, nsa
from nsa_cli.model.compress import make_compression
from tests.inputs import assert_close, cu, relative_l2
from tests.models import SPARSE, random_ids, random_model, randomise, with_nsa

kernels = pytest.importorskip("nsa_cli.ops.triton.windows", reason="triton runs on Linux alone")

GEOMETRIES = [(4, 4), (8, 4), (8, 2), (6, 3), (1, 1)]
LENGTHS = [1, 9, 3, 30, 1, 17]
"""Of packed documents: two of one token, one shorter than a block of 4, one of a few blocks."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # for its filling of fresh memory alone
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def geometry(length: int, stride: int) -> NSAConfig:
    return NSAConfig(compress_block=length, compress_stride=stride, select_block=2 * length)


def tokens_of(batch: int, tokens: int, groups: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[b, g, s, d] as the model has it: a view of one of three parts of a projection [b, s, 3 g d]."""
    projected = torch.randn(batch, tokens, 3, groups, dim, device=DEVICE).to(dtype)
    return projected[:, :, 1].transpose(1, 2).requires_grad_()


def first_tokens(lengths: list[int], config: NSAConfig) -> Tensor:
    """The first token of every compressed block of packed documents."""
    starts, begin = [], 0
    for length in lengths:
        starts += [begin + c * config.compress_stride for c in range(config.num_compressed(length))]
        begin += length
    return torch.tensor(starts, dtype=torch.int64, device=DEVICE)


def reference(x: Tensor, pos: Tensor, config: NSAConfig, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(windows, mean_pool) of the torch path in float64, each with a graph of its own."""
    blocks, others = (compress.windows(x.double(), config, starts) for _ in range(2))
    return blocks + pos.double()[:, None], others.mean(-2)


def gradients(outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((out * w.to(out.dtype)).sum() for out, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(total, inputs, materialize_grads=True))


def check(x: Tensor, config: NSAConfig, starts: Tensor | None = None, tolerance: float = 1e-6) -> None:
    """Values and gradients of both kernels are the torch path's."""
    pos = torch.randn(x.shape[1], config.compress_block, x.shape[3], device=x.device).requires_grad_()
    want = reference(x, pos, config, starts)
    got = (kernels.windows(x, pos, config, starts), kernels.mean_pool(x, config, starts))
    weights = tuple(torch.randn_like(out).to(x.dtype) for out in want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == x.dtype
        assert ours.is_contiguous()
        assert relative_l2(ours, theirs) <= tolerance
    wanted = gradients(want[:1], weights[:1], [x, pos]) + gradients(want[1:], weights[1:], [x])
    gotten = gradients(got[:1], weights[:1], [x, pos]) + gradients(got[1:], weights[1:], [x])
    for name, ours, theirs in zip(("dx", "dpos", "dx of the mean"), gotten, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_l2(ours, theirs) <= tolerance, name


@pytest.mark.parametrize(("length", "stride", "dim"), [*((*sizes, 8) for sizes in GEOMETRIES), (8, 2, 32), (6, 3, 32)])
def test_values_and_gradients_are_the_torch_paths_at_any_length(length: int, stride: int, dim: int) -> None:
    for tokens in sorted({1, max(length - 1, 1), length, length + 1, 67}):
        check(tokens_of(2, tokens, 2, dim), geometry(length, stride))


@pytest.mark.parametrize(("length", "stride"), GEOMETRIES[:3])
def test_a_head_of_many_tiles_and_an_odd_head_dim_agree_too(length: int, stride: int) -> None:
    check(tokens_of(1, 130, 2, 80), geometry(length, stride))


@pytest.mark.parametrize(("length", "stride"), GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents_agree_with_the_torch_path(length: int, stride: int, dtype: torch.dtype) -> None:
    config = geometry(length, stride)
    check(tokens_of(1, sum(LENGTHS), 2, 8), config, first_tokens(LENGTHS, config).to(dtype))


def test_packed_documents_give_what_each_gives_alone() -> None:
    config = geometry(4, 2)
    x = tokens_of(1, sum(LENGTHS), 2, 8)
    pos = torch.randn(2, 4, 8, device=DEVICE)
    out = kernels.windows(x, pos, config, first_tokens(LENGTHS, config))
    weights = torch.randn_like(out)
    (dx,) = torch.autograd.grad((out * weights).sum(), x)
    documents = x.detach().split(LENGTHS, 2)
    blocks = weights.split([config.num_compressed(length) for length in LENGTHS], 2)
    alone, grads = [], []
    for document, weight in zip(documents, blocks, strict=True):
        leaf = document.clone().requires_grad_()
        alone.append(kernels.windows(leaf, pos, config))
        grads += torch.autograd.grad((alone[-1] * weight).sum(), leaf)
    assert torch.equal(out, torch.cat(alone, 2))
    assert torch.equal(dx, torch.cat(grads, 2))


def test_no_strides_are_taken_for_granted() -> None:
    config = geometry(8, 4)
    base = torch.randn(2, 3, 21, 16, device=DEVICE)
    views = {
        "contiguous": base,
        "every other channel": torch.randn(2, 3, 21, 32, device=DEVICE)[..., ::2],
        "channels before tokens": base.transpose(2, 3).contiguous().transpose(2, 3),
        "one sequence for all": base[:1].expand(2, -1, -1, -1),
        "one head for all": base[:, :1].expand(-1, 3, -1, -1),
        "one token for all": base[:, :, :1].expand(-1, -1, 21, -1),
    }
    for name, view in views.items():
        print(name)
        check(view.requires_grad_(), config)
    starts = torch.tensor([[0, 9], [4, 9], [13, 9]], device=DEVICE)[:, 0]
    check(base, config, starts)


def test_what_is_expanded_gets_the_sum_of_its_copies_gradients() -> None:
    config = geometry(4, 2)
    base = torch.randn(1, 1, 11, 8, device=DEVICE, requires_grad=True)
    out = kernels.windows(base.expand(3, 2, -1, -1), None, config)
    # The gradient of a sum is one number, expanded: the backward kernel reads it with strides 0.
    out.sum().backward()
    counts = torch.tensor([1.0, 1, 2, 2, 2, 2, 2, 2, 1, 1, 0], device=DEVICE)
    assert_close(base.grad, 6 * counts[:, None].expand(11, 8)[None, None], 0)


def test_without_positions_a_window_is_its_tokens_bit_by_bit() -> None:
    config = geometry(8, 2)
    x = tokens_of(2, 37, 2, 8)
    assert torch.equal(kernels.windows(x, None, config), compress.windows(x, config))


def test_a_wider_position_is_added_before_the_one_rounding() -> None:
    """As under autocast, where float32 positions promote half-precision tokens and the product rounds them back."""
    config = geometry(4, 2)
    x = tokens_of(1, 40, 2, 8, torch.float16)
    pos = torch.randn(2, 4, 8, device=DEVICE, requires_grad=True)
    out = kernels.windows(x, pos, config)
    want = compress.windows(x, config) + pos[:, None]
    assert want.dtype == torch.float32
    assert torch.equal(out, want.half())
    weights = torch.randn_like(out)
    dx, dpos = torch.autograd.grad(out, (x, pos), weights)
    assert (dx.dtype, dpos.dtype) == (torch.float16, torch.float32)
    assert relative_l2(dpos, weights.double().sum((0, 2))) < 1e-6


@pytest.mark.parametrize("starts", [None, torch.zeros(0, dtype=torch.int64, device=DEVICE)])
def test_tokens_without_a_block_give_nothing_and_get_a_zero_gradient(starts: Tensor | None) -> None:
    config = geometry(8, 4)
    x = tokens_of(2, 7, 2, 8)
    pos = torch.randn(2, 8, 8, device=DEVICE, requires_grad=True)
    out, mean = kernels.windows(x, pos, config, starts), kernels.mean_pool(x, config, starts)
    assert out.shape == (2, 2, 0, 8, 8)
    assert mean.shape == (2, 2, 0, 8)
    for grad in torch.autograd.grad(out.sum() + mean.sum(), (x, pos)):
        assert not grad.any()


def test_only_the_gradients_asked_for_are_made() -> None:
    config = geometry(4, 2)
    x, pos = tokens_of(1, 12, 2, 8), torch.randn(2, 4, 8, device=DEVICE, requires_grad=True)
    alone = torch.autograd.grad(kernels.windows(x.detach(), pos, config).square().sum(), pos)
    both = torch.autograd.grad(kernels.windows(x, pos, config).square().sum(), (x, pos))
    only = torch.autograd.grad(kernels.windows(x, pos.detach(), config).square().sum(), x)
    assert torch.equal(alone[0], both[1])
    assert torch.equal(only[0], both[0])


def test_the_same_input_gives_the_same_bits() -> None:
    config = geometry(8, 2)
    x, pos = tokens_of(2, 67, 2, 8), torch.randn(2, 8, 8, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        out, mean = kernels.windows(x, pos, config), kernels.mean_pool(x, config)
        runs.append([out, mean, *torch.autograd.grad(out.square().sum() + mean.square().sum(), (x, pos))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_wrong_arguments_are_refused_by_name() -> None:
    config = geometry(4, 2)
    x, pos = torch.randn(1, 2, 9, 8, device=DEVICE), torch.randn(2, 4, 8, device=DEVICE)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("x is", (x[0], pos, config)),
        ("x is", (x.long(), pos, config)),
        ("pos is", (x, pos[:1], config)),
        ("pos is", (x, pos.long(), config)),
        ("starts is", (x, pos, config, torch.zeros(2, device=DEVICE))),
        ("starts is", (x, pos, config, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE))),
    ]
    for message, arguments in calls:
        with pytest.raises(ValueError, match=message):
            kernels.windows(*arguments)
    with pytest.raises(ValueError, match="x is"):
        kernels.mean_pool(x[0], config)


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    x, pos = tokens_of(1, 9, 2, 8), torch.randn(2, 4, 8, device=DEVICE, requires_grad=True)
    dout = torch.randn(1, 2, 3, 4, 8, device=DEVICE)
    starts = torch.tensor([0, 2, 5], device=DEVICE)
    torch.library.opcheck(kernels.windows_forward, (x, pos, starts, 4, 2))
    torch.library.opcheck(kernels.mean_pool_forward, (x, None, 4, 2))
    torch.library.opcheck(kernels.windows_backward, (dout, None, 9, 4, 2))
    torch.library.opcheck(kernels.mean_pool_backward, (dout[:, :, :, 0], starts, 9, 4, 2))


@pytest.mark.parametrize("name", ["mean", "mlp"])
def test_a_compiled_compression_has_no_graph_break_and_eagers_numbers(name: str) -> None:
    torch.compiler.reset()
    network = make_compression(with_nsa(compress=name).nsa, 2, 8).to(DEVICE)
    x = tokens_of(1, 19, 2, 8)
    traced = torch.compile(network.compress, backend="aot_eager", fullgraph=True)
    results = []
    for function in (network.compress, traced):
        out = function(x, None, "triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])))
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_network_compresses_the_same_through_either_kernel(name: str) -> None:
    config = with_nsa(compress=name).nsa
    network = make_compression(config, 2, 8).to(DEVICE)
    randomise(network)
    x = tokens_of(1, sum(LENGTHS), 2, 8)
    for starts in (None, first_tokens(LENGTHS, config)):
        outs = [network.compress(x, starts, kernel) for kernel in ("torch", "triton")]
        weights = torch.randn_like(outs[0])
        want, got = (torch.autograd.grad((out * weights).sum(), [x, *network.parameters()]) for out in outs)
        assert_close(outs[1], outs[0], 1e-5)
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("rope", ["none", "block"])
def test_a_model_compresses_through_the_kernels_whatever_attends(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass only: attention itself stays on torch here, as does a decoding step's compression."""
    attention, calls = nsa.nsa_attention_and_selection, []
    forward = kernels.windows_forward
    monkeypatch.setattr(nsa, "nsa_attention_and_selection", lambda *a, **k: attention(*a, **{**k, "kernel": "torch"}))
    monkeypatch.setattr(kernels, "windows_forward", lambda *a: calls.append(1) or forward(*a))
    model = random_model(with_nsa(SPARSE, compress_rope=rope), dtype=torch.float32).to(DEVICE)
    ids = random_ids(1, sum(LENGTHS)).to(DEVICE)

    def logits(kernel: str) -> list[Tensor]:
        for block in model.layers:
            block.attn.kernel = kernel
        cache = model.make_cache(1, 80)
        packed = cu(LENGTHS).to(DEVICE)
        return [model(ids), model(ids, cu_seqlens=packed), model(ids, cache=cache), model(ids[:, :5], cache=cache)]

    with torch.no_grad():
        want, got = logits("torch"), logits("triton")
    assert len(calls) == 2 * 3 * len(model.layers)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 64, 80, 128, 256])
def test_every_dtype_agrees_with_float64_on_a_gpu(dtype: torch.dtype, dim: int) -> None:
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    config = NSAConfig()
    for tokens in (1, 31, 32, 33, 1000, 4099):
        check(tokens_of(2, tokens, 3, dim, dtype), config, tolerance=tolerance)
    lengths = [1, 1000, 31, 3, 700]
    check(tokens_of(1, sum(lengths), 3, dim, dtype), config, first_tokens(lengths, config), tolerance)


@pytest.mark.gpu
def test_bf16_tokens_and_float32_positions_round_once_on_a_gpu() -> None:
    config = NSAConfig()
    x, pos = tokens_of(1, 999, 2, 64, torch.bfloat16), torch.randn(2, 32, 64, device=DEVICE)
    want = (compress.windows(x, config) + pos[:, None]).bfloat16()
    assert torch.equal(kernels.windows(x, pos, config), want)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_gpu_and_a_cuda_graph_replays_to_the_same_bits(packed: bool) -> None:
    config = NSAConfig()
    lengths = [500, 3, 521]
    starts = first_tokens(lengths, config) if packed else None
    x, pos = tokens_of(1, sum(lengths), 2, 64, torch.bfloat16), torch.randn(2, 32, 64, device=DEVICE, requires_grad=True)

    def step() -> list[Tensor]:
        out, mean = kernels.windows(x, pos, config, starts), kernels.mean_pool(x, config, starts)
        return [out, mean, *torch.autograd.grad(out.float().square().sum() + mean.float().square().sum(), (x, pos))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


@pytest.mark.gpu
def test_tensors_of_more_than_two_to_the_31_elements_work_on_a_gpu() -> None:
    """Windows, their gradient and the tokens of the mean, 4 GiB each in bf16."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN first would be for nothing
    config = geometry(64, 64)
    few = torch.randn(1, 1, 2**16, 128, device=DEVICE, dtype=torch.bfloat16)
    x = few.expand(257, -1, -1, -1).requires_grad_()
    out = kernels.windows(x, None, config)
    assert out.numel() > 2**31
    want = compress.windows(few, config)[0]
    assert torch.equal(out[0], want)
    assert torch.equal(out[-1], want)
    (dx,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(dx[-1], few[0])
    del out
    tokens = dx.reshape(1, 1, -1, 128)
    assert tokens.numel() > 2**31
    want = kernels.mean_pool(few, config)
    assert torch.equal(kernels.mean_pool(tokens, config)[:, :, -want.shape[2] :], want)
