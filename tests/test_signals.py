"""SIGINT and SIGTERM stop a run with its state saved; a second one stops it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nsa_cli.checkpoint import read_info
from nsa_cli.cli import app, output
from nsa_cli.errors import NsaError
from nsa_cli.training import saving
from nsa_cli.training.signals import Interruption, catch_signals
from tests.command_line import NSA, environment, text
from tests.training_runs import CONTEXT, curve, hook_losses, run, same_tensors, steps, text_corpus, weights

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


@BOTH_SIGNALS
def test_a_compiler_that_the_signal_killed_is_an_interruption_and_no_defect(signum: signal.Signals) -> None:
    def fail(error: Exception, signalled: bool = True) -> None:
        with catch_signals():
            if signalled:
                os.kill(os.getpid(), signum)
            raise error

    triton = RuntimeError(f"PTXAS error: `ptxas` failed with error code -{int(signum)}\n`ptxas` stderr:")
    torchs = RuntimeError("C++ compile error")
    torchs.__cause__ = subprocess.CalledProcessError(-signum, ["cc"])
    for error in (triton, torchs):
        with pytest.raises(NsaError, match=f"{signum.name} while a kernel was compiled") as raised:
            fail(error)
        assert raised.value.exit_code == 128 + signum
        with pytest.raises(type(error)):
            fail(error, signalled=False)
    for code in ("1", f"-{int(signum)}0"):
        with pytest.raises(RuntimeError, match=f"error code {code}"):
            fail(RuntimeError(f"`ptxas` failed with error code {code}"))


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
def test_signals_that_come_together_count_once(signum: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    echoes = []

    def sleep(seconds: float) -> None:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGINT)
        echoes.append(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    with catch_signals() as interruption:
        os.kill(os.getpid(), signum)
        assert interruption.signum == signum
    assert len(echoes) == 1


def test_a_signal_between_micro_batches_leaves_the_step_to_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, model = text_corpus(tmp_path), {"dropout": 0.1}
    settings = {"micro_batch_tokens": CONTEXT, "steps": 6, "eval_every": 0}
    run(tmp_path, corpus, "whole", model=model, config=settings)

    def change(call: int, training: bool, loss: Tensor) -> None:
        if call == 3 * 4 + 2:  # the second of the fourth step's four
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        hook_losses(patch, change)
        result = run(tmp_path, corpus, model=model, config=settings)
    assert (result.status, result.step, result.signal) == ("interrupted", 3, signal.SIGTERM)
    run(tmp_path, corpus, model=model, config=settings, resume=tmp_path / "ckpt.safetensors")
    assert curve(tmp_path) == curve(tmp_path, "whole")
    assert same_tensors(weights(tmp_path, "ckpt.state"), weights(tmp_path, "whole.state"))


def test_a_signal_during_a_save_lets_it_finish_and_then_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, written = text_corpus(tmp_path), []
    save_checkpoint = saving.save_checkpoint

    def interrupted(path: Path, *arguments: Any, **options: Any) -> None:
        if not written:
            os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, *arguments, **options)
        written.append(path.name)

    monkeypatch.setattr(saving, "save_checkpoint", interrupted)
    result = run(tmp_path, corpus, config={"eval_every": 4, "save_every": 4})
    assert (result.status, result.step, result.signal) == ("interrupted", 4, signal.SIGTERM)
    assert written == ["ckpt.safetensors", "ckpt.best.safetensors"], "both, and each once"
    assert {read_info(tmp_path / name).step for name in written} == {4}


def test_the_command_stopped_as_timeout_stops_it_saves_and_ends_with_143(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(text())
    line = "train data.txt --sparse --dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --steps 1000000 --log-every 1"
    process = subprocess.Popen(
        [*NSA, *line.split(), "--json"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(4):
        last = process.stdout.readline()
    for _ in range(2):  # timeout's: to the process, then to its group
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    lines = [json.loads(line) for line in (last + out).splitlines()]
    assert lines[-1] == {"checkpoint": "ckpt.safetensors"}
    assert b"nsa: SIGTERM: saving at step" in err
    assert read_info(tmp_path / "ckpt.safetensors").step == lines[-2]["step"] >= 3


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


@BOTH_SIGNALS
def test_an_interrupted_bench_shows_what_it_has_measured(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def tell(status: output.Status, words: str) -> None:
        told.append(words)
        if len(told) == 3:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(output.Status, "__call__", tell)
    line = "bench --seq-len 64 --seq-len 4096 --no-ladder --json --heads 2 --kv-heads 1 --dim-head 8 --budget 0.01 --device cpu"
    assert app.run(line.split()) == 128 + signum
    report = json.loads(capfd.readouterr().out)
    assert [row["case"] for row in report["rows"]] == ["forward"]
    assert report["notices"][-1].startswith("interrupted")
