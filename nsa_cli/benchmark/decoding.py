"""Attention of one decoding step of one layer, dense and sparse, on a random cache: the part of decoding that grows.

On a GPU the step is captured in a CUDA graph and replayed, as `nsa sample` does: what is timed is the device's work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.benchmark import parity
from nsa_cli.benchmark.dense import backends, use_backend
from nsa_cli.benchmark.measuring import Bench, with_fault
from nsa_cli.benchmark.options import Shape
from nsa_cli.benchmark.parity import Parity
from nsa_cli.benchmark.report import Figures
from nsa_cli.benchmark.timing import measure
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.model import accounting
from nsa_cli.ops import reference
from nsa_cli.ops.decode import decode_attention

WARM_UPS = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """Random queries and keys of a step at `tokens` tokens. shape, batch: as in a Workload."""

    tokens: int
    shape: Shape
    batch: int
    nsa: NSAConfig
    kernel: str
    seed: int

    def draw(self, bench: Bench, heads: int, places: int) -> Tensor:
        """[b, heads, places, d]."""
        return torch.randn(self.batch, heads, places, self.shape.dim_head, device=bench.device).to(bench.dtype)

    def costs(self, bench: Bench, nsa: NSAConfig | None) -> tuple[int, int, int]:
        """FLOPs, bytes read and bytes of the cache of one layer."""
        shape, item = self.shape, torch.empty(0, dtype=bench.dtype).element_size()
        config = ModelConfig(
            dim=shape.dim_head, depth=1, heads=shape.heads, kv_heads=shape.kv_heads, dim_head=shape.dim_head, nsa=nsa
        )
        read = accounting.decode_read_tokens(self.tokens, nsa)
        flops = self.batch * 4 * shape.heads * shape.dim_head * read
        moved, held = accounting.decode_read_bytes, accounting.cache_bytes
        return flops, self.batch * moved(config, self.tokens, item), self.batch * held(config, self.tokens, item)


def measure_sparse(bench: Bench, step: Step) -> Figures:
    """`decode_attention` on a cache whose window is a ring."""
    torch.manual_seed(step.seed)
    shape, nsa, n = step.shape, step.nsa, step.tokens
    q, k, v = (step.draw(bench, heads, places) for heads, places in ((shape.heads, 1), *((shape.kv_heads, n),) * 2))
    k_cmp, v_cmp = (step.draw(bench, shape.kv_heads, nsa.num_compressed(n)) for _ in range(2))
    gates = torch.rand(*q.shape[:3], 3, device=bench.device).to(bench.dtype)
    own = nsa.branch_kv == "independent"
    rings = [step.draw(bench, shape.kv_heads, nsa.window) for _ in range(2)] if own else [None, None]
    lengths, positions = [n] * step.batch, torch.full((step.batch,), n - 1, device=bench.device)

    def run() -> tuple[Tensor, Tensor]:
        return decode_attention(
            q, k, v, k_cmp, v_cmp, gates, nsa, lengths=lengths, positions=positions, k_win=rings[0], v_win=rings[1],
            kernel=step.kernel,
        )  # fmt: skip

    with parity.poisoned(bench.device):
        out, block_indices = run()
    at = positions[:1]
    o_cmp, importance = parity.compressed_rows(q, k_cmp, v_cmp, at, n, nsa)
    o_slc = parity.selected_rows(q, k, v, at, block_indices, nsa)
    if rings[0] is None or rings[1] is None:
        o_win = parity.window_rows(q, k, v, at, nsa)
    else:
        kept = min(n, nsa.window)
        o_win = parity.dense_rows(q, rings[0][:, :, :kept], rings[1][:, :, :kept], at)
    want = reference.combine(o_cmp, o_slc, o_win, gates.float())
    check = parity.compare([("output", out, want)], parity.RELATIVE_L2[bench.dtype])
    check = with_fault(check, parity.check_selection(block_indices, importance, at, nsa, parity.NEAR_TIE[bench.dtype]))
    return _figures(bench, step, nsa, step.kernel, run, check)


def measure_dense(bench: Bench, step: Step) -> Figures:
    """PyTorch's scaled_dot_product_attention over the whole cache, a group's heads as rows; the fastest backend."""
    torch.manual_seed(step.seed)
    shape, n = step.shape, step.tokens
    q, k, v = (step.draw(bench, heads, places) for heads, places in ((shape.heads, 1), *((shape.kv_heads, n),) * 2))
    rows = q.view(step.batch, shape.kv_heads, -1, shape.dim_head)

    def run(backend: str) -> Tensor:
        with use_backend(bench.device, backend):
            return F.scaled_dot_product_attention(rows, k, v)

    best, fastest = "auto", float("inf")
    for backend in ("auto", *(backends(bench.device) if bench.device.type == "cuda" else ())):
        try:
            work = _replayed(bench, partial(run, backend))
            trial = measure(work, clock=bench.clock, budget_s=bench.budget_s / 10, max_repeats=20)
        except RuntimeError:  # no kernel of this backend for these shapes
            continue
        if trial.median_s < fastest:
            best, fastest = backend, trial.median_s
    last = torch.tensor([n - 1], device=bench.device)
    want = parity.dense_rows(q, k, v, last)
    check = parity.compare([("output", run(best).view(q.shape), want)], parity.RELATIVE_L2[bench.dtype])
    return _figures(bench, step, None, f"sdpa {best}", partial(run, best), check)


def _figures(
    bench: Bench, step: Step, nsa: NSAConfig | None, kernel: str, run: Callable[[], object], check: Parity
) -> Figures:
    flops, moved, held = step.costs(bench, nsa)
    peak = bench.peak(run)
    timing = bench.time(_replayed(bench, run)) if check.ok else None
    return bench.figures(kernel, timing, peak, flops, moved, check, cache=held)


def _replayed(bench: Bench, run: Callable[[], object]) -> Callable[[], object]:
    """`run`, on a GPU as a captured graph."""
    if bench.device.type != "cuda":
        return run
    stream = torch.cuda.Stream(bench.device)
    stream.wait_stream(torch.cuda.current_stream(bench.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(bench.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
