from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest

from nsa_cli.errors import ExitCode
from tests.command_line import NSA, environment, nsa, shell, text, write_checkpoint


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.txt and a sparse checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("pipes")
    (folder / "data.txt").write_text(text())
    write_checkpoint(folder / "ckpt.safetensors")
    return folder


def test_a_closed_pipe_ends_quietly_with_141(here: Path) -> None:
    # More than a pipe holds, so that the writer is still at it when the reader leaves.
    endless = "yes 'the cat' | head -2000 | nsa sample ckpt.safetensors --max-tokens 1 --jsonl"
    for line in (f"{endless} | head -1; exit ${{PIPESTATUS[2]}}", "nsa train --help | head -1; exit ${PIPESTATUS[0]}"):
        result = shell(line, cwd=here)
        assert result.returncode == ExitCode.CLOSED_PIPE
        assert result.stderr == b""
        assert result.stdout.count(b"\n") == 1


def test_a_stdout_that_was_never_open_is_141_and_a_full_one_1(here: Path) -> None:
    result = shell("nsa --version >&-", cwd=here)
    assert (result.returncode, result.stderr) == (ExitCode.CLOSED_PIPE, b"")
    result = shell("nsa --version >/dev/full", cwd=here)
    assert result.returncode == ExitCode.FAILURE
    assert result.stderr.startswith(b"nsa: error: stdout: No space left on device\n")
    assert b"Traceback" not in result.stderr


def test_a_closed_or_empty_stdin_is_an_empty_prompt(here: Path) -> None:
    for line in ("nsa sample ckpt.safetensors <&-", "nsa inspect ckpt.safetensors </dev/null"):
        result = shell(line, cwd=here)
        assert (result.returncode, result.stdout) == (ExitCode.BAD_INPUT, b"")
        assert result.stderr.startswith(b"nsa: error: ")
        assert b"\nhint: " in result.stderr


def test_json_metrics_come_on_stdout_and_the_checkpoint_last_and_notices_on_stderr(here: Path) -> None:
    flags = [
        "--sparse",
        "--steps",
        "2",
        "--dim",
        "16",
        "--depth",
        "1",
        "--device",
        "cpu",
        "--kernel",
        "triton",
        "--json",
        "--out",
        "json.safetensors",
    ]
    result = nsa("train", "data.txt", *flags, cwd=here)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[-1] == {"checkpoint": "json.safetensors"}
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    recorded = (here / "json.metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in recorded] == lines[:-1]
    notices = [line for line in result.stderr.splitlines() if b"'triton'" in line]
    assert len(notices) == 1
    assert notices[0].startswith(b"nsa: kernel 'triton'")
    assert b"going on with 'torch'" in notices[0]


def test_a_pipe_stays_a_pipe_when_colour_is_forced(here: Path) -> None:
    prompt = b"the cat sat on a mat and the dog ran far " * 2
    plain = nsa("inspect", "ckpt.safetensors", stdin=prompt, cwd=here).stdout.decode()
    forced = nsa("inspect", "ckpt.safetensors", stdin=prompt, cwd=here, FORCE_COLOR="1", COLUMNS="40").stdout.decode()
    assert re.sub(r"\x1b\[[0-9;]*m", "", forced).split() == plain.split()
    assert len(forced.splitlines()) == len(plain.splitlines())
    flags = ["--steps", "2", "--dim", "16", "--depth", "1", "--out", "forced.safetensors"]
    shown = nsa("train", "data.txt", *flags, cwd=here, FORCE_COLOR="1").stderr
    assert not re.search(rb"\r|\x1b\[[0-9;?]*[^0-9;?m]", shown)


def test_a_path_that_is_no_utf8_comes_out_as_its_bytes_and_in_json_escaped(here: Path) -> None:
    flags = "--steps 1 --dim 16 --depth 1 --device cpu --overwrite --out $'d\\xff.safetensors'"
    result = shell(f"nsa train data.txt {flags}", cwd=here, PYTHONIOENCODING="utf-8:strict")
    assert (result.returncode, result.stdout) == (0, b"d\xff.safetensors\n"), result.stderr
    result = shell(f"nsa train data.txt {flags} --json", cwd=here, PYTHONIOENCODING="utf-8:strict")
    assert result.returncode == 0, result.stderr
    assert os.fsencode(json.loads(result.stdout.splitlines()[-1])["checkpoint"]) == b"d\xff.safetensors"


def test_ctrl_c_saves_the_state_and_the_run_goes_on_from_it_with_no_flag_repeated(here: Path) -> None:
    flags = [
        "--schedule",
        "constant",
        "--steps",
        "100000",
        "--dim",
        "16",
        "--depth",
        "1",
        "--heads",
        "2",
        "--out",
        "long.safetensors",
    ]
    command = [*NSA, "train", "data.txt", *flags, "--json"]
    process = subprocess.Popen(command, cwd=here, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while b'"step"' not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, err
    assert json.loads(out.splitlines()[-1]) == {"checkpoint": "long.safetensors"}
    assert b"Traceback" not in err
    step = json.loads((here / "long.metrics.jsonl").read_text().splitlines()[-1])["step"]
    result = nsa("train", "data.txt", "--resume", "long.safetensors", "--steps", str(step + 40), cwd=here)
    assert result.returncode == 0, result.stderr
    assert result.stdout == b"long.safetensors\n"
    assert b"going on from step" in result.stderr


def test_on_a_terminal_progress_is_a_bar_on_stderr_and_stdout_is_still_the_path_alone(here: Path) -> None:
    screen, side = pty.openpty()
    flags = ["--steps", "30", "--dim", "16", "--depth", "1", "--out", "bar.safetensors"]
    process = subprocess.Popen(
        [*NSA, "train", "data.txt", *flags],
        cwd=here,
        env=environment(TERM="xterm", COLUMNS="120"),
        stdin=side,
        stdout=subprocess.PIPE,
        stderr=side,
    )
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(screen, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    out, _ = process.communicate(timeout=60)
    os.close(screen)
    assert process.returncode == 0
    assert out == b"bar.safetensors\n"
    for part in (b"/30", b"loss ", b"tok/s", b"ETA"):
        assert part in shown


def test_a_continuation_comes_as_it_is_made_and_ctrl_c_ends_it_whole(here: Path) -> None:
    process = subprocess.Popen(
        [*NSA, "sample", "ckpt.safetensors", "--max-tokens", "100000", "--temperature", "9"],
        cwd=here,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"the cat\n")
    process.stdin.close()
    assert process.stdout.read(1)
    # Text that came all at once would come with the end of the process.
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == ExitCode.INTERRUPTED
    assert rest.endswith(b"\n")
