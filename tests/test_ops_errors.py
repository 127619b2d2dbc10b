"""Wrong arguments are refused by name, and kernels that cannot run here say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_cli.config import NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.ops import compressed_attention, nsa_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import resolve_kernel
from tests.inputs import Inputs, cu, make_inputs

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=9)
TOKENS = 40


@pytest.fixture
def x(seed: int) -> Inputs:
    return make_inputs(CONFIG, TOKENS, dtype=torch.float32)


def run(x: Inputs, **extra: Any) -> None:
    nsa_attention(*x.required(), CONFIG, **x.extra(), **extra)


@pytest.mark.parametrize("name", ["q", "k", "v", "k_cmp", "v_cmp", "q_cmp", "k_win", "v_win"])
@pytest.mark.parametrize("wrong", ["dtype", "integer", "rank", "batch"])
def test_a_wrong_tensor_is_refused_by_its_name(name: str, wrong: str, x: Inputs) -> None:
    value = x.tensors()[name]
    bad = {
        "dtype": value.double(),
        "integer": value.long(),
        "rank": value[0],
        "batch": torch.cat([value, value]),
    }[wrong]
    # A batch of another size is a disagreement of two, and either may be named.
    other = "|q|gates" if wrong == "batch" else ""
    with pytest.raises(ValueError, match=rf"\b({name}{other})\b"):
        run(replace(x, **{name: bad}))


@pytest.mark.parametrize("name", ["k", "v", "k_cmp", "v_cmp", "k_win", "v_win"])
@pytest.mark.parametrize("wrong", ["heads", "tokens"])
def test_heads_and_tokens_that_do_not_fit_are_refused(name: str, wrong: str, x: Inputs) -> None:
    value = x.tensors()[name]
    bad = value[:, [0, 1, 1]] if wrong == "heads" else value[:, :, :-1]
    # A wrong count of keys is the values' disagreement, and the other way round: either name helps.
    with pytest.raises(ValueError, match=rf"\b[kv]{name[1:]}\b"):
        run(replace(x, **{name: bad}))


@pytest.mark.parametrize("name", ["k", "k_cmp", "k_win"])
def test_a_wrong_head_dim_is_refused(name: str, x: Inputs) -> None:
    with pytest.raises(ValueError, match=rf"\b({name}|k)\b.*head dim"):
        run(replace(x, **{name: x.tensors()[name][..., :-1]}))


def test_values_of_different_head_dims_are_refused(x: Inputs) -> None:
    for name in ("v", "v_cmp", "v_win"):
        with pytest.raises(ValueError, match=name):
            run(replace(x, **{name: x.tensors()[name][..., :-1]}))


def test_query_heads_that_no_key_head_count_divides_are_refused(x: Inputs) -> None:
    with pytest.raises(ValueError, match=r"heads.*3"):
        window_attention(x.q[:, :3], x.k, x.v, CONFIG)


def test_no_tokens_are_refused(x: Inputs) -> None:
    with pytest.raises(ValueError, match=r"q .*at least one"):
        window_attention(x.q[:, :, :0], x.k[:, :, :0], x.v[:, :, :0], CONFIG)


def test_tensors_on_different_devices_are_refused(x: Inputs) -> None:
    with pytest.raises(ValueError, match=r"k .*meta"):
        window_attention(x.q, x.k.to("meta"), x.v, CONFIG)


@pytest.mark.parametrize(
    "bad",
    [
        lambda gates: gates[..., :2],
        lambda gates: gates[:, :1],
        lambda gates: gates[:, :, :-1],
        lambda gates: gates[..., 0],
    ],
    ids=["branches", "heads", "tokens", "rank"],
)
def test_wrong_gates_are_refused(bad: Any, x: Inputs) -> None:
    with pytest.raises(ValueError, match="gates"):
        run(replace(x, gates=bad(x.gates)))


def test_gates_of_another_device_or_kind_are_refused(x: Inputs) -> None:
    for bad in (x.gates.long(), x.gates.to("meta")):
        with pytest.raises(ValueError, match="gates"):
            run(replace(x, gates=bad))


@pytest.mark.parametrize(
    "bad",
    [
        lambda indices: indices.long(),
        lambda indices: indices[..., :-1],
        lambda indices: indices[:, :1],
        lambda indices: indices[:, :, :-1],
        lambda indices: indices.float(),
        lambda indices: indices[0],
        lambda indices: indices.to("meta"),
    ],
    ids=["int64", "places", "groups", "tokens", "float", "rank", "device"],
)
def test_wrong_block_indices_are_refused(bad: Any, x: Inputs) -> None:
    _, indices = compressed_attention(x.q, x.k_cmp, x.v_cmp, CONFIG)
    with pytest.raises(ValueError, match="block_indices"):
        selected_attention(x.q, x.k, x.v, bad(indices), CONFIG)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0, TOKENS]),
        torch.tensor([0, TOKENS - 1], dtype=torch.int32),
        torch.tensor([1, TOKENS], dtype=torch.int32),
        torch.tensor([0, 30, 20, TOKENS], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([[0, TOKENS]], dtype=torch.int32),
        torch.tensor([0.0, TOKENS]),
    ],
    ids=["int64", "short", "late", "descending", "one", "none", "rank", "float"],
)
def test_wrong_cu_seqlens_are_refused(bad: torch.Tensor, x: Inputs) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        run(x, cu_seqlens=bad)


def test_packed_documents_need_a_batch_of_one_and_their_own_blocks(x: Inputs) -> None:
    two = x.map(lambda name, value: torch.cat([value, value]))
    with pytest.raises(ValueError, match="batch"):
        run(two, cu_seqlens=cu([TOKENS]))
    # 19 blocks fit into 40 tokens, 9 into each half.
    with pytest.raises(ValueError, match=r"k_cmp .*18"):
        run(x, cu_seqlens=cu([20, 20]))


@pytest.mark.parametrize("bad", [torch.arange(40)[None].int(), torch.arange(39)[None], torch.arange(40)])
def test_wrong_positions_are_refused(bad: torch.Tensor, x: Inputs) -> None:
    with pytest.raises(ValueError, match="positions"):
        run(x, positions=bad)


@pytest.mark.parametrize("op", ["nsa", "cmp", "slc", "win"])
def test_an_unknown_kernel_is_refused_by_name(op: str, x: Inputs) -> None:
    _, indices = compressed_attention(x.q, x.k_cmp, x.v_cmp, CONFIG)
    call: Callable[[], Any] = {
        "nsa": lambda: run(x, kernel="cuda"),
        "cmp": lambda: compressed_attention(x.q, x.k_cmp, x.v_cmp, CONFIG, kernel="cuda"),
        "slc": lambda: selected_attention(x.q, x.k, x.v, indices, CONFIG, kernel="cuda"),
        "win": lambda: window_attention(x.q, x.k, x.v, CONFIG, kernel="cuda"),
    }[op]
    with pytest.raises(ValueError, match="kernel = 'cuda'"):
        call()


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("kernel", ["flex", "triton"])
def test_a_kernel_that_needs_a_gpu_says_so_on_a_cpu(kernel: str, x: Inputs) -> None:
    for call in (lambda: run(x, kernel=kernel), lambda: resolve_kernel(kernel, "cpu")):
        with pytest.raises(NsaError, match=rf"{kernel}.*CUDA GPU") as error:
            call()
        assert error.value.exit_code == ExitCode.UNAVAILABLE
        assert "torch" in error.value.hint


@pytest.mark.usefixtures("no_interpreter")
def test_triton_goes_on_as_torch_where_that_is_allowed_and_says_so() -> None:
    name, notice = resolve_kernel("triton", "cpu", allow_fallback=True)
    assert name == "torch"
    assert notice is not None
    assert "triton" in notice
    assert "torch" in notice
    assert "\n" not in notice


def test_flex_never_falls_back() -> None:
    with pytest.raises(NsaError) as error:
        resolve_kernel("flex", "cpu", allow_fallback=True)
    assert error.value.exit_code == ExitCode.UNAVAILABLE


def test_auto_and_torch_are_torch_on_a_cpu() -> None:
    assert resolve_kernel("auto", "cpu") == ("torch", None)
    assert resolve_kernel("torch", "cpu") == ("torch", None)
    with pytest.raises(ValueError, match="kernel = 'fast'"):
        resolve_kernel("fast", "cpu")
