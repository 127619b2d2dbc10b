"""Learning from a teacher: what is added to the loss, what the metrics say, which teacher a resumed run takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.checkpoint import load_state, save_checkpoint, save_state
from nsa_cli.cli.app import run as command
from nsa_cli.data import Corpus
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from nsa_cli.training.distill import DistillingLoss, kl_nats
from tests.models import DENSE, SPARSE, random_ids, random_model
from tests.test_tokenizer import byte_level_spec
from tests.training_runs import Told, curve, model_config, records, run, same_tensors, steps, text_corpus, weights

SHORT = {"steps": 6, "eval_every": 3}


def interrupt(line: dict[str, Any]) -> None:
    if line["step"] == 4:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return text_corpus(tmp_path)


@pytest.fixture
def teacher(tmp_path: Path, corpus: Corpus) -> Path:
    run(tmp_path, corpus, "teacher", config={"steps": 10, "eval_every": 0})
    return tmp_path / "teacher.safetensors"


def refused(code: ExitCode, named: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(NsaError, match=named) as caught:
        run(*arguments, **options)
    assert caught.value.exit_code == code


@torch.no_grad()
def test_the_divergence_is_the_definitions_mean_over_the_tokens_that_have_a_target() -> None:
    teacher, student = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 7).double()
    targets = torch.tensor([[1, -1, 2], [0, 3, -1]])
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[targets >= 0].mean()
    assert kl_nats(teacher, student, targets).item() == pytest.approx(expected.item())
    assert kl_nats(teacher, teacher, targets).item() == pytest.approx(0.0, abs=1e-12)
    assert kl_nats(teacher, student, torch.full((2, 3), -1)).item() == 0.0


def test_gradients_are_those_of_both_parts_and_the_teacher_gets_none() -> None:
    student, teacher, ids = random_model(SPARSE), random_model(DENSE), random_ids(2)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    parts = DistillingLoss(student, teacher.requires_grad_(False), 0.5)(inputs, targets)
    parts.sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None}
    student.zero_grad()
    (student(inputs, targets) + 0.5 * kl_nats(teacher(inputs), student(inputs), targets)).backward()
    assert parts[0].item() == pytest.approx(student(inputs, targets).item())
    for name, parameter in student.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_metrics_carry_both_parts_and_the_header_the_teacher(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    run(tmp_path, corpus, sparse=True, distill_from=teacher, config={**SHORT, "lr": 0.0, "distill_weight": 3.0})
    run(tmp_path, corpus, "plain", sparse=True, config={**SHORT, "lr": 0.0})
    for line, plain in zip(steps(tmp_path), steps(tmp_path, "plain"), strict=True):
        assert line["loss"] == pytest.approx(plain["loss"], rel=1e-5), "loss is the cross-entropy alone"
        assert line["distill_kl"] > 0.01
        assert "distill_kl" not in plain
    assert steps(tmp_path)[-1]["val_loss"] == pytest.approx(steps(tmp_path, "plain")[-1]["val_loss"])
    header = records(tmp_path)[0]["distill_from"]
    assert header["path"] == str(teacher)
    assert len(header["fingerprint"]) == 64


def test_a_student_comes_closer_to_its_teacher_than_one_that_reads_the_text_alone(
    tmp_path: Path, corpus: Corpus, teacher: Path
) -> None:
    recipe = {"steps": 30, "eval_every": 0, "log_every": 30, "distill_weight": 4.0}
    run(tmp_path, corpus, "with", distill_from=teacher, config={**recipe, "seed": 7})
    run(tmp_path, corpus, "alone", config={**recipe, "seed": 7})
    distances = []
    for name in ("with", "alone"):
        run(tmp_path, corpus, f"{name}2", init_from=tmp_path / f"{name}.safetensors", distill_from=teacher,
            config={"steps": 1, "lr": 0.0, "eval_every": 0})  # fmt: skip
        distances.append(steps(tmp_path, f"{name}2")[0]["distill_kl"])
    assert distances[0] < 0.8 * distances[1]


def test_micro_batches_add_up_to_the_same_parts(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    once = {"steps": 1, "eval_every": 0}
    run(tmp_path, corpus, "whole", distill_from=teacher, config=once)
    run(tmp_path, corpus, distill_from=teacher, config={**once, "micro_batch_tokens": 96})
    for key in ("loss", "distill_kl", "grad_norm"):
        assert steps(tmp_path)[0][key] == pytest.approx(steps(tmp_path, "whole")[0][key], rel=1e-4)


@pytest.mark.parametrize("given", [False, True], ids=["remembered", "given again"])
def test_a_resumed_run_has_its_teacher_and_goes_on_to_the_same_bits(
    tmp_path: Path, corpus: Corpus, teacher: Path, given: bool
) -> None:
    options: dict[str, Any] = {"sparse": True, "config": SHORT, "model": {"dropout": 0.1}}
    run(tmp_path, corpus, "whole", distill_from=teacher, **options)
    result = run(tmp_path, corpus, distill_from=teacher, reporter=Told(interrupt), **options)
    assert (result.status, result.step) == ("interrupted", 4)
    again = None
    if given:  # at another path: its content decides
        again = Path(shutil.move(teacher, tmp_path / "moved.safetensors"))
    run(tmp_path, corpus, resume=tmp_path / "ckpt.safetensors", distill_from=again, **options)
    assert curve(tmp_path) == curve(tmp_path, "whole")
    assert same_tensors(weights(tmp_path), weights(tmp_path, "whole"))


def test_a_resumed_run_is_refused_another_teacher_a_lost_one_and_a_new_one(
    tmp_path: Path, corpus: Corpus, teacher: Path
) -> None:
    ckpt = tmp_path / "ckpt.safetensors"
    run(tmp_path, corpus, distill_from=teacher, reporter=Told(interrupt), config=SHORT)
    run(tmp_path, corpus, "plain", reporter=Told(interrupt), config=SHORT)
    told = r"at step 4: the teacher was \w{12} \(.*teacher.safetensors\), is \w{12} \(.*plain.safetensors\)"
    refused(ExitCode.BAD_INPUT, told, tmp_path, corpus, resume=ckpt, config=SHORT, distill_from=tmp_path / "plain.safetensors")
    changed = {**SHORT, "distill_weight": 2.0}
    refused(ExitCode.BAD_INPUT, "--distill-weight was 1.0, is 2.0", tmp_path, corpus, resume=ckpt, config=changed)
    plain: dict[str, Any] = {"resume": tmp_path / "plain.safetensors", "config": SHORT}
    refused(ExitCode.BAD_INPUT, "the teacher was none, is", tmp_path, corpus, "plain", distill_from=teacher, **plain)
    teacher.unlink()
    refused(ExitCode.BAD_INPUT, r"cannot read the teacher .*teacher\.safetensors", tmp_path, corpus, resume=ckpt, config=SHORT)
    state = tmp_path / "ckpt.state.safetensors"
    tensors, meta = load_state(state)
    for origins in (3, {"distill_from": 3}, {"distill_from": {"path": 1, "fingerprint": "a"}}):
        save_state(state, tensors, {**meta, "origins": origins})
        refused(ExitCode.BAD_INPUT, "is damaged: origins", tmp_path, corpus, resume=ckpt, config=SHORT)


def test_a_finished_run_needs_no_teacher(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    run(tmp_path, corpus, distill_from=teacher, config=SHORT)
    teacher.unlink()
    assert run(tmp_path, corpus, resume=tmp_path / "ckpt.safetensors", config=SHORT).status == "finished"


def test_a_teacher_that_the_run_would_replace_is_refused(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    named = "is a file that this run writes"
    refused(ExitCode.USAGE, named, tmp_path, corpus, "teacher", distill_from=teacher, overwrite=True)


def test_a_teacher_of_another_vocabulary_is_refused_with_exit_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("a fox, a dog and a hen. " * 100)
    Path("tokenizer.json").write_text(json.dumps(byte_level_spec()))
    save_checkpoint("teacher.safetensors", build_model(model_config()), config=model_config())
    small = "--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --device cpu --steps 2"
    line = f"train data.txt --distill-from teacher.safetensors {small}"
    assert command([*line.split(), "--tokenizer", "tokenizer.json"]) == ExitCode.BAD_INPUT
    assert "teacher.safetensors has another tokenizer (bytes, 256 tokens) than this run (bpe, 300" in capsys.readouterr().err
    assert command(f"train data.txt --distill-weight 2 {small}".split()) == ExitCode.USAGE
    assert "--distill-weight 2.0 weighs a teacher" in capsys.readouterr().err
    assert command([*line.split(), "--distill-weight", "0"]) == ExitCode.USAGE
    assert "--distill-weight 0.0: must be above 0" in capsys.readouterr().err
    assert not Path("ckpt.safetensors").exists()
    assert command([*line.split(), "-q", "--json"]) == 0
    assert '"distill_kl"' in capsys.readouterr().out
