"""From the corpus to the device: a step's batch cut into micro-batches, and the fixed batches of a validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import (
    NO_TARGET,
    Corpus,
    Source,
    Windows,
    join_windows,
    step_draws,
    training_batch,
    validation_windows,
    window_starts,
)
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


class Batch(NamedTuple):
    """A micro-batch on the device.

    inputs, targets: int64 [b, t], or [1, b * t] where documents meet inside windows; targets are NO_TARGET where nothing is
    to be predicted. share: of the step, by targets. cu_seqlens: int32 [documents + 1], where the documents begin, or None.
    source, graded: the windows'.
    """

    inputs: Tensor
    targets: Tensor
    share: float
    cu_seqlens: Tensor | None = None
    source: str = ""
    graded: bool = False


def refuse_packing(corpus: Corpus, config: TrainConfig) -> None:
    """NsaError with exit 2 where documents are packed and shapes may not change from step to step."""
    if isinstance(corpus.training, np.ndarray) or not corpus.training.packed:
        return
    for flag, on in (("--cuda-graph", config.cuda_graph), ("--compile", config.compile)):
        if on:
            message = f"{flag} needs the same shapes at every step, and packed documents have another number each time"
            raise NsaError(message, f"add --no-pack, or leave out {flag}", ExitCode.USAGE)


def training_batches(
    source: npt.NDArray[Any] | Source,
    plan: BatchPlan,
    *,
    seed: int,
    step: int,
    context: int,
    device: torch.device,
    replica: int = 0,
    replicas: int = 1,
) -> Iterator[Batch]:
    """A replica's micro-batches of one step. An array is one document.

    The shares of all replicas add up to 1: the sum of share * mean loss is the mean over the step's targets, and so are its
    gradients.
    """
    windows = _step_windows(source, plan, seed=seed, step=step, context=context)
    counts = np.count_nonzero(windows.targets != NO_TARGET, axis=1)
    total = int(counts.sum())
    for part, counted in plan.parts(replica, replicas):
        yield _to_batch(windows, part, int(counts[part].sum()) / total if counted else 0.0, device)


def window_places(
    source: npt.NDArray[Any] | Source, plan: BatchPlan, *, seed: int, step: int, context: int
) -> list[int | str]:
    """Where each window of a step comes from: its first token's place among the training tokens; of a mixture after the
    part's name, and for a task the draw that makes it."""
    draws = step_draws(seed=seed, step=step, count=plan.windows)
    if isinstance(source, np.ndarray):
        return window_starts(draws, len(source), context).tolist()
    return source.places(draws, context=context)


def validation_batches(
    source: npt.NDArray[Any] | Source,
    plan: BatchPlan,
    *,
    context: int,
    max_tokens: int,
    device: torch.device,
    replica: int = 0,
    replicas: int = 1,
) -> Iterator[Batch]:
    """A replica's share of the fixed validation windows, at most a micro-batch's number at once and of one source; each batch
    a share of 1, or of 0 where a replica only keeps the others company."""
    singles: Iterator[Windows]
    if isinstance(source, np.ndarray):
        pairs = validation_windows(source, context=context, max_tokens=max_tokens)
        singles = (Windows(inputs[None], targets[None]) for inputs, targets in pairs)
    else:
        singles = source.fixed_windows(context=context, max_tokens=max_tokens)
    for _, same in groupby(singles, key=lambda window: window.source):
        while group := list(islice(same, plan.micro * replicas)):
            own = group[replica::replicas]
            yield _to_batch(join_windows(own or group[:1]), slice(None), 1.0 if own else 0.0, device)


def _step_windows(source: npt.NDArray[Any] | Source, plan: BatchPlan, *, seed: int, step: int, context: int) -> Windows:
    if isinstance(source, np.ndarray):
        return Windows(*training_batch(source, seed=seed, step=step, batch=plan.windows, context=context))
    return source.windows(step_draws(seed=seed, step=step, count=plan.windows), context=context)


def _to_batch(windows: Windows, part: slice, share: float, device: torch.device) -> Batch:
    """Rows as they are, unless a document begins inside one: then all are packed into one row of documents."""
    inputs, targets = windows.inputs[part], windows.targets[part]
    begins = None if windows.begins is None else windows.begins[part]
    if begins is None or not begins[:, 1:].any():
        return Batch(to_device(inputs, device), to_device(targets, device), share, None, windows.source, windows.graded)
    cu_seqlens = np.append(np.flatnonzero(begins), begins.size).astype(np.int32)
    x, y = to_device(inputs.reshape(1, -1), device), to_device(targets.reshape(1, -1), device)
    return Batch(x, y, share, to_device(cu_seqlens, device), windows.source, windows.graded)
