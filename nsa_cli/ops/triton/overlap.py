"""Programmatic dependent launch (Hopper and later): a kernel is launched while the one before still runs.

Such a kernel begins with `follow`, before it reads or writes anything, and is launched with `overlap(device)`; or with `release`,
and with `wait` before it reads what a kernel writes, or writes anything: constants may be read between the two.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def release(OVERLAP: tl.constexpr):
    """Let the next kernel be launched."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for the kernel before, with all that it waited for."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Both: nothing to do until the kernel before is done."""
    release(OVERLAP)
    wait(OVERLAP)


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch takes besides: OVERLAP for the kernel, launch_pdl for Triton."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
