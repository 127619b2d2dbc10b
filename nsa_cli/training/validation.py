"""The loss on held-out text: the same windows every time, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa_cli.data import NO_TARGET
from nsa_cli.training.batches import Batch
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
    forward: Callable[..., Tensor],
    batches: Iterator[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    interruption: Interruption,
) -> float | None:
    """Mean cross-entropy in nats per target over the batches; None if a signal came before the last.

    Call inside `evaluating`. Sums stay on the device in float64; the host waits once, at the end.
    """
    total: Tensor | None = None
    count: Tensor | None = None
    for inputs, targets, _, cu_seqlens in batches:
        if interruption:
            return None
        predicted = (targets != NO_TARGET).sum()
        with autocast():
            loss = forward(inputs, targets, cu_seqlens).double() * predicted
        total = loss if total is None else total + loss
        count = predicted if count is None else count + predicted
    assert total is not None, "a corpus without validation text is not validated"
    assert count is not None
    return float((total / count).item())
