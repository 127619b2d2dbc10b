"""SIGINT and SIGTERM stop a run with its state saved; a second one stops it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nsa_cli.training.signals import Interruption, catch_signals
from tests.training_runs import curve, run, same_tensors, steps, text_corpus, weights

BOTH_SIGNALS = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])

# A run long enough to be interrupted, in a process of its own; it says on stdout that it has begun.
RUN = """
import sys
from pathlib import Path
from tests.training_runs import Told, run, text_corpus

folder = Path(sys.argv[1])
told = Told(lambda line: line["step"] == 3 and print("begun", flush=True))
result = run(folder, text_corpus(folder), "ckpt", sparse=True, model={"dropout": 0.1},
             config={"steps": 100000, "schedule": "constant", "eval_every": 1000}, reporter=told)
print(result.status, result.signal, result.step, flush=True)
sys.exit(128 + result.signal)
"""


@BOTH_SIGNALS
def test_a_signal_becomes_a_flag_and_the_handlers_come_back(signum: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with catch_signals() as interruption:
        assert not interruption
        assert interruption.name == ""
        os.kill(os.getpid(), signum)
        assert interruption
        assert (interruption.signum, interruption.name) == (signum, signum.name)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_come_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), catch_signals():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with catch_signals() as interruption:
            seen.append((isinstance(interruption, Interruption), bool(interruption), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, False, before)]


@BOTH_SIGNALS
def test_a_second_signal_ends_the_process_at_once(signum: signal.Signals) -> None:
    script = """
import os, signal, sys, time
from nsa_cli.training.signals import catch_signals
with catch_signals() as interruption:
    os.kill(os.getpid(), int(sys.argv[1]))
    print("flagged", bool(interruption), flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(20)
print("not reached")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(int(signum))], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "flagged True\n"
    assert done.returncode == -signum, "killed by the signal itself: a shell sees 128 + its number"
    assert done.stderr == ""


@BOTH_SIGNALS
def test_a_run_told_to_stop_saves_its_state_and_can_be_resumed_to_the_same_bits(
    tmp_path: Path, signum: signal.Signals
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signum)
    said, _ = process.communicate(timeout=60)
    status, number, step = said.split()
    assert (status, int(number), process.returncode) == ("interrupted", signum, 128 + signum)
    assert steps(tmp_path)[-1]["step"] == int(step)

    settings = {"steps": int(step) + 3, "schedule": "constant", "eval_every": 1000}
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, sparse=True, model={"dropout": 0.1}, config=settings, resume=tmp_path / "ckpt.safetensors")
    run(tmp_path, corpus, "whole", sparse=True, model={"dropout": 0.1}, config=settings)
    assert curve(tmp_path) == curve(tmp_path, "whole")
    assert same_tensors(weights(tmp_path), weights(tmp_path, "whole"))
