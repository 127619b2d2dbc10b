"""On a CUDA GPU: the torch kernel is the oracle's, and flex agrees with it given the same selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.ops import compressed_attention, nsa_attention, selected_attention, window_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from tests import oracle
from tests.inputs import Inputs, assert_close, cu, make_inputs, relative_l2

pytestmark = pytest.mark.gpu

CONFIG = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=5, window=40)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def outputs_and_gradients(x: Inputs, indices: Tensor, kernel: str) -> dict[str, Tensor]:
    y = x.requires_grad()
    slc = selected_attention(y.q, y.k, y.v, indices, CONFIG, kernel=kernel)
    win = window_attention(y.q, y.k_win, y.v_win, CONFIG, kernel=kernel)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for out in (slc, win):
        weights = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
        # Nothing is shared but the leaves; a compiled backward may give its buffers away, and refuses to be retained.
        out.backward(weights)
    grads = {f"d{name}": value.grad for name, value in y.tensors().items() if value.grad is not None}
    return {"slc": slc, "win": win, **grads}


@pytest.mark.parametrize("tokens", [1, 67, 300, 1024])
def test_the_torch_kernel_is_the_oracles_on_a_gpu(tokens: int) -> None:
    x = make_inputs(CONFIG, tokens, heads=4, kv_heads=2, dim=16, device="cuda")
    out, indices = nsa_attention_and_selection(*x.required(), CONFIG, **x.extra(), kernel="torch")
    assert_close(out, oracle.nsa(*x.required(), CONFIG, **x.extra(), block_indices=indices))
    _, p = oracle.compressed(x.q_cmp, x.k_cmp, x.v_cmp, CONFIG)
    oracle.check_selection(indices, oracle.importance(p, 2, CONFIG), CONFIG, relative=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "group", "dim"), [(128, 1, 64), (300, 4, 64), (517, 3, 32), (257, 16, 128)])
def test_flex_agrees_with_torch_forward_and_backward(dtype: torch.dtype, tokens: int, group: int, dim: int) -> None:
    x = make_inputs(CONFIG, tokens, heads=2 * group, kv_heads=2, dim=dim, dtype=dtype, device="cuda")
    _, indices = compressed_attention(x.q_cmp, x.k_cmp, x.v_cmp, CONFIG)
    want = outputs_and_gradients(x, indices, "torch")
    got = outputs_and_gradients(x, indices, "flex")
    for name, value in want.items():
        assert got[name].dtype == dtype
        assert relative_l2(got[name], value) < TOLERANCE[dtype], name


def test_flex_takes_packed_documents() -> None:
    lengths = [1, 60, 3, 130]
    x = make_inputs(CONFIG, 0, lengths=lengths, dim=32, dtype=torch.float32, device="cuda")
    packed = cu(lengths).cuda()
    got = nsa_attention(*x.required(), CONFIG, **x.extra(), kernel="flex", cu_seqlens=packed)
    want = nsa_attention(*x.required(), CONFIG, **x.extra(), kernel="torch", cu_seqlens=packed)
    assert relative_l2(got, want) < 1e-5


def test_flex_says_what_it_cannot_take() -> None:
    x = make_inputs(CONFIG, 40, dim=16, device="cuda")
    with pytest.raises(NsaError, match="float64") as error:
        window_attention(x.q, x.k, x.v, CONFIG, kernel="flex")
    assert error.value.exit_code == ExitCode.UNAVAILABLE
    x = make_inputs(CONFIG, 40, dim=8, dtype=torch.float32, device="cuda")
    with pytest.raises(NsaError, match="head dim of at least 16"):
        window_attention(x.q, x.k, x.v, CONFIG, kernel="flex")


def test_the_torch_kernel_repeats_its_bits_under_deterministic_algorithms() -> None:
    x = make_inputs(CONFIG, 500, dim=64, dtype=torch.bfloat16, device="cuda")
    runs = []
    try:
        torch.use_deterministic_algorithms(True)
        for _ in range(2):
            y = x.requires_grad()
            out = nsa_attention(*y.required(), CONFIG, **y.extra(), kernel="torch")
            out.float().square().sum().backward()
            runs.append([out, *(value.grad for value in y.tensors().values())])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
