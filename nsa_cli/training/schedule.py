"""The learning rate as a pure function of the step: what a resumed run needs to continue exactly.

Steps count from 1, as in the metrics: step s is the s-th optimizer update. Standard library only.
"""

from __future__ import annotations

import math

from nsa_cli.config import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    """Steps of linear warm-up: `warmup`, but at most half of the steps of a schedule that decays.

    The cap lets a short trial run (`--steps 20`) reach its peak and decay as a long one does. `constant` has no end to
    keep room for, so its warm-up is never shortened and its rates do not depend on `steps`.
    """
    return config.warmup if config.schedule == "constant" else min(config.warmup, config.steps // 2)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of update `step`, 1 <= step <= steps.

    With W = warmup_steps, S = steps, m = min_lr_ratio * lr and p the progress of the decay, 0 < p <= 1:

        step <= W    lr * step / W
        cosine       m + (lr - m) * (1 + cos(pi p)) / 2      p = (step - W) / (S - W)
        linear       m + (lr - m) * (1 - p)                  p = (step - W) / (S - W)
        wsd          lr, then m + (lr - m) * (1 - p) over the last D steps, D = max(1, round(decay_ratio * S)) but at
                     most S - W                              p = (step - S + D) / D
        constant     lr

    Every decay ends at step S with exactly m. Later steps, which no run takes, stay at m.
    """
    assert step >= 1, step
    peak, floor = config.lr, config.min_lr_ratio * config.lr
    warmup = warmup_steps(config)
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    if step >= config.steps:
        return floor
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, config.steps - max(1, round(config.decay_ratio * config.steps)))
        if step <= start:
            return peak
    progress = (step - start) / (config.steps - start)
    kept = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return floor + (peak - floor) * kept
