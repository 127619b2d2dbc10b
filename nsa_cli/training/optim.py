"""AdamW with decay on matrices only, one clipped update, and the guard that keeps bad gradients out of the weights.

Weights and moments are float32 (or float64) throughout; autocast, where the loop uses it, lowers only the arithmetic.
Nothing here waits for the device: whether an update is skipped is decided on the device, by the `found_inf` input of
fused AdamW, and read by the host only where the loop reads its metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsa_cli.config import TrainConfig
from nsa_cli.errors import ExitCode, NsaError


class Diverged(NsaError):
    """Loss or gradient was not finite at each of steps first_step to last_step; exit 4. where: the data of the first."""

    def __init__(self, first_step: int, last_step: int, where: str = "") -> None:
        self.first_step, self.last_step = first_step, last_step
        super().__init__(
            f"training diverged: loss or gradient not finite at each of steps {first_step} to {last_step}; they made no "
            f"update, the weights are those before step {first_step}" + (f"; {where}" if where else ""),
            "lower --lr, lengthen --warmup or lower --grad-clip, then train again",
            ExitCode.DIVERGED,
        )


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on this parameter: on matrices (ndim >= 2, embeddings included, as in nanoGPT).

    Not on norms and biases (ndim 1), nor on the compression's `pos`, a table of positions [kv_heads, l, D] that is
    added and never multiplied.
    """
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] != "pos"


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: the decayed parameters, then the others; an empty group is left out. Tied weights come once."""
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if is_decayed(name, parameter)]
    others = [parameter for name, parameter in named if not is_decayed(name, parameter)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused where the device has a fused kernel (CUDA, CPU, MPS)."""
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    betas = (config.beta1, config.beta2)
    try:
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    except RuntimeError:  # torch's word for "no fused kernel on this device"
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas)


class FiniteGuard:
    """Counts the updates that a non-finite loss or gradient norm forbids; three int64 scalars on the device.

    in_row: skipped updates up to now without a good one between. total: skipped updates of the run.
    halted_at: the step at which in_row reached `limit`, else 0. From then on every update is skipped, so that the
    weights stay as they were however late the host looks.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self.in_row = torch.zeros((), dtype=torch.int64, device=device)
        self.total = torch.zeros_like(self.in_row)
        self.halted_at = torch.zeros_like(self.in_row)

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if this step's update must be skipped, else 0.0: float32 scalar on the device, without a sync."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.total += bad
        self.in_row = torch.where(bad, self.in_row + 1, 0)
        reached = (self.in_row >= self.limit) & (self.halted_at == 0)
        self.halted_at = torch.where(reached, step, self.halted_at)
        return (bad | (self.halted_at > 0)).float()

    def check(self) -> int:
        """Skipped updates so far (waits for the device); Diverged once too many came in a row."""
        total, halted_at = torch.stack((self.total, self.halted_at)).tolist()
        if halted_at:
            raise Diverged(halted_at - self.limit + 1, halted_at)
        return int(total)

    def to_tensors(self) -> dict[str, Tensor]:
        """The counts for the resume state."""
        return {"in_row": self.in_row, "total": self.total, "halted_at": self.halted_at}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `to_tensors`, onto this guard's device."""
        for name in ("in_row", "total", "halted_at"):
            setattr(self, name, tensors[name].to(self.in_row.device, torch.int64))


def clipped_update(
    optimizer: torch.optim.AdamW, guard: FiniteGuard, *, step: int, loss: Tensor, lr: float, grad_clip: float
) -> Tensor:
    """One AdamW update at rate lr from the gradients now in `.grad`, which it scales and then sets to None.

    Gradients are scaled by min(1, grad_clip / norm), norm the global 2-norm; grad_clip 0 leaves them. A non-finite loss
    or norm leaves weights and moments as they were. Returns the norm before clipping, a scalar on the device.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # a DTensor, where every process holds a shard of each gradient
        norm = norm.full_tensor()
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    skip = guard.judge(step, loss, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.defaults["fused"]:
        # What torch.amp.GradScaler does: the fused kernel reads found_inf on the device and returns without a change.
        optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's state as `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`; parameters never updated have none."""
    named = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            named[f"{name}.{key}"] = value
    return named


def load_moments(model: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `moments`, onto each parameter's device; ValueError names a tensor that belongs to no parameter."""
    left = dict(tensors)
    fused = bool(optimizer.defaults["fused"])
    for name, parameter in model.named_parameters():
        state = {key: left.pop(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step") if f"{name}.{key}" in left}
        if not state:
            continue
        step = state.pop("step")
        optimizer.state[parameter] = {
            "step": step.to(parameter.device if fused else "cpu", copy=True),
            **{key: value.to(parameter.device, parameter.dtype, copy=True) for key, value in state.items()},
        }
    if left:
        raise ValueError(f"optimizer state of {sorted(left)[0]}: the model has no such parameter")
