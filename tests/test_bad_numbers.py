"""Losses and gradients that are not finite: skipped, counted, and in the end named with the data they came from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_cli.training.prepare as prepare
from nsa_cli.checkpoint import load_state
from nsa_cli.config import TrainConfig
from nsa_cli.data import Corpus, step_draws, window_starts
from nsa_cli.errors import ExitCode
from nsa_cli.training.optim import Diverged
from tests.training_runs import CONTEXT, hook_losses, records, run, same_tensors, text_corpus, weights

POISON = 255
WINDOWS = 4
NO_VALIDATION = {"eval_every": 0, "save_every": 1}


def poisoned(corpus: Corpus, place: int) -> Corpus:
    train = corpus.train.copy()
    train[place] = POISON
    return replace(corpus, train=train)


def poison_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of every batch that reads or predicts the poisoned token is not a number."""
    build = prepare.build_model

    def hooked(*args: Any, **options: Any) -> Any:
        model = build(*args, **options)

        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], loss: Tensor) -> Tensor | None:
            return loss * math.nan if any(bool((each == POISON).any()) for each in inputs[:2]) else None

        model.register_forward_hook(hook)
        return model

    monkeypatch.setattr(prepare, "build_model", hooked)


def starts_at(step: int, tokens: int) -> list[int]:
    draws = step_draws(seed=TrainConfig().seed, step=step, count=WINDOWS)
    found = window_starts(draws, tokens, CONTEXT)
    return [int(start) for start in found]


def diverged(folder: Path, corpus: Corpus, **config: Any) -> Diverged:
    with pytest.raises(Diverged) as caught:
        run(folder, corpus, config={**NO_VALIDATION, **config})
    assert caught.value.exit_code == ExitCode.DIVERGED
    return caught.value


@pytest.mark.parametrize("micro", [None, 2 * CONTEXT])
def test_the_window_that_ended_a_run_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int | None
) -> None:
    corpus = text_corpus(tmp_path)
    bad = starts_at(6, len(corpus.train))[2]
    corpus = poisoned(corpus, bad + CONTEXT // 2)
    holders = {
        step: [start for start in starts_at(step, len(corpus.train)) if start <= bad + CONTEXT // 2 <= start + CONTEXT]
        for step in range(1, 7)
    }
    first = min(step for step, found in holders.items() if found)
    poison_losses(monkeypatch)
    error = diverged(tmp_path, corpus, max_skipped=1, micro_batch_tokens=micro)
    listed = ", ".join(map(str, starts_at(first, len(corpus.train))))
    assert f"each of steps {first} to {first}" in error.message
    assert f"step {first} saw windows of {CONTEXT} tokens at {listed} of the training tokens" in error.message
    assert f"of which {', '.join(map(str, holders[first]))} fail alone" in error.message
    record = records(tmp_path)[-1]
    assert (record["event"], record["first_step"], record["at_step"]) == ("diverged", first, first)
    assert (record["windows"], record["not_finite"]) == (starts_at(first, len(corpus.train)), holders[first])


def test_the_files_keep_the_weights_from_before_the_first_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "before", config={**NO_VALIDATION, "schedule": "constant", "steps": 5})
    hook_losses(monkeypatch, lambda call, training, loss: loss * math.inf if training and call > 5 else None)
    error = diverged(tmp_path, corpus, max_skipped=3, schedule="constant")
    assert "steps 6 to 8" in error.message
    assert "none of which fails alone" in error.message, "only the weights' own steps were bad, not these windows"
    assert same_tensors(weights(tmp_path), weights(tmp_path, "before"))
    _, meta = load_state(tmp_path / "ckpt.state.safetensors")
    assert meta["step"] == 7, "two skipped steps were saved, the third ended the run"


def test_a_bad_gradient_under_a_good_loss_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = prepare.build_model

    def hooked(*args: Any, **options: Any) -> Any:
        model = build(*args, **options)
        model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
        return model

    monkeypatch.setattr(prepare, "build_model", hooked)
    error = diverged(tmp_path, text_corpus(tmp_path), max_skipped=2)
    assert "steps 1 to 2" in error.message
    logged = [record for record in records(tmp_path) if "step" in record]
    assert [(line["loss"] is None, line["grad_norm"]) for line in logged] == [(False, None)]
    assert len(records(tmp_path)[-1]["not_finite"]) == WINDOWS


def test_a_good_step_between_starts_the_count_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook_losses(monkeypatch, lambda call, training, loss: loss * math.nan if training and call % 3 else None)
    result = run(tmp_path, text_corpus(tmp_path), config={**NO_VALIDATION, "max_skipped": 3})
    assert (result.status, result.skipped) == ("finished", 8)


def test_a_limit_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="max_skipped = 0: must be an integer of at least 1"):
        TrainConfig(max_skipped=0)
