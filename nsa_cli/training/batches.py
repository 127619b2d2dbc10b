"""From the corpus to the device: a step's batch cut into micro-batches, and the fixed batches of a validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import training_batch, validation_windows
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training.device import to_device


@dataclass(frozen=True)
class BatchPlan:
    """windows: sequences of one optimizer step. micro: at most so many go through the model at once."""

    windows: int
    micro: int

    def parts(self, replica: int = 0, replicas: int = 1) -> list[tuple[slice, int]]:
        """A replica's windows, a micro-batch at a time, and how many of each slice count.

        Consecutive windows, shared out evenly. Every replica has equally many micro-batches, since each may be a meeting
        of all: one that has no window left takes the first, which counts 0.
        """
        low, high = replica * self.windows // replicas, (replica + 1) * self.windows // replicas
        parts = []
        for start in range(low, low - (-self.windows // replicas), self.micro):
            counted = min(start + self.micro, high) - start
            parts.append((slice(start, start + counted), counted) if counted > 0 else (slice(0, 1), 0))
        return parts


def plan_batches(model_config: ModelConfig, config: TrainConfig) -> BatchPlan:
    """batch_tokens and micro_batch_tokens in windows of one context; NsaError with exit 2 names the flag
    that does not fit.

    The micro-batch need not divide the step: its last part is smaller and weighs less.
    """
    context, total = model_config.context, config.batch_tokens
    if total % context:
        nearest = max(1, round(total / context)) * context
        raise NsaError(
            f"--batch-tokens {total} is not a multiple of the context, {context} tokens",
            f"--batch-tokens {nearest} is the nearest that is",
            ExitCode.USAGE,
        )
    micro = total if config.micro_batch_tokens is None else config.micro_batch_tokens
    if micro < context:
        raise NsaError(
            f"--micro-batch-tokens {micro} holds no window of {context} tokens, the context",
            f"give at least --micro-batch-tokens {context}",
            ExitCode.USAGE,
        )
    return BatchPlan(windows=total // context, micro=min(micro, total) // context)


def training_batches(
    tokens: npt.NDArray[Any],
    plan: BatchPlan,
    *,
    seed: int,
    step: int,
    context: int,
    device: torch.device,
    replica: int = 0,
    replicas: int = 1,
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A replica's micro-batches of one step: inputs and targets int64 [b, t] on the device, and the share of the step
    they are.

    The shares of all replicas add up to 1: the sum of share * mean loss is the mean over the step, and so are its gradients.
    """
    inputs, targets = training_batch(tokens, seed=seed, step=step, batch=plan.windows, context=context)
    for part, counted in plan.parts(replica, replicas):
        yield to_device(inputs[part], device), to_device(targets[part], device), counted / plan.windows


def validation_batches(
    tokens: npt.NDArray[Any],
    plan: BatchPlan,
    *,
    context: int,
    max_tokens: int,
    device: torch.device,
    replica: int = 0,
    replicas: int = 1,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """A replica's share of the fixed validation windows: inputs and targets int64 [b, t], b at most the micro-batch's, and
    how many of the b count: all, or none where a replica only keeps the others company."""
    windows = validation_windows(tokens, context=context, max_tokens=max_tokens)
    while pairs := list(islice(windows, plan.micro * replicas)):
        own = pairs[replica::replicas]
        inputs, targets = (np.stack(side) for side in zip(*(own or pairs[:1]), strict=True))
        yield to_device(inputs, device), to_device(targets, device), len(own)
