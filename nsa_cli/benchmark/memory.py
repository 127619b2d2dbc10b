"""How much memory one run needs above what was there before it.

CUDA: the allocator's own peak. CPU: the process's peak resident size, which the kernel keeps (VmHWM) and which is
reset before the run; where it cannot be reset, a thread samples the resident size. What earlier runs have freed is
handed back to the system first, or the run would reuse it and look too small.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS, STATUS, STATM = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/self/statm")
SAMPLE_S = 0.002


def peak_bytes(work: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """Run `work` once: (peak bytes above those in use before it, how that was measured). Its result counts."""
    gc.collect(1)  # a whole collection walks all of torch's objects, a quarter of a second each time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated above the inputs"
    _trim()
    if _reset_peak():
        before = _status_bytes("VmRSS")
        work()
        peak = max(0, _status_bytes("VmHWM") - before)
        return peak, "peak resident size (VmHWM, reset before the run) above the inputs"
    if STATM.exists():
        return _sampled(work), f"resident size sampled every {SAMPLE_S * 1e3:g} ms, above the inputs"
    import resource  # not on every system, and needed where there is no /proc only

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    return growth * 1024, "growth of ru_maxrss: a lower bound"


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: freed memory may stay, and the figure is a lower bound
        return


def _reset_peak() -> bool:
    try:
        CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident size to the present one
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def _sampled(work: Callable[[], Any]) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    before = peak = _resident_pages()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, _resident_pages())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        kept = work()
        peak = max(peak, _resident_pages())
        del kept
    finally:
        done.set()
        watcher.join()
    return (peak - before) * page


def _resident_pages() -> int:
    return int(STATM.read_text().split()[1])
