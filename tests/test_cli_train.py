"""`nsa train` on the command line: what it refuses, what it keeps when its reader leaves, what a resumption needs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nsa_cli.checkpoint import load_state, read_info
from nsa_cli.cli import output
from nsa_cli.cli.app import run
from nsa_cli.errors import ExitCode
from tests.command_line import shell, text
from tests.test_tokenizer import byte_level_spec

SMALL = "--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --device cpu"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with data.txt, and no settings from the environment."""
    monkeypatch.chdir(tmp_path)
    for name in (*os.environ, "WORLD_SIZE"):
        if name.startswith("NSA_") or name == "WORLD_SIZE":
            monkeypatch.delenv(name, raising=False)
    Path("data.txt").write_text(text(2000))
    return tmp_path


def refusal(line: list[str], code: ExitCode, capsys: pytest.CaptureFixture[str]) -> str:
    """The error and its hint, one line each, of a command that must end with `code` and write nothing."""
    before = sorted(Path().iterdir())
    assert run(line) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [part.split(":")[0] for part in shown.err.splitlines()] == ["nsa", "hint"]
    assert sorted(Path().iterdir()) == before
    return shown.err


@pytest.mark.parametrize("out", [".", "", "..", "folder"])
def test_a_folder_as_out_is_refused_with_exit_2(here: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for more in ([], ["--overwrite"]):
        told = refusal(["train", "data.txt", "--out", out, *more], ExitCode.USAGE, capsys)
        assert f"--out {out or '.'} is a folder" in told


def test_a_folder_as_resume_is_refused_with_exit_3(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume . is a folder" in refusal(["train", "data.txt", "--resume", "."], ExitCode.BAD_INPUT, capsys)


def test_a_preset_on_the_command_line_of_a_resumption_is_refused_and_one_from_elsewhere_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"train data.txt --steps 1 {SMALL} -q".split()) == 0
    capsys.readouterr()
    resume = ["train", "data.txt", "--resume", "ckpt.safetensors", "-q"]
    told = refusal([*resume, "--preset", "small"], ExitCode.USAGE, capsys)
    assert "--preset small" in told
    assert "leave --preset out" in told
    monkeypatch.setenv("NSA_PRESET", "small")
    assert run(resume) == 0


def test_changed_data_is_refused_and_forced_on_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume" in refusal(["train", "data.txt", "--force-data"], ExitCode.USAGE, capsys)
    assert run(f"train data.txt --steps 2 --schedule constant {SMALL} -q".split()) == 0
    capsys.readouterr()
    Path("data.txt").write_text(text(3000))
    resume = ["train", "data.txt", "--resume", "ckpt.safetensors", "--steps", "3"]
    assert "1,867 tokens of data.txt, is 2,804 tokens of data.txt" in refusal(resume, ExitCode.BAD_INPUT, capsys)
    assert run([*resume, "--force-data"]) == 0
    assert "going on with other data: the data was 1,867 tokens" in capsys.readouterr().err


def test_many_processes_are_refused_with_exit_5_and_one_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run one process" in refusal(["train", "data.txt"], ExitCode.UNAVAILABLE, capsys)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(f"train data.txt --steps 1 {SMALL} -q".split()) == 0


def test_a_run_in_its_own_data_folder_can_be_resumed_and_replaced(here: Path) -> None:
    Path("books").mkdir()
    Path("data.txt").rename("books/data.txt")
    for more in ("--steps 1", "--resume books/ckpt.safetensors", "--steps 2 --overwrite"):
        sizes = "" if "--resume" in more else SMALL
        assert run(f"train books --out books/ckpt.safetensors {sizes} {more} -q".split()) == 0


def test_a_bpe_run_whose_weights_are_lost_is_resumed_without_naming_its_tokenizer(here: Path) -> None:
    Path("tokenizer.json").write_text(json.dumps(byte_level_spec()))
    flags = f"--schedule constant {SMALL} -q --tokenizer tokenizer.json"
    assert run(f"train data.txt --steps 2 {flags}".split()) == 0
    Path("ckpt.safetensors").unlink()
    assert run(["train", "data.txt", "--steps", "3", "--resume", "ckpt.safetensors", "-q"]) == 0
    info = read_info("ckpt.safetensors")
    assert (info.step, info.tokenizer.name) == (3, "bpe")


def test_json_streams_the_metrics_lines_and_ends_with_the_checkpoints_path(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train data.txt --sparse --steps 4 --log-every 2 --eval-every 3 --patience 2 {SMALL} --json --out a.safetensors"
    assert run(line.split()) == 0
    *lines, last = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert lines == [json.loads(each) for each in Path("a.metrics.jsonl").read_text().splitlines()]
    assert [each.get("event", each.get("step")) for each in lines] == ["start", 1, 2, 3, 4]
    assert last == {"checkpoint": "a.safetensors"}


def test_a_reader_of_the_json_lines_that_leaves_ends_the_run_with_141_and_its_files_saved(here: Path) -> None:
    line = f"nsa train data.txt --json --steps 100000 --log-every 1 {SMALL} | head -1; exit ${{PIPESTATUS[0]}}"
    result = shell(line, cwd=here)
    assert result.returncode == ExitCode.CLOSED_PIPE, result.stderr
    assert b"Traceback" not in result.stderr
    _, meta = load_state("ckpt.state.safetensors")
    assert meta["step"] >= 1
    assert read_info("ckpt.safetensors").step == meta["step"]


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def metrics_lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("ckpt.metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sparse", ["--dense", "--sparse"])
def test_json_streams_the_lines_of_the_metrics_file_and_the_checkpoints_path_last(
    here: Path, sparse: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"train data.txt {SMALL} {sparse} --json -q --steps 4 --log-every 1 --eval-every 2".split()) == 0
    assert json_lines(capsys) == [*metrics_lines(), {"checkpoint": "ckpt.safetensors"}]
    assert [line.get("step") for line in metrics_lines()] == [None, 1, 2, 3, 4]


def test_json_of_an_interrupted_run_ends_with_the_checkpoints_path_and_the_resumed_one_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell = output.TrainingReporter.metrics

    def interrupt(self: output.TrainingReporter, line: dict[str, Any]) -> None:
        tell(self, line)
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(output.TrainingReporter, "metrics", interrupt)
        assert run(f"train data.txt {SMALL} --json -q --steps 4 --log-every 1".split()) == ExitCode.TERMINATED
    before = metrics_lines()
    assert json_lines(capsys) == [*before, {"checkpoint": "ckpt.safetensors"}]
    assert before[-1]["step"] == 2
    assert run(["train", "data.txt", "--resume", "ckpt.safetensors", "--json", "-q"]) == 0
    resumed, *lines = json_lines(capsys)
    record, *rest = metrics_lines()[len(before) :]
    assert [*rest, {"checkpoint": "ckpt.safetensors"}] == lines
    # On a stream of its own the record says what is trained as well.
    assert resumed.items() >= record.items()
    assert (resumed["event"], resumed["from_step"], resumed["model"]) == ("resume", 2, before[0]["model"])
