"""Training on a GPU: bfloat16 arithmetic, a host that runs ahead, random states that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training_runs import CONTEXT, Told, records, run, steps, text_corpus

pytestmark = pytest.mark.gpu
BOTH = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def test_on_a_gpu_the_host_waits_for_the_device_at_logged_steps_alone(tmp_path: Path) -> None:
    class Watching(Told):
        def progress(self, step: int, steps: int, line: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < 9 else "default")  # logged: 1, 10

    try:
        settings = {"log_every": 10, "eval_every": 0, "save_every": 0, "micro_batch_tokens": 2 * CONTEXT}
        run(tmp_path, text_corpus(tmp_path), device="cuda", config=settings, reporter=Watching())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
def test_on_a_gpu_a_run_learns_in_bfloat16_and_goes_on_from_its_state(tmp_path: Path, sparse: bool) -> None:
    corpus = text_corpus(tmp_path)
    options: dict[str, Any] = {"sparse": sparse, "device": "cuda", "model": {"dropout": 0.1}}
    settings = {"schedule": "constant", "batch_tokens": 256}
    run(tmp_path, corpus, "whole", config={**settings, "steps": 80}, **options)
    run(tmp_path, corpus, config={**settings, "steps": 40}, **options)
    run(tmp_path, corpus, config={**settings, "steps": 80}, resume=tmp_path / "ckpt.safetensors", **options)
    assert records(tmp_path)[0]["dtype"] == "bfloat16"
    assert steps(tmp_path)[-1]["loss"] < 1.5
    assert steps(tmp_path)[-1]["loss"] == pytest.approx(steps(tmp_path, "whole")[-1]["loss"], rel=0.1)
