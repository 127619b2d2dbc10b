"""SIGINT and SIGTERM as a flag that the training loop polls, so that an interrupted run ends with its state saved."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nsa_cli.errors import NsaError

CAUGHT = (signal.SIGINT, signal.SIGTERM)

SAME_S = 0.25
"""Signals so close together are one: `timeout` sends its own to the process and to its group, a launcher may pass on a
Ctrl-C that the terminal has already sent to everybody."""


class Interruption:
    """`signum` is None until a signal came, then its number; true in a boolean context from then on."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def poll(self) -> None:
        """Called after each step and before each batch of a validation: where several processes agree. One has the flag."""

    @property
    def name(self) -> str:
        """The signal's name, "" before one came."""
        return "" if self.signum is None else signal.Signals(self.signum).name


@contextmanager
def catch_signals() -> Iterator[Interruption]:
    """Turns the first SIGINT or SIGTERM into a flag; a second one, SAME_S later or more, ends the process at once.

    After the first signal the system's default action is put back for both, so that the second kills the process (the
    shell sees 130 or 143) even while it is deep in a computation that does not return to Python. The handlers found on
    entry are put back on exit. Outside the main thread, where Python allows no handlers, the flag is never set.

    A compiler that the same signal killed makes an error of Triton's or torch's: it leaves as an NsaError with the signal's exit
    code. Nothing is saved then, and nothing was lost but what came after the last save.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def remember(signum: int, frame: FrameType | None) -> None:
        if interruption:
            return
        interruption.signum = signum
        time.sleep(SAME_S)  # its echoes come here, while this handler is still in place
        for each in CAUGHT:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, remember) for each in CAUGHT}
    try:
        yield interruption
    except Exception as error:
        if interruption.signum is not None and _killed(error, interruption.signum):
            raise NsaError(f"{interruption.name} while a kernel was compiled", "", 128 + interruption.signum) from error
        raise
    finally:
        for each, handler in before.items():
            # None: a handler that was not installed from Python and cannot be put back by it.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


def _killed(error: BaseException | None, signum: int) -> bool:
    """Whether a child process ended by the signal is why: torch wraps the error, Triton tells the return code in words."""
    while error is not None:
        if getattr(error, "returncode", None) == -signum or re.search(rf"failed with error code -{signum}\b", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
