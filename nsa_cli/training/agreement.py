"""What several processes make of a signal, a reader that leaves, and the metrics file: one decision, one voice, one writer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_cli.training.metrics import MetricsLog
from nsa_cli.training.run import Reporter, SilentReporter
from nsa_cli.training.signals import Interruption


class AgreedInterruption(Interruption):
    """Set on all processes at the same `poll`, by a signal that any of them caught.

    A poll reads the answer to the one before, which came in meanwhile: nobody waits for it, the GPU least of all.
    """

    def __init__(self, heard: Interruption) -> None:
        super().__init__()
        self._heard = heard
        self._asked: tuple[Tensor, Any] | None = None

    def poll(self) -> None:
        """Collective: every process polls at the same places of the run."""
        if self._asked is not None:
            answer, work = self._asked
            work.wait()
            self.signum = self.signum or int(answer.item()) or None
        mine = torch.tensor([self._heard.signum or 0])
        self._asked = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True)


class Listened:
    """A Reporter that turns BrokenPipeError into an interruption, and is silent from then on."""

    def __init__(self, reporter: Reporter, heard: Interruption) -> None:
        self._reporter, self._heard = reporter, heard

    def start(self, info: dict[str, Any]) -> None:
        self._tell(lambda to: to.start(info))

    def metrics(self, line: dict[str, Any]) -> None:
        self._tell(lambda to: to.metrics(line))

    def progress(self, step: int, steps: int, line: Mapping[str, Any]) -> None:
        self._tell(lambda to: to.progress(step, steps, line))

    def notice(self, text: str) -> None:
        self._tell(lambda to: to.notice(text))

    def finish(self, summary: dict[str, Any]) -> None:
        self._tell(lambda to: to.finish(summary))

    def _tell(self, say: Callable[[Reporter], None]) -> None:
        try:
            say(self._reporter)
        except BrokenPipeError:
            self._reporter = SilentReporter()
            self._heard.signum = self._heard.signum or signal.SIGPIPE


class NoLog(MetricsLog):
    """A metrics file that another process writes."""

    def start(self, header: dict[str, Any]) -> None: ...
    def resume(self, *what: Any) -> None: ...
    def write(self, record: dict[str, Any]) -> None: ...
