"""What the launches ask of a GPU."""

from __future__ import annotations

from functools import cache

import torch
import triton


@cache
def cores(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def has_tiles(device: torch.device) -> bool:
    """Whether the kernels named `*_tiles` run: on Hopper, with a Triton that has their language (`hopper`)."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
