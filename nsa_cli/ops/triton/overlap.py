"""Programmatic dependent launch (Hopper and later): a kernel is launched while the one before still runs.

Such a kernel is launched with `overlap(device)`, and each of its programs calls `follow` once: before it writes anything, since
the kernel before may still read what that memory held, and before it reads what the kernel before wrote. Since no kernel lets the
next be launched before it has waited for the last, whatever was launched before that last one is complete, and may be read from
the start, if the kernel before is one of ours, or an ordinary one. Behind a library's, which may overlap in its own way, `follow`
comes first.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Wait for the kernel before, with all that it waited for; let the next one be launched."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch takes besides: OVERLAP for the kernel, launch_pdl for Triton."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
