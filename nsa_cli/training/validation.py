"""The loss on held-out text: the same windows every time, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """What a validation found. loss: nats per target. accuracy: the share of answers that are right, None without tasks.
    losses, accuracies: the same for each part of a mixture, by name; empty for a single source."""

    loss: float
    accuracy: float | None
    losses: dict[str, float]
    accuracies: dict[str, float]

    def details(self) -> dict[str, Any]:
        """What a metrics line says besides the loss."""
        line: dict[str, Any] = {} if self.accuracy is None else {"val_accuracy": self.accuracy}
        return line | {f"val_{key}": value for key in ("losses", "accuracies") if (value := getattr(self, key))}


def validation_loss(
    forward: Callable[..., Tensor],
    batches: Iterator[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    interruption: Interruption,
    weights: Mapping[str, float],
    mean: Callable[[Tensor], Tensor] = lambda total: total,
) -> Validation | None:
    """Mean cross-entropy over the targets of each source, and the mean of these by weight; None if a signal came before the
    last batch.

    mean: over the processes that share the batches out; every one has the same sources.
    Call inside `evaluating`. Sums stay on the device in float64; the host waits once a source, at the end.
    """
    totals: dict[str, Tensor] = {}
    graded: set[str] = set()
    for batch in batches:
        interruption.poll()
        if interruption:
            return None
        predicted = (batch.targets != NO_TARGET).sum().double() * batch.share
        right = torch.zeros_like(predicted)
        with autocast():
            if batch.graded:
                logits = forward(batch.inputs, None, batch.cu_seqlens)
                loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=NO_TARGET)
                right = (logits.argmax(-1) == batch.targets).sum().double() * batch.share
                graded.add(batch.source)
            else:
                loss = forward(batch.inputs, batch.targets, batch.cu_seqlens)
        sums = torch.stack((loss.double() * predicted, predicted, right))
        totals[batch.source] = totals[batch.source] + sums if batch.source in totals else sums
    assert totals, "a corpus without validation text is not validated"
    read = {source: mean(total).tolist() for source, total in totals.items()}
    losses = {source: total / count for source, (total, count, _) in read.items()}
    accuracies = {source: read[source][2] / read[source][1] for source in losses if source in graded}
    whole, several = sum(weights[source] for source in losses), len(losses) > 1
    return Validation(
        loss=sum(weights[source] / whole * loss for source, loss in losses.items()),
        accuracy=sum(accuracies.values()) / len(accuracies) if accuracies else None,
        losses=losses if several else {},
        accuracies=accuracies if several else {},
    )
