"""TensorBoard and wandb: what they are given, how a resumed run goes on there, and that they never end a run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nsa_cli.cli.app import run as command
from nsa_cli.errors import ExitCode
from nsa_cli.training import RunPaths
from nsa_cli.training.loggers import LoggedReporter, make_loggers, numbers
from tests.command_line import text
from tests.training_runs import Told, records, run, steps, text_corpus

LINE = "train data.txt --sparse --dim 16 --depth 1 --heads 2 --seq-len 32 --batch-tokens 64 --device cpu --log-every 1"


class FakeWriter:
    """Stands for SummaryWriter."""

    made: list[FakeWriter]

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.texts: list[tuple[str, str, int]] = []
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        self.made.append(self)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class FakeRun:
    """Stands for wandb's Run."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.id = options["id"] or "a1b2c3"
        self.options, self.lines, self.ended = options, list[dict[str, Any]](), list[int]()
        self.metrics: list[tuple[str, str]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter, FakeWriter.made = FakeWriter, []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return FakeWriter.made


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    module: Any = ModuleType("wandb")
    made: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        made.append(FakeRun(options))
        return made[-1]

    module.init, module.Settings = init, lambda **values: SimpleNamespace(**values)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("NSA_") and not name.startswith("NSA_TEST_"):
            monkeypatch.delenv(name)
    Path("data.txt").write_text(text(2000))
    return tmp_path


def test_the_numbers_of_a_line_have_names_by_layer_and_branch() -> None:
    line = {
        "step": 3,
        "loss": 1.5,
        "grad_norm": None,
        "gates": [[0.1, 0.2, 0.3]],
        "selection": {"changed": [0.5, None]},
        "val_loss": float("nan"),
    }
    found = dict(numbers(line))
    assert found == {"loss": 1.5, "gates/0/cmp": 0.1, "gates/0/slc": 0.2, "gates/0/win": 0.3, "selection/changed/0": 0.5}


def test_both_get_the_lines_of_the_metrics_file(here: Path, writers: list[FakeWriter], runs: list[FakeRun]) -> None:
    assert command(f"{LINE} --steps 4 --eval-every 2 -q --log tensorboard --log wandb".split()) == 0
    (writer,), (online,) = writers, runs
    lines = steps(here)
    assert writer.scalars == [(name, value, line["step"]) for line in lines for name, value in numbers(line)]
    assert online.lines == [{"step": line["step"], **dict(numbers(line))} for line in lines]
    assert any("selection/entropy_nats/0" in line for line in online.lines)
    assert online.options["config"] == records(here)[0]
    assert '"event": "start"' in writer.texts[0][1]
    assert (writer.log_dir, writer.purge_step, writer.closed) == ("ckpt.tensorboard", 0, True)
    assert (online.options["project"], online.options["name"], online.ended) == ("nsa", "ckpt", [0])
    assert vars(online.options["settings"]) == {"console": "off", "silent": True}, "stdout is not wandb's, nor stderr with -q"


def test_a_resumed_run_goes_on_in_the_same_place(here: Path, writers: list[FakeWriter], runs: list[FakeRun]) -> None:
    flags = "-q --schedule constant --log tensorboard --log wandb"
    assert command(f"{LINE} --steps 2 {flags}".split()) == 0
    assert command(f"train data.txt --resume ckpt.safetensors --steps 4 {flags}".split()) == 0
    assert [writer.purge_step for writer in writers] == [0, 3], "steps beyond the state's are done again"
    assert {step for _, _, step in writers[1].scalars} == {3, 4}
    assert [(each.options["id"], each.options["resume"]) for each in runs] == [(None, None), ("a1b2c3", "allow")]
    assert runs[1].metrics == [("*", "step")]
    assert command(f"{LINE} --steps 1 --overwrite {flags}".split()) == 0
    assert runs[2].options["id"] is None, "a run that replaces another is a new one"


def test_what_wandb_keeps_is_no_training_text(here: Path, runs: list[FakeRun]) -> None:
    Path("books").mkdir()
    Path("data.txt").rename("books/data.txt")
    line = LINE.replace("data.txt", "books")
    assert command(f"{line} --out books/ckpt.safetensors --steps 1 -q --log wandb".split()) == 0
    Path(runs[0].options["dir"], "requirements.txt").write_text("not a book\n")
    assert command(["train", "books", "--resume", "books/ckpt.safetensors", "--steps", "1", "-q", "--log", "wandb"]) == 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_anything_is_read(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    assert command(f"train nowhere.txt --log {name}".split()) == ExitCode.FAILURE
    told = capsys.readouterr().err
    assert f"--log {name} needs the {name} package" in told
    assert f"hint: pip install 'nsa-cli[{name}]'" in told


def test_an_unknown_logger_is_a_usage_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["train", "data.txt", "--log", "mlflow"]) == ExitCode.USAGE
    assert "--log mlflow: must be one of tensorboard, wandb" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "close"])
def test_a_logger_that_fails_is_left_out_with_one_notice_and_the_run_goes_on(
    tmp_path: Path, method: str, writers: list[FakeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError("no space\nleft")

    monkeypatch.setattr(FakeWriter, method, fail)
    told = Told()
    paths = RunPaths.beside(tmp_path / "ckpt.safetensors")
    with LoggedReporter(told, make_loggers(["tensorboard"], paths)) as reporter:
        result = run(tmp_path, text_corpus(tmp_path), reporter=reporter)
    assert (result.status, len(told.lines), len(told.finished)) == ("finished", 12, 1)
    failed = [notice for notice in told.notices if "--log" in notice]
    assert failed == ["--log tensorboard failed, and gets no more of this run: BrokenPipeError: no space left"]


def test_an_interrupted_run_closes_its_loggers_and_a_failed_one_says_so(tmp_path: Path, runs: list[FakeRun]) -> None:
    def stop(line: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def fail(line: dict[str, Any]) -> None:
        raise RuntimeError

    corpus = text_corpus(tmp_path)
    for act, code in ((stop, 0), (fail, 1)):
        paths = RunPaths.beside(tmp_path / f"{code}.safetensors")
        loggers = make_loggers(["wandb"], paths)
        try:
            with LoggedReporter(Told(act), loggers) as reporter:
                run(tmp_path, corpus, paths=paths, reporter=reporter)
        except RuntimeError:
            assert act is fail
        assert runs[-1].ended == [code]


def test_a_finished_run_that_is_resumed_opens_nothing(here: Path, writers: list[FakeWriter]) -> None:
    assert command(f"{LINE} --steps 1 -q".split()) == 0
    assert command(["train", "data.txt", "--resume", "ckpt.safetensors", "--log", "tensorboard", "-q"]) == 0
    assert writers == []
