"""The loss on held-out text: the same windows every time, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Validation:
    """What a validation found. loss: nats per target. by_source: the same for each part of a mixture, by name."""

    loss: float
    by_source: dict[str, float]


def validation_loss(
    forward: Callable[..., Tensor],
    batches: Iterator[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    interruption: Interruption,
    weights: Mapping[str, float],
) -> Validation | None:
    """Mean cross-entropy over the targets of each source, and the mean of these by weight; None if a signal came before the
    last batch.

    Call inside `evaluating`. Sums stay on the device in float64; the host waits once, at the end.
    """
    totals: dict[str, Tensor] = {}
    for inputs, targets, _, cu_seqlens, source in batches:
        if interruption:
            return None
        predicted = (targets != NO_TARGET).sum()
        with autocast():
            loss = forward(inputs, targets, cu_seqlens).double() * predicted
        sums = torch.stack((loss, predicted.double()))
        totals[source] = totals[source] + sums if source in totals else sums
    assert totals, "a corpus without validation text is not validated"
    by_source = {source: float((total[0] / total[1]).item()) for source, total in totals.items()}
    whole = sum(weights[source] for source in by_source)
    loss_by_weight = sum(weights[source] / whole * loss for source, loss in by_source.items())
    return Validation(loss_by_weight, by_source if len(by_source) > 1 else {})
