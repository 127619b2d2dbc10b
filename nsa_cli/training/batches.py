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
    tokens: npt.NDArray[Any], plan: BatchPlan, *, seed: int, step: int, context: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The micro-batches of one step: inputs and targets int64 [b, t] on the device, and the share of the step they are.

    The shares add up to 1: the sum of share * mean loss is the mean over the step, and so are its gradients.
    """
    inputs, targets = training_batch(tokens, seed=seed, step=step, batch=plan.windows, context=context)
    x, y = to_device(inputs, device), to_device(targets, device)
    for start in range(0, plan.windows, plan.micro):
        part = slice(start, min(start + plan.micro, plan.windows))
        yield x[part], y[part], (part.stop - part.start) / plan.windows


def validation_batches(
    tokens: npt.NDArray[Any], plan: BatchPlan, *, context: int, max_tokens: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets int64 [b, t] of the fixed validation windows, b at most the micro-batch's."""
    windows = validation_windows(tokens, context=context, max_tokens=max_tokens)
    while pairs := list(islice(windows, plan.micro)):
        inputs, targets = (np.stack(side) for side in zip(*pairs, strict=True))
        yield to_device(inputs, device), to_device(targets, device)
