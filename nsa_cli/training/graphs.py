"""Forward and backward of a micro-batch as a CUDA graph: the launches of a small model cost more than its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_cli.errors import ExitCode, NsaError

WARM_UPS = 3
"""Passes before a capture, in which libraries make their handles and kernels are compiled."""

Forward = Callable[[Tensor, Tensor], Tensor]
"""(inputs, targets) -> the loss, or the parts that it is the sum of."""
Autocast = Callable[[], AbstractContextManager[Any]]


def refuse_cuda_graph(device: torch.device, kernel: str, processes: int = 1, recompute: bool = False) -> None:
    """NsaError with exit 5 where a step cannot be captured: off a CUDA GPU, with kernels that ask the device, where
    processes exchange gradients, and where a backward computes again what it needs the random numbers of a forward for."""
    if device.type != "cuda":
        raise NsaError("--cuda-graph needs a CUDA GPU", "leave out --cuda-graph", ExitCode.UNAVAILABLE)
    if recompute:
        message = "--cuda-graph cannot capture --recompute, which sets random numbers back"
        raise NsaError(message, "leave out one of them", ExitCode.UNAVAILABLE)
    if processes > 1:
        message = f"--cuda-graph captures the step of one process, and this run has {processes}"
        raise NsaError(message, "leave out --cuda-graph", ExitCode.UNAVAILABLE)
    if kernel not in ("triton", "dense"):
        hint = "use --kernel triton, or leave out --cuda-graph"
        message = f"--cuda-graph cannot capture kernel {kernel!r}, whose launches depend on the data"
        raise NsaError(message, hint, ExitCode.UNAVAILABLE)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    share: Tensor
    loss: Tensor


class CapturedGradients:
    """Adds the gradients of share * forward(inputs, targets) to `.grad`, one captured graph for each shape of inputs.

    A replay has the same numbers as the pass it stands for, dropout's included. Gradients keep their memory from step to
    step: `begin` hands it to the parameters again, zeroed.
    """

    def __init__(self, forward: Forward, parameters: Iterable[nn.Parameter], autocast: Autocast) -> None:
        self.forward, self.autocast = forward, autocast
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.captured: dict[torch.Size, _Captured] = {}

    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        if self.gradients:
            torch._foreach_zero_(list(self.gradients.values()))
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """The loss, a scalar or the vector of its parts, that the next call overwrites."""
        captured = self.captured.get(inputs.shape)
        if captured is None:
            captured = self.captured[inputs.shape] = self._capture(inputs, targets)
        captured.inputs.copy_(inputs)
        captured.targets.copy_(targets)
        captured.share.fill_(share)
        captured.graph.replay()
        return captured.loss

    def _pass(self, inputs: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        with self.autocast():
            loss = self.forward(inputs, targets) * share
        loss.sum().backward()
        return loss.detach()

    def _capture(self, inputs: Tensor, targets: Tensor) -> _Captured:
        inputs, targets = inputs.clone(), targets.clone()
        share = torch.ones((), device=inputs.device)
        kept = {parameter: parameter.grad.clone() for parameter in self.gradients if parameter.grad is not None}
        random_state = torch.cuda.get_rng_state(inputs.device)
        stream = torch.cuda.Stream(inputs.device)
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._pass(inputs, targets, share)
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        if not self.gradients:
            self.gradients = {p: torch.zeros_like(p) for p in self.parameters if p.grad is not None}
        self.begin()
        torch.cuda.set_rng_state(random_state, inputs.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._pass(inputs, targets, share)
        for parameter, gradient in kept.items():  # of the step's micro-batches before this one
            self.gradients[parameter].copy_(gradient)
        return _Captured(graph, inputs, targets, share, loss)
