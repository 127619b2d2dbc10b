"""A disk that is full, a folder that may not be written, memory that runs out: one line, and the last checkpoint whole."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli import checkpoint
from nsa_cli.checkpoint import load_state, read_info
from nsa_cli.cli.app import run as nsa
from nsa_cli.data import Corpus
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training import prepare
from tests.command_line import text
from tests.test_resume import assert_same_run, ckpt
from tests.training_runs import CONTEXT, Told, hook_losses, run, text_corpus

SETTINGS = {"steps": 9, "save_every": 3, "eval_every": 3, "keep": 2}
SMALL = "--dim 16 --depth 1 --heads 2 --kv-heads 1 --seq-len 16 --batch-tokens 32 --device cpu"


def fail_from(step: int, begin: Callable[[], None]) -> Told:
    return Told(lambda line: begin() if line["step"] == step else None)


def failed_run(folder: Path, corpus: Corpus, reporter: Told) -> NsaError:
    """The error of a run that has saved step 3 and cannot save step 6, of which nothing may be left."""
    with pytest.raises(NsaError) as caught:
        run(folder, corpus, config=SETTINGS, reporter=reporter)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "nothing half-written is left"
    return caught.value


def goes_on(folder: Path, corpus: Corpus) -> None:
    run(folder, corpus, "whole", config=SETTINGS)
    run(folder, corpus, config=SETTINGS, resume=ckpt(folder))
    assert_same_run(folder, "ckpt", "whole")
    kept = [sorted(path.name.removeprefix(f"{name}.") for path in folder.glob(f"{name}.step-*")) for name in ("ckpt", "whole")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("call", ["save_file", "_sync"])
@pytest.mark.parametrize(
    ("written", "names"), [(0, "ckpt.state"), (1, "ckpt"), (2, "ckpt.best")], ids=["state", "weights", "best"]
)
def test_a_disk_that_fills_up_in_a_save_ends_the_run_with_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, written: int, names: str
) -> None:
    corpus, real = text_corpus(tmp_path), getattr(checkpoint, call)
    left = [written]

    def full(*arguments: Any) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(*arguments)

    with monkeypatch.context() as patch:
        # A folder is synced too, after each file.
        if call == "_sync":
            patch.setattr(checkpoint, "_sync_folder", lambda folder: None)
        error = failed_run(tmp_path, corpus, fail_from(6, lambda: patch.setattr(checkpoint, call, full)))
    assert error.message == f"cannot write {ckpt(tmp_path, names)}: No space left on device"
    assert error.hint == "free some space on that disk, or choose another --out"
    state = load_state(ckpt(tmp_path, "ckpt.state"))[1]["step"]
    assert (state, read_info(ckpt(tmp_path)).step) == [(3, 3), (6, 3), (6, 6)][written]
    assert read_info(ckpt(tmp_path, "ckpt.best")).step == 3
    assert read_info(ckpt(tmp_path, "ckpt.step-00000003")).step == 3
    goes_on(tmp_path, corpus)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_the_system_lets_grow_no_further_ends_the_run_with_the_last_one_whole(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    limits = largest_file(100_000)  # room for the metrics, and not for the state
    try:
        error = failed_run(tmp_path, corpus, fail_from(6, limits.__enter__))
    finally:
        limits.__exit__(None, None, None)
    assert error.message == f"cannot write {ckpt(tmp_path, 'ckpt.state')}: File too large"
    assert read_info(ckpt(tmp_path)).step == load_state(ckpt(tmp_path, "ckpt.state"))[1]["step"] == 3
    goes_on(tmp_path, corpus)


def test_metrics_that_find_no_room_end_the_run_with_the_last_save_whole(tmp_path: Path) -> None:
    corpus, metrics = text_corpus(tmp_path), tmp_path / "ckpt.metrics.jsonl"
    limits = largest_file(0)
    try:
        error = failed_run(tmp_path, corpus, fail_from(5, limits.__enter__))
    finally:
        limits.__exit__(None, None, None)
    assert error.message == f"{metrics}: File too large"
    assert "make room" in error.hint
    goes_on(tmp_path, corpus)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_at_the_first_line_is_one_line_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text(2000))
    Path("ckpt.metrics.jsonl").symlink_to("/dev/full")
    assert nsa(f"train data.txt {SMALL} --steps 1 -q".split()) == ExitCode.FAILURE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "nsa: error: ckpt.metrics.jsonl: No space left on device",
        "hint: choose another --out, or make room",
    ]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text(2000))

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "open", refuse)
        assert nsa(f"train data.txt {SMALL} --out runs/a.safetensors -q".split()) == ExitCode.FAILURE
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"nsa: error: cannot write runs/a.state.safetensors: {os.strerror(number)}"
    assert hint.endswith("choose another --out")
    assert list(Path("runs").iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text(2000))
    assert nsa(f"train data.txt {SMALL} --out data.txt/a.safetensors -q".split()) == ExitCode.FAILURE
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("nsa: error: data.txt/a.safetensors: ")
    assert hint == "hint: choose another --out, or make room"


def test_memory_that_runs_out_keeps_the_last_save_and_smaller_parts_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = text_corpus(tmp_path)

    def change(call: int, training: bool, loss: Tensor) -> None:
        if training and call == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with monkeypatch.context() as patch:
        hook_losses(patch, change)
        error = failed_run(tmp_path, corpus, Told())
    assert error.hint == f"try --micro-batch-tokens {2 * CONTEXT}"
    assert read_info(ckpt(tmp_path)).step == 3
    settings = {**SETTINGS, "micro_batch_tokens": 2 * CONTEXT}
    assert run(tmp_path, corpus, config=settings, resume=ckpt(tmp_path)).status == "finished"


def test_a_model_too_large_for_the_memory_is_one_line_that_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text(2000))

    def too_large(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")

    monkeypatch.setattr(prepare, "build_model", too_large)
    assert nsa(f"train data.txt {SMALL} -q".split()) == ExitCode.FAILURE
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("nsa: error: out of memory: ")
    assert "--dim" in hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt"]
