from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli import __version__
from nsa_cli.cli.app import COMMANDS, explain, run
from nsa_cli.config import ModelConfig
from nsa_cli.errors import ExitCode, NsaError
from tests.command_line import TINY, text, write_checkpoint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data.txt, a sparse and a dense checkpoint, and a file that is neither."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("NSA_"):
            monkeypatch.delenv(name)
    Path("data.txt").write_text(text())
    write_checkpoint(tmp_path / "ckpt.safetensors")
    write_checkpoint(tmp_path / "dense.safetensors", ModelConfig(dim=16, depth=1, dim_head=4, context=32))
    Path("foreign.safetensors").write_bytes(b"not a checkpoint at all")
    Path("bad.toml").write_text("stepz = 3\n")
    Path("small.txt").write_text("tiny")
    Path("prompt.txt").write_text("the cat\n")
    with Path("prompt.txt").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield tmp_path


CASES = [
    # usage
    ("train", ExitCode.USAGE, "missing argument"),
    ("trian data.txt", ExitCode.USAGE, "did you mean|Did you mean"),
    ("train data.txt --stepz 3", ExitCode.USAGE, "--stepz .*did you mean --steps"),
    ("train data.txt --steps many", ExitCode.USAGE, "--steps: 'many' is not an integer"),
    ("train data.txt --lr fast", ExitCode.USAGE, "--lr: 'fast' is not a number"),
    ("train data.txt --schedule sine", ExitCode.USAGE, "--schedule: 'sine' is not one of"),
    ("train data.txt --out new.safetensors --steps 0", ExitCode.USAGE, "--steps 0: must be"),
    ("train data.txt --out new.safetensors --kv-heads 3", ExitCode.USAGE, "--kv-heads 3: must divide --heads"),
    ("train data.txt --out new.safetensors --window 5", ExitCode.USAGE, "--window 5 shapes sparse attention"),
    ("train data.txt", ExitCode.USAGE, "ckpt.safetensors exists"),
    ("sample ckpt.safetensors --top-p 2", ExitCode.USAGE, "--top-p 2.0: must be"),
    ("sample ckpt.safetensors --logprobs", ExitCode.USAGE, "--logprobs: needs jsonl"),
    ("sample ckpt.safetensors --whole --null", ExitCode.USAGE, "--whole and --null"),
    ("sample ckpt.safetensors --device gpu", ExitCode.USAGE, "--device gpu: no such device"),
    ("inspect ckpt.safetensors --layer 9", ExitCode.USAGE, "--layer 9"),
    ("bench --heads 6 --kv-heads 4", ExitCode.USAGE, "--kv-heads 4: must divide --heads"),
    ("bench --seq-len 0", ExitCode.USAGE, "--seq-len 0: every length"),
    ("bench --json --csv", ExitCode.USAGE, "--json and --csv"),
    # unusable input
    ("train none.txt --out new.safetensors", ExitCode.BAD_INPUT, "none.txt"),
    ("train small.txt --out new.safetensors", ExitCode.BAD_INPUT, "too little data"),
    ("train data.txt --config none.toml", ExitCode.BAD_INPUT, "none.toml"),
    ("train data.txt --config bad.toml", ExitCode.BAD_INPUT, "unknown key 'stepz'"),
    ("train data.txt --resume none.safetensors", ExitCode.BAD_INPUT, "none"),
    ("sample none.safetensors", ExitCode.BAD_INPUT, "none.safetensors"),
    ("sample foreign.safetensors", ExitCode.BAD_INPUT, "foreign.safetensors"),
    ("sample .", ExitCode.BAD_INPUT, "folder"),
    ("inspect dense.safetensors", ExitCode.BAD_INPUT, "dense"),
    ("bench --compare none.json --seq-len 64", ExitCode.BAD_INPUT, "none.json"),
    # not available
    ("train data.txt --out new.safetensors --device cuda:99", ExitCode.UNAVAILABLE, "--device cuda:99"),
    ("sample ckpt.safetensors --device cuda:99", ExitCode.UNAVAILABLE, "--device cuda:99"),
    ("sample ckpt.safetensors --device cpu --kernel flex", ExitCode.UNAVAILABLE, "flex"),
    ("bench --device cpu --kernel triton", ExitCode.UNAVAILABLE, "triton"),
]


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(("line", "code", "message"), CASES, ids=[case[0] for case in CASES])
def test_a_mistake_is_one_line_with_its_exit_code_and_nothing_on_stdout(
    line: str, code: ExitCode, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[-1].startswith("hint: ") or len(lines) == 1
    errors = [each for each in lines if each.startswith("nsa: error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert len(lines) <= 2
    assert not (here / "new.safetensors").exists()


def test_verbose_puts_the_traceback_above_the_message(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "foreign.safetensors", "-v"]) == ExitCode.BAD_INPUT
    verbose = capsys.readouterr().err
    assert "Traceback" in verbose
    assert verbose.splitlines()[-2].startswith("nsa: error: ")
    assert run(["sample", "foreign.safetensors"]) == ExitCode.BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


def test_quiet_leaves_errors_and_nothing_else_on_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "dense.safetensors", "-q", "--device", "cpu", "--kernel", "triton"]) == ExitCode.BAD_INPUT
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["nsa", "hint"]


def test_a_mistyped_variable_is_a_notice_and_changes_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NSA_TEMPERATUR", "1")
    assert run(["sample", "foreign.safetensors"]) == ExitCode.BAD_INPUT
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "nsa: NSA_TEMPERATUR is no setting, and ignored: did you mean NSA_TEMPERATURE?"
    assert run(["sample", "foreign.safetensors", "-q"]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.splitlines() == rest


def test_a_sample_records_its_kernel_and_why_it_is_not_the_one_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    records = []
    for kernel in ("torch", "triton"):
        sys.stdin.seek(0)
        line = f"sample ckpt.safetensors --jsonl --max-tokens 1 --device cpu --kernel {kernel}"
        assert run(line.split()) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert [record["kernel"] for record in records] == ["torch", "torch"]
    assert "notice" not in records[0]
    assert "'triton'" in records[1]["notice"]


def test_nothing_alone_shows_the_help_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capsys.readouterr()
    assert all(command in shown.out for command in COMMANDS)
    assert shown.err == ""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"nsa {__version__}\n"


def test_an_error_with_line_breaks_and_control_characters_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "no\nsuch\x1b[31mfile"]) == ExitCode.BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "such" in line]) == 1
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("error", "code", "message", "hint"),
    [
        (NsaError("no", "do", 4), 4, "no", "do"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory", "--micro-batch-tokens"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            1,
            "out of memory",
            "--micro-batch-tokens",
        ),
        (MemoryError(), 1, "out of memory", "--micro-batch-tokens"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.json"),
            1,
            "x.json: No space left on device",
            "free some space",
        ),
        (ValueError("compress_block = 5: must be even"), 2, "--compress-block 5: must be even", ""),
        (ValueError("x[0] = 5: must be even"), 1, "ValueError: x[0] = 5", "-v"),
        (KeyError("x"), 1, "KeyError", "-v"),
    ],
)
def test_every_exception_has_a_message_a_hint_and_a_code(error: Exception, code: int, message: str, hint: str) -> None:
    told = explain(error, ["train", "data.txt"])
    assert told[2] == code
    assert message in told[0]
    assert hint in told[1]


def test_ctrl_c_is_130_without_a_message(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nsa_cli.checkpoint.load_checkpoint", interrupted)
    assert run(["sample", "ckpt.safetensors"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == ""


def test_a_failed_gate_is_6_after_the_report(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nsa_cli.benchmark import BenchReport, Gate

    gate = Gate(name="parity", ok=False, detail="forward @ 64: far off")
    facts = {"device_name": "chip", "torch": "2", "threads": 1}
    shape = {"dtype": "float32", "batch": 1, "heads": 4, "kv_heads": 2, "dim_head": 8}
    report = BenchReport(
        environment=facts, config={"shape": shape}, ceilings={}, methods={}, rows=(), crossovers=(), gates=(gate,)
    )
    monkeypatch.setattr("nsa_cli.benchmark.run_bench", lambda options, device, **hooks: report)
    assert run(["bench", "--seq-len", "64", "--json"]) == ExitCode.GATE_FAILED
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is False
    assert "parity: forward @ 64: far off" in shown.err


def test_a_table_of_bench_names_units_once_and_threads_on_a_cpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from nsa_cli.benchmark import BenchReport, Figures, Row
    from nsa_cli.benchmark.timing import summarize
    from nsa_cli.cli.output import show_bench

    timing = summarize([0.003, 0.0035, 0.004])
    side = Figures(kernel="torch", timing=timing, peak_bytes=None, flops=1, moved_bytes=1, roofline=None, parity=None)
    row = Row(case="branch window, forward", seq_len=300, dense=None, sparse=side)
    left_out = Row(case="backward", seq_len=300, dense=None, sparse=None, note="sparse left out: time limit")
    shape = {"dtype": "float32", "batch": 1, "heads": 4, "kv_heads": 2, "dim_head": 8}
    for device, threads in (("cpu", ", 3 threads;"), ("cuda", "torch 2;")):
        facts = {"device_name": "chip", "torch": "2", "threads": 3, "device": device}
        common: dict[str, Any] = {"environment": facts, "config": {"shape": shape}, "ceilings": {}, "methods": {}}
        show_bench(BenchReport(**common, rows=(row, left_out), crossovers=(), gates=()))
        shown = capsys.readouterr().out
        assert threads in shown.splitlines()[0]
        assert re.search(r"window, forward +300  branch +torch +3.50 ms  3.10 to 3.90 ms", shown)
        assert "not measured at 300, for time: backward" in shown


def test_the_checkpoints_of_these_tests_are_sparse() -> None:
    assert TINY.nsa is not None
