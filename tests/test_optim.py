"""AdamW decays matrices alone, clips by the global norm, and never lets a non-finite gradient into the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nsa_cli.config import ModelConfig, NSAConfig, TrainConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from nsa_cli.training.optim import (
    FiniteGuard,
    clipped_update,
    is_decayed,
    load_moments,
    make_optimizer,
    moments,
)

LIMIT = TrainConfig().max_skipped
SPARSE = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=8)


def sparse_model() -> nn.Module:
    return build_model(ModelConfig(dim=16, depth=2, heads=2, kv_heads=1, dim_head=8, context=16, nsa=SPARSE))


class Line(nn.Module):
    """One matrix and one vector, with gradients that a test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.vector = nn.Parameter(torch.tensor([3.0]))

    def set_gradients(self, value: float) -> None:
        self.matrix.grad, self.vector.grad = torch.full((1, 2), value), torch.full((1,), value)


def line_and_optimizer(fused: bool = True, **fields: float) -> tuple[Line, torch.optim.AdamW]:
    model = Line()
    optimizer = make_optimizer(model, TrainConfig(**fields))  # type: ignore[arg-type]
    if not fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups)
    assert optimizer.defaults["fused"] is (True if fused else None)
    return model, optimizer


def update(
    model: Line, optimizer: torch.optim.AdamW, guard: FiniteGuard, *, gradient: float, clip: float = 1.0
) -> float:
    model.set_gradients(gradient)
    norm = clipped_update(optimizer, guard, step=1, loss=torch.tensor(1.0), lr=0.1, grad_clip=clip)
    return float(norm)


def test_weight_decay_acts_on_matrices_and_not_on_norms_biases_and_positions() -> None:
    names = {name for name, parameter in sparse_model().named_parameters() if not is_decayed(name, parameter)}
    endings = {name.split(".", 2)[-1] if name.startswith("layers") else name for name in names}
    norms = {"attn_norm.weight", "ff_norm.weight", "norm.weight"}
    assert endings == {*norms, "attn.to_gates.bias", "attn.compress_k.pos", "attn.compress_v.pos"}


def test_every_parameter_is_in_one_group_and_the_groups_have_their_decay() -> None:
    model = sparse_model()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)
    assert decays == {id(p): 0.3 if is_decayed(name, p) else 0.0 for name, p in model.named_parameters()}


def test_with_zero_gradients_only_the_decayed_weights_shrink() -> None:
    model, optimizer = line_and_optimizer(weight_decay=0.5)
    update(model, optimizer, FiniteGuard(torch.device("cpu"), LIMIT), gradient=0.0)
    assert model.matrix.tolist() == [[pytest.approx(0.95), pytest.approx(-1.9)]]
    assert model.vector.tolist() == [3.0]


def test_the_first_update_moves_every_weight_by_the_rate_and_drops_the_gradients() -> None:
    model, optimizer = line_and_optimizer(weight_decay=0.0)
    update(model, optimizer, FiniteGuard(torch.device("cpu"), LIMIT), gradient=0.5)
    assert torch.allclose(model.matrix, torch.tensor([[0.9, -2.1]]))
    assert model.matrix.grad is None


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (0.5, 0.5), (100.0, 12**0.5), (0.0, 12**0.5)])
def test_gradients_are_clipped_by_their_global_norm_and_the_norm_before_is_told(clip: float, expected: float) -> None:
    model, optimizer = line_and_optimizer(beta1=0.0)
    norm = update(model, optimizer, FiniteGuard(torch.device("cpu"), LIMIT), gradient=2.0, clip=clip)
    assert norm == pytest.approx(2 * math.sqrt(3))
    seen = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in (model.matrix, model.vector)])
    assert float(seen.norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_leaves_weights_and_moments_as_they_were(fused: bool, bad: float) -> None:
    model, optimizer = line_and_optimizer(fused)
    guard = FiniteGuard(torch.device("cpu"), LIMIT)
    update(model, optimizer, guard, gradient=1.0)
    before = {name: tensor.clone() for name, tensor in {**model.state_dict(), **moments(model, optimizer)}.items()}
    update(model, optimizer, guard, gradient=bad)
    after = {**model.state_dict(), **moments(model, optimizer)}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert guard.check() == 1
    update(model, optimizer, guard, gradient=1.0)
    assert not torch.equal(model.matrix, before["matrix"])
    assert guard.check() == 1


def test_a_non_finite_loss_is_skipped_too() -> None:
    model, optimizer = line_and_optimizer()
    guard = FiniteGuard(torch.device("cpu"), LIMIT)
    model.set_gradients(1.0)
    clipped_update(optimizer, guard, step=1, loss=torch.tensor(math.nan), lr=0.1, grad_clip=1.0)
    assert model.matrix.tolist() == [[1.0, -2.0]]
    assert guard.check() == 1


def test_ten_skipped_updates_in_a_row_end_the_run_and_freeze_the_weights() -> None:
    model, optimizer = line_and_optimizer()
    guard = FiniteGuard(torch.device("cpu"), LIMIT)
    nan, fine = torch.tensor(math.nan), torch.tensor(1.0)

    def step_with(number: int, loss: torch.Tensor) -> None:
        model.set_gradients(1.0)
        clipped_update(optimizer, guard, step=number, loss=loss, lr=0.1, grad_clip=1.0)

    for number in range(1, LIMIT):
        step_with(number, nan)
    step_with(LIMIT, fine)
    assert guard.check() == LIMIT - 1
    kept = model.matrix.detach().clone()
    for number in range(101, 101 + LIMIT):
        step_with(number, nan)
    step_with(111, fine)
    assert torch.equal(model.matrix, kept), "a good step after the tenth bad one must not move the weights any more"
    with pytest.raises(NsaError, match="steps 101 to 110") as caught:
        guard.check()
    assert caught.value.exit_code == ExitCode.DIVERGED


def test_moments_go_into_another_optimizer_and_give_the_same_next_update() -> None:
    first, other = sparse_model(), sparse_model()
    config, guard = TrainConfig(), FiniteGuard(torch.device("cpu"), LIMIT)
    ids = torch.randint(256, (2, 16))

    def step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        loss = model(ids, ids)
        loss.backward()
        clipped_update(optimizer, guard, step=1, loss=loss.detach(), lr=1e-2, grad_clip=1.0)

    optimizer = make_optimizer(first, config)
    step(first, optimizer)
    other.load_state_dict(first.state_dict())
    second = make_optimizer(other, config)
    load_moments(other, second, moments(first, optimizer))
    step(first, optimizer)
    step(other, second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_moments_of_a_parameter_that_is_not_there_are_refused() -> None:
    model, optimizer = line_and_optimizer()
    with pytest.raises(ValueError, match=r"gone\.step"):
        load_moments(model, optimizer, {"gone.step": torch.tensor(1.0)})
