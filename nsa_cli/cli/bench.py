"""`nsa bench`: sparse beside dense attention, timed on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from nsa_cli.cli import options
from nsa_cli.cli.resolve import Resolved, load
from nsa_cli.config import NSAConfig
from nsa_cli.errors import ExitCode, NsaError

if TYPE_CHECKING:
    from nsa_cli.benchmark import BenchOptions

_NAMES = {
    "seq_lens": "seq_len",
    "model_dim": "dim",
    "model_depth": "depth",
    "groups": "group",
    "limit_s": "limit",
    "budget_s": "budget",
}
"""Options that the benchmark calls otherwise."""


def bench(
    ctx: typer.Context,
    seq_len: options.SeqLens = [16384],  # noqa: B006
    ladder: options.Ladder = None,
    group: options.Groups = None,
    batch: options.Batch = 1,
    heads: options.BenchHeads = None,
    kv_heads: options.BenchKvHeads = None,
    dim_head: options.BenchDimHead = None,
    dim: options.BenchDim = None,
    depth: options.BenchDepth = None,
    limit: options.Limit = 120.0,
    budget: options.Budget = 1.0,
    compare: options.Compare = None,
    tolerance: options.Tolerance = 0.1,
    tune: options.Tune = None,
    compress_block: options.CompressBlock = None,
    compress_stride: options.CompressStride = None,
    select_block: options.SelectBlock = None,
    num_selected: options.NumSelected = None,
    num_init: options.NumInit = None,
    num_local: options.NumLocal = None,
    window: options.Window = None,
    compress: options.Compress = None,
    branch_kv: options.BranchKv = None,
    compress_rope: options.CompressRopeName = None,
    json: options.Json = False,
    csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kernel: options.KernelName = "auto",
    seed: options.Seed = 1337,
    config: options.Config = None,
) -> int:
    """Time Native Sparse Attention beside dense attention in one process.

    Attention forward and backward, each branch, a training step, prefill and decode: median and p10/p90, speed-up,
    peak memory, share of the roofline, error against the float32 reference, and the length from which sparse wins. The
    geometry is the paper's (base's) where no flag says otherwise. A failed gate ends with exit code 6. Ctrl-C shows what
    has been measured, a second one leaves at once.

    With --tune: the Triton kernels' tiles, warps, stages and registers, a kernel after another, at the longest --seq-len. What
    is fastest goes into the table, beside what it holds; NSA_KERNEL_TABLE=TABLE.json uses it.
    """
    return run(load(ctx))


def run(settings: Resolved) -> int:
    """Measure and show; 0, 6 when a gate failed, or 130 and 143 where a signal ended it early, with what there was."""
    if settings["json"] and settings["csv"]:
        raise NsaError("--json and --csv exclude each other", "choose one", ExitCode.USAGE)
    if settings["tune"] is not None:
        return tune_kernels(settings)
    from nsa_cli.benchmark import run_bench
    from nsa_cli.cli import output
    from nsa_cli.cli.machine import find_machine
    from nsa_cli.training.signals import catch_signals

    messages = output.Messages(quiet=settings["quiet"])
    if settings["verbose"]:
        messages.list_settings(settings.report())
    machine = find_machine(settings, allow_fallback=False)
    asked = bench_options(settings)
    with catch_signals() as interruption, output.Status(messages) as status:
        report = run_bench(asked, machine.device, progress=status, should_stop=lambda: bool(interruption))
    if settings["json"]:
        output.write_json(report.to_dict(), indent=2)
    elif settings["csv"]:
        output.write_line(report.csv().removesuffix("\n"))
    else:
        output.show_bench(report)
    if interruption.signum is not None:
        return 128 + interruption.signum
    if report.ok:
        return 0
    failed = "; ".join(f"{gate.name}: {gate.detail}" for gate in report.gates if not gate.ok)
    raise NsaError(f"gate failed: {failed}", "the report above stands", ExitCode.GATE_FAILED)


def tune_kernels(settings: Resolved) -> int:
    """`nsa bench --tune`: measure launch configurations, write the table, show what changed."""
    for other in ("csv", "compare"):
        if settings[other]:
            raise NsaError(f"--tune and --{other} exclude each other", "choose one", ExitCode.USAGE)
    if settings["kernel"] not in ("auto", "triton"):
        message = f"--tune measures the Triton kernels, not --kernel {settings['kernel']}"
        raise NsaError(message, "leave --kernel out", ExitCode.USAGE)
    from nsa_cli.cli import output
    from nsa_cli.cli.machine import find_machine

    messages = output.Messages(quiet=settings["quiet"])
    if settings["verbose"]:
        messages.list_settings(settings.report())
    settings.derive("kernel", "triton", "from --tune")
    machine, asked = find_machine(settings, allow_fallback=False), bench_options(settings)
    from nsa_cli.benchmark.tune import run_tune  # only now: where there is no GPU there may be no triton

    report = run_tune(asked, settings["tune"], machine.device, progress=messages.notice)
    if settings["json"]:
        output.write_json(report.to_dict(), indent=2)
    else:
        output.show_tuning(report)
    return 0


def bench_options(settings: Resolved) -> BenchOptions:
    """The benchmark's options; NsaError names the flag of a wrong value."""
    from nsa_cli.benchmark import BenchOptions

    return settings.make(BenchOptions, _NAMES, nsa=settings.make(NSAConfig))
