"""`nsa train --dry-run`: the run's own first step and costs on stdout, and not a file written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.cli.app import run
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode
from nsa_cli.model.accounting import model_flops_per_token, parameters_by_part
from nsa_cli.training import RunPaths, dry_run, train
from tests.command_line import text
from tests.training_runs import CONTEXT, hook_losses, model_config, records, text_corpus, train_config
from tests.training_runs import run as train_run

SMALL = "--dim 16 --depth 1 --heads 2 --kv-heads 1 --seq-len 16 --batch-tokens 64 --device cpu"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with data.txt, and no settings from the environment."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("NSA_"):
            monkeypatch.delenv(name)
    Path("data.txt").write_text(text(2000))
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*")}


def reported(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    before = contents(Path())
    assert run([*line.split(), "--dry-run", "--json"]) == 0
    assert contents(Path()) == before, "no file is written"
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one document"
    report: dict[str, Any] = json.loads(out)
    return report


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("tokens_per_s", "mfu", "elapsed_s")}


def first_lines(path: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [numbers(record) for record in records if "step" in record]


@pytest.mark.parametrize("kind", ["--dense", "--sparse"])
def test_the_step_is_the_runs_own_first_one_and_nothing_is_written(
    here: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train data.txt {SMALL} {kind} --dropout 0.1 --micro-batch-tokens 32 --eval-every 0 --schedule constant --warmup 0"
    report = reported(line, capsys)
    assert report["step"]["elapsed_s"] > 0
    assert run(f"{line} --steps 1 -q".split()) == 0
    assert first_lines("ckpt.metrics.jsonl") == [numbers(report["step"])]


def test_a_start_and_a_teacher_are_those_of_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"train data.txt {SMALL} --steps 2 --out dense.safetensors".split()) == 0
    line = "train data.txt --sparse --batch-tokens 64 --steps 2 --log-every 1 --eval-every 0 --device cpu"
    line += " --out sparse.safetensors --init-from dense.safetensors --distill-from dense.safetensors"
    capsys.readouterr()
    report = reported(line, capsys)
    assert report["memory"]["teacher"] > 0
    assert run(line.split()) == 0
    assert numbers(report["step"]) == first_lines("sparse.metrics.jsonl")[0]
    assert run([*line.replace("--distill-from dense", "--distill-from nothing").split(), "--dry-run"]) == ExitCode.BAD_INPUT


def test_a_resumed_runs_dry_run_makes_its_next_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"train data.txt {SMALL} --steps 3 --schedule constant --log-every 1 -q".split()) == 0
    capsys.readouterr()
    resume = "train data.txt --resume ckpt.safetensors --steps 5"
    report = reported(resume, capsys)
    assert report["settings"]["--dim"] == {"value": 16, "from": "from ckpt.safetensors"}
    assert run([*resume.split(), "-q"]) == 0
    capsys.readouterr()
    assert numbers(report["step"]) == first_lines("ckpt.metrics.jsonl")[3]
    assert reported("train data.txt --resume ckpt.safetensors", capsys)["step"] is None, "nothing is left to do"


def test_the_report_says_where_every_setting_came_from(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.toml").write_text("[train]\nwarmup = 7\n")
    monkeypatch.setenv("NSA_BETA1", "0.8")
    line = f"train data.txt {SMALL} --config run.toml"
    settings = reported(line, capsys)["settings"]
    expected = {
        "--dim": (16, "--dim"),
        "--beta1": (0.8, "NSA_BETA1"),
        "--warmup": (7, "run.toml [train]"),
        "--lr": (0.002, "preset tiny"),
        "--weight-decay": (0.1, "default"),
        "--out": ("ckpt.safetensors", "default"),
    }
    assert {flag: (settings[flag]["value"], settings[flag]["from"]) for flag in expected} == expected
    assert run([*line.split(), "--dry-run"]) == 0
    shown = capsys.readouterr()
    table = [each.split(maxsplit=2) for each in shown.out.splitlines() if each.startswith("  --")]
    assert ["--warmup", "7", "run.toml [train]"] in table
    assert len(table) == sum(each["value"] is not None for each in settings.values())
    parts = ("parameters  ", "FLOPs  ", "memory, estimated  ", "data  data.txt", "  held out", "machine  cpu", "step 1  loss ")
    for part in parts:
        assert any(each.startswith(part) for each in shown.out.splitlines()), part


def test_costs_are_the_accountings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(f"train data.txt {SMALL} --sparse --batch-tokens 160 --steps 10", capsys)
    model = report["model"]
    config = ModelConfig(**{**model, "nsa": NSAConfig(**model["nsa"])})
    assert report["parameters"] == parameters_by_part(config)
    flops = model_flops_per_token(config)
    expected = {"forward": flops.forward, "training": flops.training, "necessary": flops.necessary, "step": flops.training * 160}
    assert report["flops"] == expected
    memory = report["memory"]
    weights = 4 * report["parameters"]["total"]
    assert (memory["weights"], memory["gradients"], memory["moments"]) == (weights, weights, 2 * weights)
    assert memory["total"] == 4 * weights + memory["activations"]
    assert report["epochs"] == pytest.approx(1600 / report["data"]["train_tokens"])


def test_activations_are_those_of_a_micro_batch_and_never_the_weights(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)

    def activations(**config: Any) -> int:
        paths = RunPaths.beside(tmp_path / "ckpt.safetensors")
        report = dry_run(model_config(), train_config(**config), corpus, paths=paths)
        return int(report["memory"]["activations"])

    four, two = activations(), activations(micro_batch_tokens=2 * CONTEXT)
    assert two < four <= 2 * two
    # Each of 2 blocks keeps at least its two norms' inputs and the hidden layer before and after gelu, in float32.
    assert four > 4 * 4 * CONTEXT * 2 * (2 * 32 + 2 * 128)
    assert list(tmp_path.iterdir()) == [tmp_path / "text.txt"]


def test_an_existing_checkpoint_is_a_notice_and_broken_input_a_refusal(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("ckpt.safetensors").write_bytes(b"an earlier run's")
    assert run(f"train data.txt {SMALL} --dry-run".split()) == 0
    assert "nsa: ckpt.safetensors exists: go on from it with --resume" in capsys.readouterr().err
    for line, code in (("none.txt", ExitCode.BAD_INPUT), (f"data.txt {SMALL} --batch-tokens 17", ExitCode.USAGE)):
        assert run(["train", *line.split(), "--dry-run"]) == code
        assert capsys.readouterr().out == ""
    assert sorted(path.name for path in here.iterdir()) == ["ckpt.safetensors", "data.txt"]


def test_a_step_whose_loss_is_not_finite_is_shown_as_that(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hook_losses(monkeypatch, lambda call, training, loss: loss * math.nan)
    assert run(f"train data.txt {SMALL} --dry-run".split()) == 0
    assert "step 1  loss not finite, gradient norm not finite" in capsys.readouterr().out


def test_a_trial_is_refused_and_told_what_the_run_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train data.txt {SMALL} --eval-every 0 --warmup 100 --steps 2"
    assert run([*line.split(), "--dry-run"]) == 0
    notice = "nsa: warm-up shortened from 100 to 1 steps, half of --steps 2"
    assert notice in capsys.readouterr().err
    assert run(line.split()) == 0
    assert notice in capsys.readouterr().err


def test_a_trial_has_the_runs_header_and_refuses_its_arguments(tmp_path: Path) -> None:
    corpus, paths = text_corpus(tmp_path), RunPaths.beside(tmp_path / "ckpt.safetensors")
    report = dry_run(model_config(), train_config(steps=1, eval_every=0), corpus, paths=paths)
    train_run(tmp_path, corpus, config={"steps": 1, "eval_every": 0})
    header = {key: value for key, value in records(tmp_path)[0].items() if key != "event"}
    assert {key: report[key] for key in header if key != "notices"} == {k: v for k, v in header.items() if k != "notices"}
    for wrong in ({"dtype": torch.float16}, {"no_such": 1}):
        for begin in (dry_run, train):
            with pytest.raises((ValueError, TypeError), match=r"float16|no_such"):
                begin(model_config(), train_config(), corpus, paths=RunPaths.beside(tmp_path / "other"), **wrong)  # type: ignore[operator]
