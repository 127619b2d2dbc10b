"""`--patience`, `--keep` and `--sample-every`: a run that ends when it gets no better, keeps its last saves, and shows text."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nsa_cli.cli.train as cli_train
from nsa_cli.checkpoint import load_state, read_info, save_state
from nsa_cli.cli.app import run as nsa
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training import saving
from tests.command_line import text
from tests.test_resume import assert_same_run, ckpt, interrupt, interrupted_run, stopping
from tests.training_runs import Told, hook_losses, run, same_tensors, steps, text_corpus, train_config, weights

STILL = {"lr": 0.0, "eval_every": 2, "patience": 3}
"""Weights that never move: the first validation stays the best one, and the fourth ends the run."""


def numbered(folder: Path, name: str = "ckpt") -> list[int]:
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in folder.glob(f"{name}.step-*.safetensors"))


def validations(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        return None if training else loss.new_tensor(losses[(call - 1) // 2])  # two batches each

    hook_losses(monkeypatch, change)


def test_validations_that_get_no_better_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validations(monkeypatch, [3.0, 2.0, math.nan, 1.5, 2.5, 1.5, 0.1])
    told = Told()
    result = run(tmp_path, text_corpus(tmp_path), config={"steps": 20, "eval_every": 2, "patience": 2}, reporter=told)
    assert (result.status, result.step, result.signal) == ("patience", 12, None)
    assert (result.best_step, result.best_val_loss) == (8, 1.5)
    assert [line.get("status") for line in steps(tmp_path)] == [None] * 11 + ["patience"]
    assert told.finished[0]["status"] == "patience"
    assert read_info(ckpt(tmp_path)).step == 12
    assert read_info(ckpt(tmp_path, "ckpt.best")).step == 8


def test_patience_that_ends_with_the_last_step_is_a_finished_run(tmp_path: Path) -> None:
    result = run(tmp_path, text_corpus(tmp_path), config={**STILL, "steps": 8})
    assert (result.status, result.step) == ("finished", 8)
    assert "status" not in steps(tmp_path)[-1]


@pytest.mark.parametrize("fields", [{"eval_every": 0}, {"val_fraction": 0.0}], ids=str)
def test_patience_without_validations_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="patience = 2: needs validations"):
        train_config(patience=2, **fields)


@pytest.mark.parametrize("at", [3, 5, 6, 7])
def test_patience_counts_across_a_resumption(tmp_path: Path, at: int) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole", config=STILL)
    interrupted_run(tmp_path, corpus, at, config=STILL)
    result = run(tmp_path, corpus, config=STILL, resume=ckpt(tmp_path))
    assert (result.status, result.step) == ("patience", 8)
    assert_same_run(tmp_path, "ckpt", "whole")


def test_a_run_that_patience_ended_goes_on_only_with_more_of_it(tmp_path: Path) -> None:
    corpus, told = text_corpus(tmp_path), Told()
    run(tmp_path, corpus, "whole", config={**STILL, "patience": 4})
    run(tmp_path, corpus, config=STILL)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path, corpus, config=STILL, resume=ckpt(tmp_path), reporter=told).status == "patience"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert told.notices[-1].endswith("was ended by --patience 3 at step 8: nothing to do")
    result = run(tmp_path, corpus, config={**STILL, "patience": 4}, resume=ckpt(tmp_path))
    assert (result.status, result.step) == ("patience", 10)
    assert same_tensors(weights(tmp_path, "ckpt.state"), weights(tmp_path, "whole.state"))


def test_a_state_from_before_patience_is_resumed(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus)
    state = ckpt(tmp_path, "ckpt.state")
    tensors, meta = load_state(state)
    settings = {key: value for key, value in meta["train"].items() if key not in ("patience", "keep", "sample_every")}
    old = {key: value for key, value in meta.items() if key != "stale"} | {"train": settings}
    save_state(state, tensors, old)
    assert run(tmp_path, corpus, resume=ckpt(tmp_path)).status == "finished"
    save_state(state, tensors, {**meta, "stale": -1})
    with pytest.raises(NsaError, match="stale = -1") as caught:
        run(tmp_path, corpus, resume=ckpt(tmp_path))
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_the_last_saves_are_kept_under_their_numbers(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    seen: list[list[int]] = []
    told = Told(lambda line: seen.append(numbered(tmp_path)))
    run(tmp_path, corpus, config={"save_every": 3, "keep": 2, "steps": 11, "eval_every": 4}, reporter=told)
    assert numbered(tmp_path) == [9, 11], "saves that a new best made have no number"
    assert max(map(len, seen)) == 2
    assert same_tensors(weights(tmp_path, "ckpt.step-00000011"), weights(tmp_path))
    assert read_info(ckpt(tmp_path, "ckpt.step-00000009")).step == 9
    run(tmp_path, corpus, "none", config={"save_every": 3})
    assert numbered(tmp_path, "none") == []


def test_weights_that_were_kept_name_the_checkpoint_to_resume(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, config={"keep": 1})
    for name in ("ckpt.step-00000012", "ckpt.best"):
        with pytest.raises(NsaError, match="beside it") as caught:
            run(tmp_path, corpus, resume=ckpt(tmp_path, name))
        assert caught.value.hint == f"it holds weights alone; its run goes on with --resume {ckpt(tmp_path)}"


def test_an_older_save_goes_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, settings = text_corpus(tmp_path), {"save_every": 3, "keep": 1}
    run(tmp_path, corpus, "whole", config=settings)
    copy_file = saving.copy_file

    def full(source: Path, target: Path) -> None:
        if "00000006" in target.name:
            raise NsaError("the disk is full")
        copy_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "copy_file", full)
        with pytest.raises(NsaError, match="full"):
            run(tmp_path, corpus, config=settings)
    assert numbered(tmp_path) == [3]
    told = Told()
    interrupted_run(tmp_path, corpus, at=7, config=settings, resume=ckpt(tmp_path))
    assert numbered(tmp_path) == [6], "what the resumed run found missing, it wrote"
    run(tmp_path, corpus, config=settings, resume=ckpt(tmp_path), reporter=told)
    assert numbered(tmp_path) == [12]
    assert_same_run(tmp_path, "ckpt", "whole")


def test_kept_weights_of_an_earlier_run_are_guarded_and_go_with_it(tmp_path: Path) -> None:
    corpus, settings = text_corpus(tmp_path), {"save_every": 4, "keep": 2}
    run(tmp_path, corpus, config=settings)
    run(tmp_path, corpus, "other", config=settings)
    (tmp_path / "ckpt.step-7.safetensors").write_bytes(b"the user's own")
    for path in ("ckpt", "ckpt.best", "ckpt.state"):
        ckpt(tmp_path, path).unlink()
    with pytest.raises(NsaError, match=r"ckpt\.step-(00000008|00000012)\.safetensors exists") as caught:
        run(tmp_path, corpus)
    assert caught.value.exit_code == ExitCode.USAGE
    run(tmp_path, corpus, overwrite=True, config={"steps": 3, "save_every": 2, "keep": 5})
    assert {path.name for path in tmp_path.glob("ckpt.step-*")} == {
        "ckpt.step-00000002.safetensors",
        "ckpt.step-00000003.safetensors",
        "ckpt.step-7.safetensors",
    }
    assert numbered(tmp_path, "other") == [8, 12]


def test_samples_come_at_their_steps_and_leave_no_trace_in_training(tmp_path: Path) -> None:
    corpus, model = text_corpus(tmp_path), {"dropout": 0.1}
    seen = []

    def hook(model: torch.nn.Module, step: int, should_stop: Callable[[], bool]) -> str:
        seen.append((step, model.training, torch.is_grad_enabled(), should_stop()))
        return f"text {torch.rand(())}, {step}"

    settings = {"sample_every": 3, "log_every": 100, "steps": 11, "eval_every": 5}
    run(tmp_path, corpus, "with", model=model, config=settings, sampler_hook=hook)
    run(tmp_path, corpus, "without", model=model, config={**settings, "sample_every": 0})
    assert seen == [(step, False, False, False) for step in (3, 6, 9, 11)]
    assert [line["step"] for line in steps(tmp_path, "with")] == [1, 3, 5, 6, 9, 10, 11]
    assert [line["step"] for line in steps(tmp_path, "with") if "sample" in line] == [3, 6, 9, 11]
    assert [line["step"] for line in steps(tmp_path, "with") if "val_loss" in line] == [5, 10, 11]
    assert same_tensors(weights(tmp_path, "with"), weights(tmp_path, "without"))


def test_a_signal_during_a_sample_leaves_it_to_the_resumed_run(tmp_path: Path) -> None:
    corpus, settings = text_corpus(tmp_path), {"sample_every": 5, "eval_every": 5}
    calls = []

    def hook(model: torch.nn.Module, step: int, should_stop: Callable[[], bool]) -> str:
        calls.append(step)
        if len(calls) == 4:  # the second run's at step 10
            os.kill(os.getpid(), signal.SIGINT)
        return "cut" if should_stop() else f"whole {step}"

    run(tmp_path, corpus, "whole", config={**settings, "steps": 10, "schedule": "constant"}, sampler_hook=hook)
    result = run(tmp_path, corpus, config={**settings, "steps": 10, "schedule": "constant"}, sampler_hook=hook)
    assert (result.status, result.step) == ("interrupted", 10)
    result = run(
        tmp_path, corpus, config={**settings, "steps": 10, "schedule": "constant"}, sampler_hook=hook, resume=ckpt(tmp_path)
    )
    assert result.status == "finished"
    assert [line["sample"] for line in steps(tmp_path) if "sample" in line] == ["whole 5", "whole 10"]
    assert_same_run(tmp_path, "ckpt", "whole")


def test_the_command_shows_samples_on_stderr_and_the_same_ones_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_train, "SAMPLE_TOKENS", 12)
    for name in os.environ:
        if name.startswith("NSA_"):
            monkeypatch.delenv(name)
    Path("data.txt").write_text(text(2000))
    line = "train data.txt --sparse --dim 16 --depth 1 --heads 2 --kv-heads 1 --seq-len 16 --batch-tokens 32 --device cpu"
    line += " --schedule constant --sample-every 2 --out {} --steps {}"
    assert nsa(line.format("a.safetensors", 4).split()) == 0
    shown = capsys.readouterr()
    assert shown.out == "a.safetensors\n"
    assert [row for row in shown.err.splitlines() if "sample" in row] == ["nsa: sample at step 2", "nsa: sample at step 4"]
    assert any(row.startswith("  | ") for row in shown.err.splitlines())
    assert nsa(line.format("b.safetensors", 2).split()) == 0
    assert nsa(["train", "data.txt", "--resume", "b.safetensors", "--steps", "4", "--json"]) == 0
    lines = [json.loads(row) for row in capsys.readouterr().out.splitlines()[1:]]
    a, b = (
        {each["step"]: each["sample"] for each in map(json.loads, Path(name).read_text().splitlines()) if "sample" in each}
        for name in ("a.metrics.jsonl", "b.metrics.jsonl")
    )
    assert a == b
    assert [each["sample"] for each in lines if "sample" in each] == [a[4]]
    assert lines[-1] == {"checkpoint": "b.safetensors"}


def test_the_command_ends_with_0_when_patience_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text(2000))
    line = "train data.txt --dim 16 --depth 1 --heads 2 --kv-heads 1 --seq-len 16 --batch-tokens 32 --device cpu --lr 0"
    assert nsa([*line.split(), "--eval-every", "1", "--patience", "2"]) == 0
    assert "no better validation for --patience: ended at step 3" in capsys.readouterr().err


def test_interrupting_the_reporter_of_a_kept_step_keeps_it(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, config={"save_every": 4, "keep": 2}, reporter=stopping(4, interrupt))
    assert numbered(tmp_path) == [4]
