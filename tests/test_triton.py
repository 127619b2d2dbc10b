"""The Triton kernels in Triton's interpreter (float32): right for any geometry, group, head dim, layout and packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from nsa_cli.ops import nsa_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection, resolve_kernel
from tests.command_line import nsa
from tests.inputs import assert_close, make_inputs, relative_l2
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
2/1 8 2,1,4 3+1+1 5 41 2 shared model f32
3/1 32 16,8,16 2+1+1 33 47 1 own sliced f32
4/1 64 8,4,8 3+0+1 16 29 1 shared turned f32
6/1 16 4,4,4 5+1+2 7 37 1 own model f32
8/1 80 8,8,8 2+2+1 12 35 1 own plain f32
16/1 32 4,2,8 3+1+0 1 33 1 shared model f32
32/1 16 8,4,16 1+0+1 4096 33 1 own plain f32
4/2 96 16,16,128 1+1+1 33 67 1 own model f32
2/2 128 32,32,64 1+0+0 20 70 1 shared plain f32
2/1 192/128 8,4,16 2+1+1 17 43 1 own model f32
1/1 256 16,8,16 1+1+1 11 37 1 own turned f32
2/1 16 12,4,24 2+1+0 30 55 1 own sliced f32
2/1 32 64,16,64 1+1+1 64 130 1 own model f32
3/3 16 8,4,16 4+0+0 8 33 1 own plain f32
2/1 16 32,16,64 0+1+2 40 97 1 shared plain f32
4/2 8 4,2,8 61+1+2 3 33 1 own model f32
2/1 64 16,8,16 1+2+2 513 49 1 own plain f32
6/2 32 2,1,4 2+0+2 6 31 1 shared sliced f32
2/1 16 8,4,16 2+1+2 9 1 2 own model f32
2/1 16 8,4,16 2+1+2 9 7 1 own plain f32
2/1 16 8,4,16 2+1+2 9 1+5+33 1 own model f32
3/1 32 4,2,8 2+1+1 10 17+1+9+24 1 own plain f32
4/1 16 8,8,8 3+0+0 5 30+13 1 shared model f32
2/2 16 4,4,4 2+1+0 8 1+1+1 1 own plain f32
2/1 80 16,8,16 1+1+1 20 40+27 1 own sliced f32
8/2 16 2,1,4 3+2+1 3 19+22 1 shared turned f32
2/1 96 12,4,24 1+0+1 31 30+31 1 own model f32
1/1 32 32,32,64 59+2+2 33 130 1 own model f32
2/2 192/128 4,2,8 4+2+0 31 35 2 shared plain f32
6/2 96 12,4,24 3+0+2 1 31 2 shared plain f32
8/1 96 8,4,16 3+0+2 2 25 2 own turned f32
3/1 64 8,4,8 13+1+2 2 66 1 shared sliced f32
4/1 8 4,2,8 0+1+2 512 31 1 shared sliced f32
8/2 128 64,16,64 0+0+1 40 65 1 own sliced f32
16/1 128 16,8,16 1+1+2 64 21 2 own plain f32
32/1 80 16,16,128 0+2+2 4096 17 1 shared turned f32
4/1 64 32,16,64 1+0+0 7 0+37+0+20+9 1 shared model f32
2/1 256 8,8,8 4+2+0 33 0+37+0+20+9 1 own turned f32
6/1 64 4,2,8 0+1+0 2 5+1+1+15 1 shared sliced f32
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


@pytest.mark.parametrize(("units", "parts"), [(1, 6), (2, 3), (4, 2)])
def test_chunks_of_units_scores_and_splits_change_nothing(
    monkeypatch: pytest.MonkeyPatch, units: int, parts: int
) -> None:
    """Partials for one unit at a time; for two, of one key/value head's three and of both heads'; for a head and a part."""
    from nsa_cli.ops.triton import launch

    line = "4/2 16 16,16,32 1+1+1 20 260 1 own model f32" if units == 2 else "2/2 16 16,16,32 1+1+1 20 260 1 own model f32"
    case = parse(line)
    a_row = 4 * case.dim * case.heads // case.kv_heads
    patched(monkeypatch, **SMALL, PART_BYTES=dict.fromkeys(("forward", "backward"), 128 * units * a_row), SCORE_ELEMENTS=2000)
    seen, plain, splits = [], launch.Selection.chunks, []
    monkeypatch.setattr(launch.Selection, "chunks", lambda self: seen.append(plain(self)) or seen[-1])
    dkv = launch.attend.attend_dkv
    monkeypatch.setattr(launch.attend, "attend_dkv", Watched(dkv, splits))
    with poisoned(torch.device("cpu")):
        assert_the_operator_is_right(case, "cpu")
    assert [len(chunks) for chunks in seen] == [parts, parts]
    assert seen[0][0][:2] == (0, units)
    assert units != 2 or max(splits) > 1


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
    patched(monkeypatch, KEY_BYTES=1024)
    with poisoned(torch.device("cpu")):
        assert_the_operator_is_right(parse(line), "cpu")


def test_the_same_input_gives_the_same_bits() -> None:
    case = parse("4/2 16 8,4,16 2+1+1 9 50 1 own model f32")
    x, weights = case.inputs("cpu"), output_gradient(case, "cpu")
    (one, indices), (two, again) = (forward_and_backward(case, x, weights) for _ in range(2))
    assert torch.equal(indices, again)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_no_output_depends_on_a_later_token() -> None:
    """13 selection blocks, two free places; everything from token t on is replaced, and no row before it moves."""
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=5, window=12)
    x = make_inputs(config, 100, heads=2, kv_heads=1, dim=16, dtype=torch.float32)
    want, chosen = nsa_attention_and_selection(*x.required(), config, **x.extra(), kernel="triton")
    for t in (37, 88):
        last = config.num_compressed(t)
        other = make_inputs(config, 100, heads=2, kv_heads=1, dim=16, dtype=torch.float32)
        for name, value in x.tensors().items():
            kept = last if name in ("k_cmp", "v_cmp") else t
            getattr(other, name)[:, :, :kept] = value[:, :, :kept]
        got, indices = nsa_attention_and_selection(*other.required(), config, **other.extra(), kernel="triton")
        assert torch.equal(indices[:, :, :t], chosen[:, :, :t])
        assert_close(got[:, :, :t], want[:, :, :t], 1e-6)


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


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: window_attention(x.q.double(), x.k.double(), x.v.double(), TINY, kernel="triton"), "float64"),
        (lambda x: window_attention(x.q, x.k, x.v, TINY, kernel="triton", scale=-1.0), "scale above 0"),
        (
            lambda x: window_attention(x.q, x.k, x.v, NSAConfig(select_block=512), kernel="triton"),
            "select_block up to 256, not 512",
        ),
        (
            lambda x: window_attention(*(y.repeat(1, 1, 1, 33) for y in (x.q, x.k, x.v)), TINY, kernel="triton"),
            "head dim up to 256, not 264",
        ),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason_and_the_kernel_that_can(
    call: Callable[[Any], Any], reason: str
) -> None:
    x = make_inputs(TINY, 20, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    with pytest.raises(NsaError) as caught:
        call(x)
    assert reason in caught.value.message
    assert "--kernel torch" in str(caught.value.hint)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


def test_the_builder_refuses_what_the_kernels_cannot_do_and_auto_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(dim=32, depth=1, heads=2, kv_heads=2, dim_head=16, nsa=NSAConfig(select_block=512))
    with pytest.raises(NsaError, match="select_block up to 256, not 512"):
        build_model(config, kernel="triton")
    monkeypatch.setattr("nsa_cli.model.build.resolve_kernel", lambda kernel, device: ("triton", None))
    assert build_model(config, kernel="auto").kernel == "torch"
    assert resolve_kernel("auto", "cuda")[0] == "triton"


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    """Schemas, fake kernels with the real strides, and gradients that torch.compile may trace."""
    from nsa_cli.ops.triton import operators

    case = parse("4/2 16 8,4,16 2+1+1 9 35 1 own model f32")
    x, geometry = case.inputs("cpu"), [8, 4, 16, 4, 1, 1, 9]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    whole = (*x.required(), x.q_cmp, x.k_win, x.v_win, None, geometry, 0.25)
    torch.library.opcheck(operators.attention_forward, whole, test_utils=tests)
    torch.library.opcheck(operators.attention_forward, (*x.required(), None, None, None, None, geometry, 0.25), test_utils=tests)
    out, branches, lse, indices = operators.attention_forward(*whole)
    with torch.no_grad():
        saved = (*(value.detach() for value in (*x.required(), x.q_cmp, x.k_win, x.v_win)), None, branches, lse, indices)
        torch.library.opcheck(operators.attention_backward, (out.detach(), *saved, geometry, 0.25), test_utils=tests[:2])
    torch.library.opcheck(operators.window_forward, (x.q, x.k, x.v, None, geometry, 0.25), test_utils=tests)
    torch.library.opcheck(operators.selected_forward, (x.q, x.k, x.v, indices, None, geometry, 0.25), test_utils=tests)
    torch.library.opcheck(operators.compressed_forward, (x.q, x.k_cmp, x.v_cmp, None, geometry, 0.25), test_utils=tests)


def test_a_traced_model_has_no_graph_break_and_eagers_numbers() -> None:
    torch.compiler.reset()
    config = ModelConfig(vocab_size=64, dim=32, depth=1, heads=2, kv_heads=1, dim_head=16, context=40, nsa=TINY)
    model, ids = build_model(config, kernel="triton"), torch.randint(0, 64, (1, 41))
    want = model(ids[:, :-1], ids[:, 1:])
    want.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids[:, :-1], ids[:, 1:])
    got.backward()
    assert_close(got, want, 1e-6)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, grads[name], 1e-5)


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
