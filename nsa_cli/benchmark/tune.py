"""`nsa bench --tune`: launch configurations of the Triton kernels, measured on this GPU at one shape.

Coordinate descent: one kernel after another, the others as they are, the whole forward or backward timed. A candidate that the
device cannot run, or that gives something else than the configuration in use, is refused; the fastest of the rest is kept when
it saves enough to be no accident, and does so again beside the one in use. The table is written after every kernel: an
interruption keeps what was measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_cli.benchmark import parity
from nsa_cli.benchmark.cases import Workload, make_workload
from nsa_cli.benchmark.options import BenchOptions
from nsa_cli.benchmark.timing import Clock, make_clock, measure
from nsa_cli.checkpoint import write_atomic
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.ops.dispatch import kernel_refusal, nsa_attention_and_selection, resolve_kernel
from nsa_cli.ops.triton import tuning
from nsa_cli.ops.triton.problem import LEAST_DIM
from nsa_cli.ops.triton.tuning import Tile

LEAST_GAIN, NEAR_TIES = 0.01, 1e-3
"""NEAR_TIES: share of the queries that a candidate may select other blocks for: sums in another order turn near ties."""


def _tiles(lines: str) -> tuple[Tile, ...]:
    """Each "rows,keys,warps,stages", registers and key_stages behind where they are not the usual ones."""
    return tuple(Tile(*map(int, line.split(","))) for line in lines.split())


_BY_QUERY = _tiles("128,64,4,2 128,64,4,3 128,64,8,2 128,64,8,3 128,128,8,2 64,64,4,2 64,64,4,3 64,32,4,3 64,32,8,2")
_BY_KEY = _tiles("64,64,4,2 64,64,4,3 64,64,8,2 128,64,8,2 64,128,8,2 64,32,4,2 64,32,8,2")
_PARTS = _tiles("64,64,4,1 64,64,4,1,128 64,64,4,1,168 64,64,4,2 64,64,4,2,128 64,64,4,3 64,64,8,1 64,64,8,2 128,64,8,2")
_FINISH = _tiles("64,64,4,2 64,64,4,3 64,64,4,4 64,64,4,5 64,32,4,3 64,32,4,3,168 64,32,4,4,168,3 64,64,8,4 64,32,8,2")
CANDIDATES = {
    **dict.fromkeys(("compressed", "compressed_dq"), _BY_QUERY),
    **dict.fromkeys(("compressed_dkv", "window_dkv", "forced_dkv"), _BY_KEY),
    **dict.fromkeys(("selected_parts", "selected_gradient_parts"), _PARTS),
    **dict.fromkeys(("selected_finish", "selected_gradient_finish"), _FINISH),
    "importance": _tiles("64,128,4,2 64,128,4,2,168 64,128,4,3,168 64,64,4,2 64,64,4,3 128,64,4,2 128,128,8,2 64,64,8,2"),
}
"""The parts kernels take a block's keys, whatever `keys` says."""


@dataclass(frozen=True)
class TunedKernel:
    """One kernel's outcome. way: forward or backward, all of which the seconds are. refused: candidate -> why."""

    kernel: str
    way: str
    before: Tile
    after: Tile
    before_s: float
    after_s: float
    tried: int
    refused: Mapping[str, str]

    def __str__(self) -> str:
        tiles = f"{self.before} -> {self.after}" if self.after != self.before else f"{self.before} stays"
        times = f"{self.way} {self.before_s * 1e3:.3f} -> {self.after_s * 1e3:.3f} ms"
        return f"{self.kernel}: {tiles}; {times}; {len(self.refused)} of {self.tried} refused"


@dataclass(frozen=True)
class TuneReport:
    """What was measured, for which device and sizes; path: the table with the result."""

    path: Path
    device: str
    sizes: Mapping[str, Any]
    kernels: tuple[TunedKernel, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the whole report."""
        return {**asdict(self), "path": str(self.path)}


@dataclass
class Tuner:
    """One workload on one device, and the table that its kernels have come to."""

    work: Workload
    clock: Clock
    budget_s: float
    table: dict[str, Tile]

    def __post_init__(self) -> None:
        q, k = self.work.tensors["q"], self.work.tensors["k"]
        self.dtype, self.group = q.dtype, q.shape[1] // k.shape[1]
        self.width = max(LEAST_DIM, 1 << (q.shape[3] - 1).bit_length())
        self.grad = torch.randn(q.shape, generator=torch.Generator(q.device).manual_seed(0), device=q.device).to(q.dtype)

    @cached_property
    def graph(self) -> Tensor:
        """One output, whose graph serves every backward."""
        return self.forward()[0]

    def forward(self) -> tuple[Tensor, ...]:
        """(out, block_indices)"""
        given: dict[str, Any] = dict(self.work.tensors)
        return nsa_attention_and_selection(**given, config=self.work.nsa, kernel="triton")

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients of all inputs."""
        return torch.autograd.grad(self.graph, list(self.work.tensors.values()), self.grad, retain_graph=True)

    def fault(self, results: Sequence[Tensor], expected: Sequence[Tensor], way: str) -> str:
        """What sets a run's results apart from those expected, "" if nothing."""
        tolerance = parity.RELATIVE_L2[self.dtype]
        if way == "backward":
            return parity.compare(list(zip(self.work.tensors, results, expected, strict=True)), tolerance).detail
        same = (results[1] == expected[1]).all(-1)
        if float((~same).float().mean()) > NEAR_TIES:
            return "selection: other blocks"
        rows = same.repeat_interleave(self.group, 1)[..., None]
        return parity.compare([("output", results[0] * rows, expected[0] * rows)], tolerance).detail

    def kernels(self) -> list[str]:
        """Those that have candidates, in tuning's order, of the ones that run here: some geometries, and GPUs with kernels of
        their own, leave some out."""
        with tuning.overridden(self.table), tuning.recorded() as asked:
            self.forward()
            self.backward()
        return [kernel for kernel in tuning.KERNELS if kernel in CANDIDATES and kernel in asked]

    def tune(self, kernel: str) -> TunedKernel:
        """Measure the kernel's candidates; the winner stands in `table`."""
        key = f"{tuning.table_key(kernel, width=self.width, dtype=self.dtype)}/{self.group}"
        way = "backward" if kernel.endswith(("_dq", "_dkv")) or "gradient" in kernel else "forward"
        run = self.backward if way == "backward" else torch.no_grad()(self.forward)
        with tuning.overridden(self.table):
            before = tuning.tile(kernel, width=self.width, group=self.group, dtype=self.dtype, device=self.work.device)
            expected = run()
        before_s = self._seconds(run, key, before)
        after, after_s, refused = before, before_s, dict[str, str]()
        tried = [tile for tile in candidates(kernel, self.dtype) if tile != before]
        for tile in tried:
            try:
                with tuning.overridden({**self.table, key: tile}), parity.poisoned(self.work.device):
                    fault = self.fault(run(), expected, way)
                seconds = math.inf if fault else self._seconds(run, key, tile)
            except tuning.LAUNCH_ERRORS as error:
                fault, seconds = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", math.inf
            if fault:
                refused[str(tile)] = fault
            elif seconds <= (1 - LEAST_GAIN) * before_s and seconds < after_s:
                after, after_s = tile, seconds
        if after != before:  # in turn with the one in use, whose seconds are older than all others
            before_s, after_s = (self._seconds(run, key, tile) for tile in (before, after))
            if after_s > (1 - LEAST_GAIN) * before_s:
                after, after_s = before, before_s
        self.table[key] = after
        return TunedKernel(kernel, way, before, after, before_s, after_s, len(tried), refused)

    def _seconds(self, run: Callable[[], object], key: str, tile: Tile) -> float:
        """Median of `run` with one configuration of the kernel in the table's place."""
        with tuning.overridden({**self.table, key: tile}):
            return measure(run, clock=self.clock, budget_s=self.budget_s).median_s


def candidates(kernel: str, dtype: torch.dtype) -> list[Tile]:
    """What is tried for a kernel; for float32, which takes twice the room, with one stage."""
    return list(dict.fromkeys(replace(tile, stages=1) if dtype == torch.float32 else tile for tile in CANDIDATES[kernel]))


def run_tune(
    options: BenchOptions, path: Path, device: torch.device, *, progress: Callable[[str], None] = lambda text: None
) -> TuneReport:
    """Tune every kernel at the longest of options.seq_lens; `path` gets the results beside what it holds already.

    It begins from what the file, or else the table in use, says of this device and shape. NsaError before anything is measured:
    exit code 5 where the Triton kernels cannot run, 3 for a file that is no table or has no folder to lie in.
    """
    resolve_kernel("triton", device)
    content = tuning.read_table(path) if os.path.lexists(path) else {}
    if not path.parent.is_dir():
        raise NsaError(f"{path}: no such folder", "make it first, or write elsewhere", ExitCode.BAD_INPUT)
    on_gpu, shape = device.type == "cuda", options.shape(device.type)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" or (options.dtype == "auto" and on_gpu) else torch.float32
    refusal = kernel_refusal("triton", options.nsa, dim=shape.dim_head, group=shape.heads // shape.kv_heads, dtype=dtype)
    if refusal is not None:
        raise refusal
    name, tokens = tuning.device_name(device), max(options.seq_lens)
    sizes = {**asdict(shape), "seq_len": tokens, "batch": options.batch, "dtype": str(dtype)[6:], "nsa": asdict(options.nsa)}
    progress(f"tuning kernels at {tokens:,} tokens on {name}: minutes, most of them compilation")

    def write(file: Path) -> None:
        file.write_text(tuning.table_to_json({**content, name: tuner.table}), encoding="utf-8")

    with torch.cuda.device(device) if on_gpu else nullcontext():
        work = make_workload(tokens, shape, options.batch, options.nsa, device=device, dtype=dtype, seed=options.seed)
        tuner, found = Tuner(work, make_clock(device), options.budget_s, dict(content.get(name, {}))), list[TunedKernel]()
        for kernel in tuner.kernels():
            found.append(tuner.tune(kernel))
            progress(str(found[-1]))
            write_atomic(path, write)
    return TuneReport(path, name, sizes, tuple(found))
