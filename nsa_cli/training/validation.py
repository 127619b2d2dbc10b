"""The loss on held-out text: the same windows every time, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa_cli.training.signals import Interruption


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; its mode and the random states are as before afterwards."""
    was_training = model.training
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


def validation_loss(
    forward: Callable[[Tensor, Tensor], Tensor],
    batches: Iterator[tuple[Tensor, Tensor, int]],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    interruption: Interruption,
    mean: Callable[[Tensor], Tensor],
) -> float | None:
    """Mean cross-entropy in nats per token over the batches; None if a signal came before the last.

    batches: (inputs, targets, windows that count). mean: over the processes that share the batches out.
    Call inside `evaluating`. Sums stay on the device in float64; the host waits once, at the end.
    """
    total: Tensor | None = None
    tokens = 0
    for inputs, targets, counted in batches:
        interruption.poll()
        if interruption:
            return None
        with autocast():
            loss = forward(inputs, targets).double() * (counted * targets.shape[1])
        total = loss if total is None else total + loss
        tokens += counted * targets.shape[1]
    assert total is not None, "a corpus without validation text is not validated"
    total, count = mean(torch.stack((total, torch.full_like(total, tokens)))).tolist()
    return total / count
