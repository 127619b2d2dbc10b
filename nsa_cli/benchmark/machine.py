"""The machine a report was made on: its name, its software, and the ceilings that it reaches in this very process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nsa_cli import __version__
from nsa_cli.benchmark.timing import Clock, Timing, measure

MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
MATMUL_S = 0.1
"""The largest product that takes about this long at most: bf16 without hardware for it is a hundred times slower."""
PROBE_STEPS = 300
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this device reaches: FLOP/s of one large square matrix product in float32 or the report's dtype, whichever is
    faster (a CPU without bf16 hardware may work in float32), bytes/s (read and written) of one large copy. From the 10th
    percentile of the times, not the median: a ceiling is a good case."""

    flops_per_s: float
    bytes_per_s: float

    def share(self, flops: float, moved_bytes: float, seconds: float) -> float:
        """Share of the roofline: the least time that either ceiling allows for the work, over the time it took."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s) / seconds


def measure_ceilings(device: torch.device, dtype: torch.dtype, clock: Clock, *, budget_s: float = 0.5) -> Ceilings:
    """Time large matrix products and a large copy on the device."""
    products = [_largest_product(device, kind, clock, budget_s) for kind in {dtype, torch.float32}]
    source = torch.ones(COPY_BYTES.get(device.type, 2**28) // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = measure(lambda: target.copy_(source), clock=clock, budget_s=budget_s, max_repeats=30)
    flops_per_s = max(2 * size**3 / product.p10_s for size, product in products)
    return Ceilings(flops_per_s=flops_per_s, bytes_per_s=2 * source.nbytes / copy.p10_s)


def probe_seconds(threads: int) -> float:
    """Seconds of many short parallel steps on this many CPU threads, the kind that a busy core makes wait."""
    torch.set_num_threads(threads)
    x, a = torch.rand(2**18), torch.rand(256, 256)
    start = time.perf_counter()
    for _ in range(PROBE_STEPS):
        torch.exp(x)
        torch.mm(a, a)
    return time.perf_counter() - start


@contextmanager
def settled_threads(probe: Callable[[int], float] = probe_seconds) -> Iterator[str]:
    """All of PyTorch's CPU threads inside, or half of them when that is faster: yields a notice then, else "".

    On a machine that is busy with something else, every parallel step waits for the thread whose core is taken, and an
    operator of many steps seems ten times slower than it is. The number before is set again at the end.
    """
    before = torch.get_num_threads()
    half, notice = before // 2, ""
    try:
        if half and probe(before) > probe(half):
            notice = f"this machine is busy: measured on {half} of {before} CPU threads, which is faster now"
        torch.set_num_threads(half if notice else before)
        yield notice
    finally:
        torch.set_num_threads(before)


def _largest_product(device: torch.device, dtype: torch.dtype, clock: Clock, budget_s: float) -> tuple[int, Timing]:
    """Size and timing of the largest square product that takes at most about MATMUL_S."""
    size = MATMUL_SIZES[0]
    for size in MATMUL_SIZES:
        a = torch.randn(size, size, device=device).to(dtype)
        multiply = partial(torch.mm, a, a, out=torch.empty_like(a))
        multiply()
        if size == MATMUL_SIZES[-1] or 8 * clock.seconds(multiply)[0] > MATMUL_S:
            break
    return size, measure(multiply, clock=clock, budget_s=budget_s, max_repeats=30)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure: versions, device, processor, threads. JSON values only."""
    facts: dict[str, Any] = {
        "nsa": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": processor_name(),
        "cpu": processor_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def processor_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
