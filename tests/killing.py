"""Training runs that are killed: a process that has loaded torch once and forks a life of the run for every line it reads.

`python -m tests.killing`: a line of stdin names a folder; the life's process id comes out, and when it is over its wait
status. The run saves at every step and goes on from its state where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nsa_cli.training import RunPaths
from tests.command_line import ROOT, environment
from tests.training_runs import run, text_corpus

STEPS = 14
KEPT = 3
SETTINGS: dict[str, Any] = {"steps": STEPS, "save_every": 1, "eval_every": 3, "warmup": 5, "keep": KEPT}


def live(folder: Path) -> None:
    """The run in `folder`, from its beginning or from its state, to its end."""
    paths = RunPaths.beside(folder / "ckpt.safetensors")
    resume = paths.last if paths.state.exists() else None
    run(folder, text_corpus(folder), sparse=True, model={"dim": 16, "depth": 1, "dropout": 0.1}, config=SETTINGS, resume=resume)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(Path(line.rstrip("\n")))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


class Lives:
    """The forking process, from outside."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def _ask(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())

    def begin(self, folder: Path) -> int:
        """Process id of a new life of the run in `folder`."""
        assert self.server.stdin is not None
        self.server.stdin.write(f"{folder}\n")
        self.server.stdin.flush()
        return self._ask()

    def end(self) -> int:
        """Exit code of the life, once it is over; negative for a signal."""
        return os.waitstatus_to_exitcode(self._ask())

    def kill(self, child: int) -> int:
        with suppress(ProcessLookupError):
            os.kill(child, 9)
        return self.end()


@contextmanager
def lives() -> Iterator[Lives]:
    """A forking process for the time of the block."""
    command = [sys.executable, "-m", "tests.killing"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as server:
        try:
            yield Lives(server)
        finally:
            assert server.stdin is not None
            server.stdin.close()


def leftovers(folder: Path) -> set[str]:
    """Half-written files that a killed process left."""
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


def wait_for_lines(folder: Path, lines: int) -> None:
    """Returns when the metrics have so many lines, or after a minute."""
    path = folder / "ckpt.metrics.jsonl"
    _wait(lambda: lines == 0 or (path.exists() and path.read_bytes().count(b"\n") >= lines), 60.0)


def wait_for_a_save(folder: Path) -> None:
    """Returns when another file than those left over is being written, or after half a second."""
    before = leftovers(folder)
    _wait(lambda: not leftovers(folder) <= before, 0.5)


def _wait(reached: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not reached() and time.monotonic() < end:
        time.sleep(0.0005)


if __name__ == "__main__":
    serve()
