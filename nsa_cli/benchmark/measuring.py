"""One operator, measured: its first run under poison gives the memory and the parity, and only a green one is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_cli.benchmark import parity
from nsa_cli.benchmark.cases import Operator
from nsa_cli.benchmark.machine import Ceilings
from nsa_cli.benchmark.memory import peak_bytes
from nsa_cli.benchmark.parity import Parity
from nsa_cli.benchmark.report import Figures
from nsa_cli.benchmark.timing import Clock, Deadline, Timing, measure


@dataclass
class Bench:
    """What every measurement of one report shares. memory_method is known after the first one."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    ceilings: Ceilings
    deadline: Deadline
    budget_s: float
    memory_method: str = ""

    def peak(self, work: Callable[[], Any]) -> int:
        """Run once; peak bytes above those in use before."""
        peak, self.memory_method = peak_bytes(work, self.device)
        return peak

    def peak_and_seconds(self, work: Callable[[], Any]) -> tuple[int, list[float]]:
        """Run once; peak bytes, and its seconds if it was so long that warming up makes no difference, else none: on a GPU, where
        the first run compiles kernels, always none."""
        seconds: list[float] = []
        peak = self.peak(lambda: seconds.extend(self.clock.seconds(work)))
        return peak, [value for value in seconds if value > self.budget_s and self.device.type == "cpu"]

    def time(self, work: Callable[[], Any], setup: Callable[[], Any] | None = None, before: Sequence[float] = ()) -> Timing:
        """Adaptive repeats within the budget and the report's time limit."""
        return measure(
            work,
            clock=self.clock,
            budget_s=self.budget_s,
            setup=setup,
            before=before,
            remaining_s=self.deadline.remaining_s,
        )

    def figures(
        self,
        kernel: str,
        timing: Timing | None,
        peak: int | None,
        flops: int,
        moved: int,
        check: Parity | None,
        cache: int | None = None,
    ) -> Figures:
        """A row's side, with its share of the roofline."""
        share = None if timing is None else self.ceilings.share(flops, moved, timing.median_s)
        return Figures(
            kernel=kernel, timing=timing, peak_bytes=peak, flops=flops, moved_bytes=moved, roofline=share, parity=check,
            cache_bytes=cache,
        )  # fmt: skip


def check_forward(bench: Bench, operator: Operator, queries: Tensor) -> tuple[Parity, int]:
    """One forward under poison: how it compares with the definition, and its peak bytes."""
    inputs = list(operator.inputs.values())
    outs: list[Tensor] = []
    with torch.no_grad():
        with parity.poisoned(bench.device):
            peak = bench.peak(lambda: outs.append(operator.run(*inputs)))
        out = outs.pop()
        named = [("output", out[:, :, queries], operator.rows(*inputs))]
        return parity.compare(named, parity.RELATIVE_L2[out.dtype]), peak


def measure_forward(bench: Bench, operator: Operator, queries: Tensor, fault: str = "") -> Figures:
    """Forward without gradients. fault: a defect already known (of the selection); it makes the parity red."""
    inputs = list(operator.inputs.values())
    check, peak = check_forward(bench, operator, queries)
    check = with_fault(check, fault)
    with torch.no_grad():
        timing = bench.time(lambda: operator.run(*inputs)) if check.ok else None
    moved = operator.moved_bytes(backward=False)
    return bench.figures(operator.kernel, timing, peak, operator.flops, moved, check)


def measure_backward(bench: Bench, operator: Operator, queries: Tensor, fault: str = "") -> Figures:
    """Backward alone, over one forward's graph; the peak is that of forward and backward together.

    For the parity the output's gradient is zero but for the sampled queries; it is random everywhere when timed. One
    graph serves all runs, but for `flex`: a compiled backward gives its buffers away and runs once.
    """
    inputs = list(operator.inputs.values())
    grad = torch.randn(inputs[0].shape, device=bench.device).to(inputs[0].dtype)
    sampled = torch.zeros_like(grad)
    sampled[:, :, queries] = grad[:, :, queries]
    reusable = operator.kernel != "flex"
    graph: list[Tensor] = []
    results: list[tuple[Tensor, ...]] = []

    def forward() -> None:
        graph[:] = [operator.run(*inputs)]

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph[0], inputs, grad, retain_graph=reusable)

    def first() -> None:
        forward()
        results.append(backward(sampled))

    with parity.poisoned(bench.device):
        peak = bench.peak(first)
    expected = parity.reference_gradients(operator.rows, inputs, grad[:, :, queries])
    names = [f"gradient of {name}" for name in operator.inputs]
    check = parity.compare(list(zip(names, results.pop(), expected, strict=True)), parity.RELATIVE_L2[grad.dtype])
    check = with_fault(check, fault)
    del expected
    timing = bench.time(lambda: backward(grad), setup=None if reusable else forward) if check.ok else None
    moved = operator.moved_bytes(backward=True)
    return bench.figures(operator.kernel, timing, peak, operator.backward_flops, moved, check)


def with_fault(check: Parity, fault: str) -> Parity:
    """The same errors, red for another reason as well."""
    if not fault:
        return check
    red = Parity(max_error=0.0, relative_l2=0.0, tolerance=check.tolerance, ok=False, detail=fault)
    return check.worse(red)
