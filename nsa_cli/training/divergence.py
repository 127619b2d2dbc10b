"""Which data ended a diverged run: the windows of the first bad step, and those that fail on their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from nsa_cli.model import Transformer
from nsa_cli.training.batches import BatchPlan, training_batches, window_places
from nsa_cli.training.optim import Diverged

_NAMED = 8
"""Offsets in the message; the metrics file has all."""


def name_batch(
    error: Diverged,
    model: Transformer,
    tokens: Any,
    plan: BatchPlan,
    *,
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[Diverged, dict[str, Any]]:
    """The error with the first bad step's batch named, and the record of it for the metrics file.

    A bad step makes no update, so the model still has the weights that step met: its windows go through once more, one
    by one, without dropout. Record: event "diverged", first_step, at_step, windows (the step's, each by its first
    token's place in the training tokens), not_finite (those whose own loss or gradient is not finite; empty where only
    the whole batch's is not).
    """
    context, step = model.config.context, error.first_step
    starts = window_places(tokens, plan, seed=seed, step=step, context=context)
    device = next(model.parameters()).device
    alone = dataclasses.replace(plan, micro=1)
    batches = training_batches(tokens, alone, seed=seed, step=step, context=context, device=device)
    model.eval()
    bad = []
    for start, batch in zip(starts, batches, strict=True):
        with autocast():
            loss = model(batch.inputs, batch.targets, batch.cu_seqlens)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not math.isfinite(float(loss.detach()) + float(torch.nn.utils.get_total_norm(gradients))):
            bad.append(start)
        model.zero_grad(set_to_none=True)
    where = f"step {step} saw windows of {context} tokens at {_listed(starts)} of the training tokens"
    if 0 < len(bad) < len(starts):
        where += f", of which {_listed(bad)} fail alone"
    elif not bad:
        where += ", none of which fails alone"
    record = {"event": "diverged", "first_step": step, "at_step": error.last_step, "windows": starts, "not_finite": bad}
    return Diverged(error.first_step, error.last_step, where), record


def _listed(starts: list[int | str]) -> str:
    shown = ", ".join(str(start) for start in starts[:_NAMED])
    more = len(starts) - _NAMED
    return shown + (f" and {more} more" if more > 0 else "")
