"""The Triton kernels in Triton's interpreter (float32): right for any geometry, group, head dim, layout and packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from nsa_cli.ops import compressed_attention, nsa_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection, resolve_kernel
from tests.command_line import nsa
from tests.inputs import Inputs, assert_close, cu, make_inputs, relative_l2
from tests.triton_cases import (
    COLUMNS,
    assert_each_branch_is_right,
    assert_the_operator_is_right,
    forward_and_backward,
    output_gradient,
    parse,
    table,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: tests/test_triton_gpu.py")

CASES = table(f"""
{COLUMNS}
1/1 16 8,4,16 1+1+2 9 33 1 own plain f32
2/1 8 2,1,4 3+1+1 5 27 2 shared model f32
3/1 32 16,8,16 2+1+1 33 47 1 own sliced f32
4/1 64 8,4,8 3+0+1 16 29 1 shared turned f32
6/1 16 4,4,4 5+1+2 7 37 1 own model f32
8/1 80 8,8,8 2+2+1 12 35 1 own plain f32
16/1 32 4,2,8 1+1+0 1 25 1 shared model f32
32/1 16 8,4,16 1+0+1 4096 21 1 own plain f32
4/2 96 16,16,32 1+1+1 33 49 1 own model f32
2/2 128 32,32,64 1+0+0 20 70 1 shared plain f32
2/1 192/128 8,4,16 2+1+1 17 43 1 own model f32
1/1 256 16,8,16 1+1+1 11 37 1 own turned f32
2/1 16 12,4,24 2+1+0 30 55 1 own sliced f32
2/1 32 64,16,64 1+1+1 64 130 1 own model f32
3/3 16 8,4,16 4+0+0 8 33 1 own plain f32
2/1 16 32,16,64 0+1+2 40 97 1 shared plain f32
4/2 8 4,2,8 61+1+2 3 33 1 own model f32
2/1 64 16,8,16 1+2+2 513 49 1 own plain f32
6/2 32 2,1,4 2+0+2 6 22 1 shared sliced f32
2/1 16 8,4,16 2+1+2 9 1 2 own model f32
2/1 16 8,4,16 2+1+2 9 7 1 own plain f32
2/1 16 8,4,16 2+1+2 9 1+5+33 1 own model f32
3/1 32 4,2,8 2+1+1 10 17+1+9+24 1 own plain f32
4/1 16 8,8,8 3+0+0 5 30+13 1 shared model f32
2/2 16 4,4,4 2+1+0 8 1+1+1 1 own plain f32
2/1 80 16,8,16 1+1+1 20 40+27 1 own sliced f32
8/2 16 2,1,4 1+2+1 3 7+18 1 shared turned f32
2/1 96 12,4,24 1+0+1 31 30+31 1 own model f32
1/1 32 32,32,64 59+2+2 33 77 1 own model f32
2/2 192/128 4,2,8 2+2+0 11 39 1 shared plain f32
6/2 96 12,4,24 1+0+1 1 37 1 shared plain f32
8/1 96 16,16,128 3+0+2 2 20 1 own turned f32
3/1 64 8,4,8 3+1+2 2 33 1 shared sliced f32
4/1 8 4,2,8 0+1+2 512 31 1 shared sliced f32
8/2 128 16,16,32 0+0+1 40 35 1 own sliced f32
16/1 128 16,8,16 0+1+2 64 27 1 own plain f32
32/1 80 8,8,16 0+2+2 4096 11 1 shared turned f32
4/1 64 32,16,64 1+0+0 7 0+37+0+20+9 1 shared model f32
2/1 256 8,8,8 4+2+0 33 0+37+0+20+9 1 own turned f32
6/1 64 4,2,8 0+1+0 2 5+1+1+15 1 shared sliced f32
4/2 16 4,2,8 2+1+1 9 17+1+9+24 1 shared model f32
2/1 32 4,2,8 3+1+2 16 61 2 shared sliced f32
3/1 16 8,4,8 1+2+1 8 20+27 1 shared plain f32
""")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operator_and_its_gradients_are_the_torch_kernels(case: Any) -> None:
    with poisoned(torch.device("cpu")):
        assert_the_operator_is_right(case, "cpu")


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 5, 14, 21, 23)], ids=lambda case: case.name)
def test_each_branch_alone_is_the_torch_kernels_also_on_arbitrary_block_lists(case: Any) -> None:
    with poisoned(torch.device("cpu")):
        assert_each_branch_is_right(case, "cpu")


def patched(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    from nsa_cli.ops.triton import launch

    for name, value in values.items():
        monkeypatch.setattr(launch, name, value)


SMALL = {"UNIT_TOKENS": {"forward": 128, "backward": 128}, "LEAST_LIST": 0, "ITEM": {"forward": 8, "backward": 8}}


def test_chunks_of_units_scores_and_splits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three units a key/value head, taken two at a time: a head is split, and a chunk spans two heads."""
    from nsa_cli.ops.triton import launch

    case = parse("2/2 16 16,16,32 1+1+1 20 257 1 own model f32")
    a_row = 4 * case.dim * case.heads // case.kv_heads
    chunks, plain, splits = [], launch.Selection.chunks, []
    patched(monkeypatch, **SMALL, PART_BYTES=dict.fromkeys(("forward", "backward"), 2 * 128 * a_row), SCORE_ELEMENTS=2000)
    monkeypatch.setattr(launch.Selection, "chunks", lambda self: chunks.append(plain(self)) or chunks[-1])
    monkeypatch.setattr(launch.attend, "attend_dkv", Watched(launch.attend.attend_dkv, splits))
    with poisoned(torch.device("cpu")):
        assert_the_operator_is_right(case, "cpu")
    assert chunks == 2 * [[(0, 2, 0), (2, 4, 256), (4, 6, 257 + 128)]]
    assert max(splits) > 1


class Watched:
    """A kernel whose launches' splits of the queries are noted: the leading dimension of dk's parts."""

    def __init__(self, kernel: Any, splits: list[int]) -> None:
        self.kernel, self.splits = kernel, splits

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.splits.append(arguments[4].shape[0])
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.mark.parametrize("line", ["2/1 32 16,8,32 2+1+1 9 75 1 own plain f32", "2/1 16 16,8,48 2+0+0 9 100 1 own plain f32"])
def test_a_block_too_large_for_the_chip_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    patched(monkeypatch, KEY_BYTES={4: 1024})
    with poisoned(torch.device("cpu")):
        assert_the_operator_is_right(parse(line), "cpu")


@pytest.mark.parametrize(
    ("line", "branch", "keys"),
    [
        ("2/1 16 8,4,16 2+1+1 9 90+0+1+70 1 own model f32", "first", 4 * 16),
        ("3/1 8 4,2,8 2+2+0 10 3+97+0 1 shared sliced f32", "first", 3 * 16),
        ("2/2 16 8,4,16 2+1+1 9 101+ 1 shared model f32", "first", 16),
        ("2/1 16 8,4,16 2+1+1 9 15+9+16 1 own model f32", "init", 40),
    ],
)
def test_the_first_blocks_of_long_documents_are_gathered(
    monkeypatch: pytest.MonkeyPatch, line: str, branch: str, keys: int
) -> None:
    """Where they lie, all queries of a document would be one program's."""
    from nsa_cli.ops.triton import launch

    found, plain = dict[str, int](), launch.attend_dkv

    def noted(name: str, q: Any, k: Any, *rest: Any) -> Any:
        found[name] = k.shape[2]
        return plain(name, q, k, *rest)

    patched(monkeypatch, attend_dkv=noted, LONG_DOCUMENT=0)
    assert_the_operator_is_right(parse(line), "cpu")
    assert {"first", "init"} & found.keys() == {branch}
    assert found[branch] == keys


def test_the_same_input_gives_the_same_bits() -> None:
    case = parse("4/2 16 4,2,8 2+1+1 9 35 1 own model f32")
    x, weights = case.inputs("cpu"), output_gradient(case, "cpu")
    (one, indices), (two, again) = (forward_and_backward(case, x, weights) for _ in range(2))
    assert torch.equal(indices, again)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_no_output_selection_or_gradient_depends_on_a_later_token() -> None:
    """13 selection blocks, two free places; everything from token t on is replaced, and no row before it moves."""
    config = NSAConfig(compress_block=2, compress_stride=1, select_block=4, num_selected=5, window=6)
    x = make_inputs(config, 51, heads=2, kv_heads=1, dim=16, dtype=torch.float32).requires_grad()
    want, chosen = nsa_attention_and_selection(*x.required(), config, **x.extra(), kernel="triton")
    assert (chosen[:, :, -1] >= 0).all(), "nothing is left out"
    for t in (18, 45):
        last = config.num_compressed(t)
        with torch.no_grad():
            other = make_inputs(config, 51, heads=2, kv_heads=1, dim=16, dtype=torch.float32)
            for name, value in other.tensors().items():
                kept = last if name in ("k_cmp", "v_cmp") else t
                value.mul_(30)[:, :, :kept] = getattr(x, name)[:, :, :kept]
            got, indices = nsa_attention_and_selection(*other.required(), config, **other.extra(), kernel="triton")
        assert torch.equal(indices[:, :, :t], chosen[:, :, :t])
        assert_close(got[:, :, :t], want[:, :, :t], 1e-6)
    grads = torch.autograd.grad(want[:, :, :18].square().sum(), list(x.tensors().values()))
    for name, grad in zip(x.tensors(), grads, strict=True):
        kept = config.num_compressed(18) if name in ("k_cmp", "v_cmp") else 18
        assert grad[:, :, :kept].any(), name
        assert torch.equal(grad[:, :, kept:], torch.zeros_like(grad[:, :, kept:])), name


def test_a_query_that_sees_no_block_has_no_compressed_output_and_negative_gates_and_a_scale_are_taken() -> None:
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=9)
    x = make_inputs(config, 41, heads=2, kv_heads=1, dim=16, dtype=torch.float32).requires_grad()
    only = torch.zeros_like(x.gates)
    only[..., 0] = -1.5
    out = nsa_attention(*x.required()[:5], only, config, **x.extra(), kernel="triton", scale=0.7)
    want = nsa_attention(*x.required()[:5], only, config, **x.extra(), kernel="torch", scale=0.7)
    assert torch.equal(out[:, :, :7], torch.zeros_like(out[:, :, :7]))
    assert relative_l2(out, want) < 1e-5
    (got,), (expected,) = (torch.autograd.grad(y.square().sum(), [x.q_cmp]) for y in (out, want))
    assert torch.equal(got[:, :, :7], torch.zeros_like(got[:, :, :7]))
    assert relative_l2(got, expected) < 1e-5


TINY = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=9)


def beyond(**sizes: int) -> NSAConfig:
    return NSAConfig(**{"compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4, "window": 9, **sizes})


REFUSED: list[tuple[Callable[[Inputs], Any], str]] = [
    (lambda x: window_attention(x.q.double(), x.k.double(), x.v.double(), TINY, kernel="triton"), "not torch.float64"),
    (lambda x: window_attention(x.q, x.k, x.v, TINY, kernel="triton", scale=-1.0), "a scale above 0, not -1.0"),
    (lambda x: compressed_attention(x.q, x.k_cmp, x.v_cmp, TINY, kernel="triton", scale=0.0), "a scale above 0, not 0.0"),
    (lambda x: window_attention(x.q, x.k, x.v, beyond(select_block=512), kernel="triton"), "select_block up to 256, not 512"),
    (lambda x: window_attention(x.q, x.k, x.v, beyond(num_selected=257), kernel="triton"), "num_selected up to 256, not 257"),
    (
        lambda x: nsa_attention(*x.required(), beyond(select_block=256, compress_stride=1), kernel="triton"),
        "select_block / compress_stride up to 128, not 256",
    ),
    (
        lambda x: window_attention(*(y.repeat(1, 1, 1, 33) for y in (x.q, x.k, x.v)), TINY, kernel="triton"),
        "head dim up to 256, not 264",
    ),
    (
        lambda x: window_attention(x.q.repeat(1, 65, 1, 1), x.k, x.v, TINY, kernel="triton"),
        "heads a group up to 128, not 130",
    ),
]


@pytest.mark.parametrize(("call", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_kernels_cannot_do_is_refused_with_the_reason_and_the_kernel_that_can(
    call: Callable[[Inputs], Any], reason: str
) -> None:
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    with pytest.raises(NsaError) as caught:
        call(x)
    assert reason in caught.value.message
    assert "--kernel torch" in str(caught.value.hint)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


def test_on_a_gpu_auto_goes_on_with_torch_where_the_kernels_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_cli.ops.dispatch.resolve_kernel", lambda kernel, device: ("triton", None))
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8)
    out, indices = nsa_attention_and_selection(*x.required(), TINY, **x.extra(), kernel="auto")
    monkeypatch.undo()
    want, chosen = nsa_attention_and_selection(*x.required(), TINY, **x.extra(), kernel="torch")
    assert torch.equal(out, want)
    assert torch.equal(indices, chosen)


def test_the_builder_refuses_what_the_kernels_cannot_do_and_auto_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(dim=32, depth=1, heads=2, kv_heads=2, dim_head=16, nsa=NSAConfig(select_block=512))
    with pytest.raises(NsaError, match="select_block up to 256, not 512"):
        build_model(config, kernel="triton")
    with pytest.raises(NsaError, match="heads a group up to 128, not 130"):
        build_model(replace(config, heads=130, kv_heads=1, nsa=TINY), kernel="triton")
    monkeypatch.setattr("nsa_cli.model.build.resolve_kernel", lambda kernel, device: ("triton", None))
    assert build_model(config, kernel="auto").kernel == "torch"
    usual = replace(config, nsa=TINY)
    assert build_model(usual, kernel="auto").kernel == "triton"
    assert build_model(usual, kernel="auto", dtype=torch.float64).kernel == "torch"
    assert resolve_kernel("auto", "cuda")[0] == "triton"


FORWARD = ("test_schema", "test_faketensor", "test_autograd_registration")
BACKWARD = FORWARD[:2]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_the_whole_operator_is_registered_as_torch_wants_it(shared: bool) -> None:
    """Schemas, fake kernels with the real strides, and gradients that torch.compile may trace."""
    from nsa_cli.ops.triton import operators

    x, geometry = parse("2/1 8 4,2,8 2+1+1 9 17 1 own model f32").inputs("cpu"), [4, 2, 8, 4, 1, 1, 9]
    extra = (None, None, None) if shared else (x.q_cmp, x.k_win, x.v_win)
    inputs = (*x.required(), *extra, None if shared else cu([4, 13]))
    if not shared:
        inputs = (*x.required()[:3], x.k_cmp[:, :, :6], x.v_cmp[:, :, :6], *inputs[5:])
    torch.library.opcheck(operators.attention_forward, (*inputs, geometry, 0.25), test_utils=FORWARD)
    with torch.no_grad():
        out, *saved = operators.attention_forward(*inputs, geometry, 0.25)
        torch.library.opcheck(operators.attention_backward, (out, *inputs, *saved, geometry, 0.25), test_utils=BACKWARD)


@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_each_branch_is_registered_as_torch_wants_it(branch: str) -> None:
    from nsa_cli.ops.triton import operators

    x, geometry = parse("2/1 12/8 4,2,8 2+1+1 9 17 1 own sliced f32").inputs("cpu"), [4, 2, 8, 4, 1, 1, 9]
    inputs = {
        "compressed": (x.q, x.k_cmp, x.v_cmp),
        "selected": (x.q, x.k, x.v, torch.zeros(1, 1, 17, 4, dtype=torch.int32).fill_(-1)),
        "window": (x.q, x.k, x.v),
    }[branch]
    forward, backward = (getattr(operators, f"{branch}_{way}") for way in ("forward", "backward"))
    torch.library.opcheck(forward, (*inputs, None, geometry, 0.25), test_utils=FORWARD)
    with torch.no_grad():
        out, lse, *_ = forward(*inputs, None, geometry, 0.25)
        torch.library.opcheck(backward, (out, *inputs, out, lse, None, geometry, 0.25), test_utils=BACKWARD)


def test_a_traced_model_has_no_graph_break_and_eagers_numbers() -> None:
    torch.compiler.reset()
    config = ModelConfig(vocab_size=64, dim=32, depth=1, heads=2, kv_heads=1, dim_head=16, context=24, nsa=TINY)
    model, ids = build_model(config, kernel="triton"), torch.randint(0, 64, (1, 25))
    want = model(ids[:, :-1], ids[:, 1:])
    want.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids[:, :-1], ids[:, 1:])
    got.backward()
    assert_close(got, want, 1e-6)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, grads[name], 1e-5)


def test_only_the_gradients_that_are_asked_for_are_given() -> None:
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    for name in ("gates", "k_cmp", "k_win"):
        y = x.map(lambda field, value, name=name: value.detach().requires_grad_(field == name))
        out, want = (nsa_attention(*y.required(), TINY, **y.extra(), kernel=kernel) for kernel in ("triton", "torch"))
        asked = y.tensors()[name]
        got, expected = (torch.autograd.grad(z.square().sum(), asked)[0] for z in (out, want))
        assert relative_l2(got, expected) < 1e-5, name


def test_gates_may_have_a_wider_dtype_than_the_rest() -> None:
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    gates = (x.gates.double() - 0.5).requires_grad_()
    out, want = (nsa_attention(*x.required()[:5], gates, TINY, kernel=kernel) for kernel in ("triton", "torch"))
    (got,), (expected,) = (torch.autograd.grad(y.square().sum(), [gates]) for y in (out, want))
    assert (out.dtype, got.dtype) == (torch.float32, torch.float64)
    assert relative_l2(out, want) < 1e-5
    assert relative_l2(got, expected) < 1e-5


def test_compressed_queries_may_have_a_head_dim_of_their_own() -> None:
    x = make_inputs(TINY, 37, heads=2, kv_heads=1, dim=16, dtype=torch.float32)
    x = x.map(lambda name, value: value[..., :8].clone() if name in ("q_cmp", "k_cmp") else value).requires_grad()
    results = []
    for kernel in ("triton", "torch"):
        out = nsa_attention(*x.required(), TINY, **x.extra(), kernel=kernel)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(x.tensors().values()))])
    for got, want in zip(*results, strict=True):
        assert relative_l2(got, want) < 1e-5


def test_queries_at_positions_of_a_cache_go_to_torch() -> None:
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    at = torch.arange(15, 20)[None]
    late = replace(x, q=x.q[:, :, 15:], q_cmp=x.q_cmp[:, :, 15:], gates=x.gates[:, :, 15:])
    got, want = (
        nsa_attention(*late.required(), TINY, **late.extra(), kernel=kernel, positions=at) for kernel in ("triton", "torch")
    )
    assert torch.equal(got, want)


def test_selected_attention_takes_empty_lists() -> None:
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    nothing = torch.full((1, 1, 20, 4), -1, dtype=torch.int32)
    assert torch.equal(selected_attention(x.q, x.k, x.v, nothing, TINY, kernel="triton"), torch.zeros_like(x.q))


LINE = [
    "train", "data.txt", "--sparse", "--kernel", "triton", "--preset", "tiny", "--seq-len", "64", "--batch-tokens",
    "64", "--steps", "3", "--eval-every", "0",
]  # fmt: skip


def losses(folder: Path, *command: str, **variables: str) -> tuple[list[float], str]:
    folder.mkdir()
    (folder / "data.txt").write_text("It was a bright cold day in the valley, and all the clocks were late. " * 40)
    done = nsa(*command, "--log-every", "1", cwd=folder, **variables)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "ckpt.metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], str(done.stderr)


def test_the_interpreter_trains_through_the_kernels_themselves_with_the_torch_kernels_losses(tmp_path: Path) -> None:
    kernels, said = losses(tmp_path / "a", *LINE, TRITON_INTERPRET="1")
    assert "kernel triton" in said
    torch_, said = losses(tmp_path / "b", *LINE)
    assert "kernel 'triton' needs a CUDA GPU; going on with 'torch'" in said
    assert len(kernels) == len(torch_) == 3
    for one, other in zip(kernels, torch_, strict=True):
        assert abs(one - other) < 1e-4
