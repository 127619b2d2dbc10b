"""The one error a user sees, and the exit codes it may carry.

Standard library only: every room of the house may import this one.
"""

from __future__ import annotations

import os
from enum import IntEnum


class ExitCode(IntEnum):
    """What `nsa` tells the shell. 0 is success; Typer itself uses 2 for usage errors."""

    FAILURE = 1
    USAGE = 2
    BAD_INPUT = 3
    DIVERGED = 4
    UNAVAILABLE = 5
    GATE_FAILED = 6
    INTERRUPTED = 130
    TERMINATED = 143
    CLOSED_PIPE = 141


class NsaError(Exception):
    """A failure that the user can act on.

    message: what went wrong, naming the file, flag or value.
    hint: what to do about it, one line; empty if nothing helps.
    exit_code: the process's exit status, one of `ExitCode`.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = ExitCode.FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = int(exit_code)


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator's error it is: PyTorch's on a CPU raises a plain RuntimeError. By name, so that a command which
    never loaded torch need not load it to report its error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def tells_errors() -> bool:
    """Whether this process tells what all that torchrun started find by themselves: RANK is 0, or not set."""
    return os.environ.get("RANK", "") in ("", "0")
