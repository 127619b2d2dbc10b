"""The benchmark from options to report: the kernel, the measurements, the gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from nsa_cli.benchmark.machine import environment, measure_ceilings, settled_threads
from nsa_cli.benchmark.measuring import Bench
from nsa_cli.benchmark.options import BenchOptions
from nsa_cli.benchmark.regression import check_comparable, compare_reports
from nsa_cli.benchmark.report import BenchReport, find_crossovers, load_report, parity_gate
from nsa_cli.benchmark.runner import Runner
from nsa_cli.benchmark.timing import Deadline, make_clock
from nsa_cli.ops.dispatch import kernel_refusal, resolve_kernel


def run_bench(
    options: BenchOptions,
    device: torch.device,
    *,
    progress: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> BenchReport:
    """Measure everything `options` asks for on the device; progress is told, in a few words, what runs.

    should_stop: polled between the measurements; once true, the report holds what there is, says so in a notice, and is not
    compared with an earlier one.

    Errors: NsaError with exit code 5 for a kernel that is not available, 3 for an earlier report that
    cannot be read or compared. A failed gate (parity, regression) is no error: it is in the report, whose `ok` is
    then False.
    """
    kernel, _ = resolve_kernel(options.kernel, device, allow_fallback=False)
    dtype = _dtype(options.dtype, device)
    shape = options.shape(device.type)
    group = shape.heads // shape.kv_heads
    refusal = kernel_refusal(kernel, options.nsa, dim=shape.dim_head, group=group, dtype=dtype)
    if refusal is not None:
        if options.kernel != "auto":
            raise refusal
        kernel = "torch"
    asked, dtype_name = options.to_dict(), str(dtype).removeprefix("torch.")
    model_heads = dict(zip(("model_heads", "model_kv_heads"), shape.model_heads, strict=True))
    sizes = {**dataclasses.asdict(shape), **model_heads, "batch": options.batch, "dtype": dtype_name, "nsa": asked["nsa"]}
    old = None if options.compare is None else load_report(options.compare)
    if old is not None:
        check_comparable(old, sizes, str(options.compare))
    deadline, clock = Deadline(options.limit_s, stopped=should_stop), make_clock(device)
    progress("measuring the ceilings of this machine")
    on_gpu = device.type == "cuda"
    current = torch.cuda.device(device) if on_gpu else nullcontext()
    threads = nullcontext("") if on_gpu else settled_threads()
    with current, threads as notice, torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.manual_seed(options.seed)
        ceilings = measure_ceilings(device, dtype, clock)
        bench = Bench(device, dtype, clock, ceilings, deadline, options.budget_s)
        runner = Runner(options, shape, kernel, bench, progress)
        runner.run()
        facts = environment(device)
    rows = tuple(runner.rows)
    gates, comparison = [parity_gate(rows)], tuple[dict[str, Any], ...]()
    if old is not None and not should_stop():
        comparison, gate = compare_reports(old, rows, facts, options.tolerance)
        gates.append(gate)
    return BenchReport(
        environment=facts,
        config={**asked, "kernel": kernel, "device": str(device), "shape": sizes},
        ceilings={"flops_per_s": ceilings.flops_per_s, "bytes_per_s": ceilings.bytes_per_s},
        methods={"time": clock.method, "memory": bench.memory_method},
        rows=rows,
        crossovers=find_crossovers(rows),
        gates=tuple(gates),
        notices=tuple(text for text in (notice, *runner.notices) if text),
        comparison=comparison,
        elapsed_s=deadline.elapsed_s,
    )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
