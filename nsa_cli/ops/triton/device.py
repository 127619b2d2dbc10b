"""What the launches ask of a GPU."""

from __future__ import annotations

from functools import cache

import torch
import triton

GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
"""Whether Triton has the language of the kernels named `*_tiles` (`hopper`) as they use it."""


@cache
def cores(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def has_tiles(device: torch.device) -> bool:
    """Whether the kernels named `*_tiles` run: on Hopper, with a Triton that has their language."""
    on_cuda = device.type == "cuda" and torch.version.cuda is not None
    return GLUON and on_cuda and torch.cuda.get_device_capability(device) == (9, 0)
