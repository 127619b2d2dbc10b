"""Leak canary: nothing can be learned from independent random bytes, unless a model sees what it is to predict."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from nsa_cli.config import NSAConfig
from nsa_cli.training import RunPaths, batches, train
from tests.training_runs import model_config, random_corpus, steps, train_config

BOTH = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
LN_256 = math.log(256)


def canary(folder: Path, sparse: bool, steps_taken: int, *, batch: int, context: int, dim: int) -> list[float]:
    """Losses of a model trained on noise, each of a batch that it has not seen, and then the validation's."""
    nsa = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32) if sparse else None
    model = dataclasses.replace(model_config(), nsa=nsa, context=context, dim=dim, dim_head=dim // 4)
    config = train_config(
        steps=steps_taken, batch_tokens=batch * context, lr=2e-3, eval_every=steps_taken, eval_tokens=50 * context
    )
    corpus = random_corpus(7, 4_000_000)
    result = train(model, config, corpus, paths=RunPaths.beside(folder / "canary.safetensors"))
    assert result.val_loss is not None
    return [line["loss"] for line in steps(folder, "canary")] + [result.val_loss]


@BOTH
def test_noise_cannot_be_learned_in_40_steps(tmp_path: Path, sparse: bool) -> None:
    losses = canary(tmp_path, sparse, 40, batch=8, context=64, dim=32)
    assert min(losses) > LN_256 - 0.02
    assert losses[-1] < LN_256 + 0.2


@pytest.mark.slow
@BOTH
def test_noise_cannot_be_learned_in_300_steps(tmp_path: Path, sparse: bool) -> None:
    losses = canary(tmp_path, sparse, 300, batch=8, context=128, dim=32)
    assert min(losses) > LN_256 - 0.02
    assert losses[-1] < LN_256 + 0.05


@BOTH
def test_the_canary_sings_when_targets_leak_into_the_inputs(tmp_path: Path, monkeypatch: Any, sparse: bool) -> None:
    real = batches.training_batch

    def leaking(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        _, targets = real(*args, **kwargs)
        return targets, targets

    monkeypatch.setattr(batches, "training_batch", leaking)
    assert min(canary(tmp_path, sparse, 40, batch=8, context=64, dim=32)) < LN_256 - 0.1
