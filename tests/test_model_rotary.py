"""Rotary positions: right at any length and in any dtype."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nsa_cli.model import build_model
from nsa_cli.model.rotary import Rotary, rotate
from tests import oracle
from tests.models import SPARSE, random_ids, random_model

FAR = [0, 1, 255, 256, 257, 32767, 131071, 131072]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("dim", [2, 64, 128])
def test_float32_is_within_1e_5_of_a_float64_computation_at_position_131072(dim: int, theta: float) -> None:
    rotary, positions = Rotary(dim, theta), torch.tensor(FAR)
    x = torch.randn(1, 2, len(FAR), dim)
    got = rotate(x, rotary.cos_sin(positions))
    assert got.dtype == torch.float32
    want = oracle.rotate(x, FAR, theta)
    # The bound is on cos and sin, so on a unit pair of channels; the largest of the normal inputs is about 4.
    assert np.abs(oracle.f64(got) - want).max() < 1e-5
    ones = rotate(torch.ones(1, 1, len(FAR), dim), rotary.cos_sin(positions))
    assert np.abs(oracle.f64(ones) - oracle.rotate(torch.ones(1, 1, len(FAR), dim), FAR, theta)).max() < 1e-6


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_kernels_that_make_angles_themselves_find_the_same_ones(dim: int) -> None:
    rotary, positions = Rotary(dim, 500000.0), torch.tensor([*FAR, 2**24 + 1])
    *turns, tau = rotary.turns(torch.device("cpu"))
    around = positions.double()[:, None] * torch.stack(turns)
    angles = ((around - around.floor()) * tau).float().repeat_interleave(2, 1)
    torch.testing.assert_close(torch.stack((angles.cos(), angles.sin())), rotary.cos_sin(positions), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_own_rounding(dtype: torch.dtype) -> None:
    rotary, positions = Rotary(64, 10000.0), torch.tensor(FAR)
    x = torch.randn(1, 2, len(FAR), 64).to(dtype)
    got = rotate(x, rotary.cos_sin(positions))
    assert got.dtype == dtype
    want = torch.from_numpy(oracle.rotate(x, FAR)).to(dtype)
    # Computed in float32 and rounded once: at most the neighbouring number, and nearly always the same.
    size = torch.finfo(dtype).eps * want.double().abs().clamp_min(1e-3)
    assert ((got.double() - want.double()).abs() <= size).all()
    assert (got == want).double().mean() > 0.98


def test_half_precision_keeps_every_position_apart() -> None:
    """Positions made in bf16 would give 641 distinct rows among 2,048."""
    rotary = Rotary(64, 10000.0)
    rows = rotate(torch.ones(1, 1, 2048, 64).bfloat16(), rotary.cos_sin(torch.arange(2048)))[0, 0]
    assert len(torch.unique(rows, dim=0)) == 2048


def test_float64_is_turned_by_the_same_float32_angles() -> None:
    x = torch.randn(1, 1, len(FAR), 32, dtype=torch.float64)
    got = rotate(x, Rotary(32, 10000.0).cos_sin(torch.tensor(FAR)))
    assert np.abs(oracle.f64(got) - oracle.rotate(x, FAR)).max() < 1e-5


def test_only_distances_matter() -> None:
    rotary = Rotary(32, 10000.0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(t: int, s: int) -> float:
        return float((rotate(q, rotary.cos_sin(torch.tensor([t]))) * rotate(k, rotary.cos_sin(torch.tensor([s])))).sum())

    for t in (100, 4096, 131072):
        assert score(t, t - 37) == pytest.approx(score(37, 0), abs=2e-5)


def test_a_bf16_call_does_not_poison_a_float32_one() -> None:
    rotary, positions = Rotary(64, 10000.0), torch.arange(4096)
    x = torch.randn(1, 1, 4096, 64)
    before = rotate(x, rotary.cos_sin(positions))
    rotate(x.bfloat16(), rotary.cos_sin(positions))
    assert torch.equal(rotate(x, rotary.cos_sin(positions)), before)


def test_rotary_is_neither_trained_nor_saved_nor_cast() -> None:
    model = build_model(SPARSE, dtype=torch.bfloat16)
    assert not any("rot" in name or "freq" in name for name in model.state_dict())
    assert not any("rot" in name or "freq" in name for name, _ in model.named_parameters())
    fresh = Rotary(SPARSE.dim_head, SPARSE.rope_theta)
    model.double().bfloat16()
    assert torch.equal(model.rotary.angles(torch.tensor(FAR)), fresh.angles(torch.tensor(FAR)))


def test_the_models_theta_reaches_its_rotation() -> None:
    ids = random_ids(1, 40)
    torch.manual_seed(0)
    near = random_model(SPARSE)(ids)
    torch.manual_seed(0)
    far = random_model(replace(SPARSE, rope_theta=100.0))(ids)
    assert not torch.allclose(near, far)
