"""Programmatic dependent launch (Hopper and later): a kernel is launched while the one before still runs.

Such a kernel is launched with `overlap(device)`. Each of its programs waits once: before it writes anything, since the kernel
before may still read what that memory held, and before it reads what the kernel before wrote. Constants may be read earlier.

A kernel that calls `follow` lets the next be launched only after it has waited: whatever was launched before such a kernel is
complete when the next one begins, and may be read from the start. One that calls `release` first (`linear`, `linear_tiles`,
`residual`) gives the next more time and promises it nothing: behind it, as behind a library's kernel, which may overlap in its
own way, all but constants is read after the wait.
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
    """Wait for the kernel before; then let the next one be launched."""
    wait(OVERLAP)
    release(OVERLAP)


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch takes besides: OVERLAP for the kernel, launch_pdl for Triton."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
