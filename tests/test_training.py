"""A training run from its first step to its files: it learns, repeats to the bit, validates, and stops when it must."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.checkpoint import load_checkpoint, load_state, read_info
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training import RunPaths, batches, saving
from nsa_cli.training.metrics import bits_per_byte
from tests.training_runs import (
    CONTEXT,
    Told,
    curve,
    hook_losses,
    model_config,
    records,
    run,
    same_tensors,
    steps,
    text_corpus,
    train_config,
    weights,
)

BOTH = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
LN_256 = math.log(256)


@BOTH
def test_the_loss_goes_down_on_text_that_can_be_learned(tmp_path: Path, sparse: bool) -> None:
    settings = {"steps": 80, "eval_every": 40, "batch_tokens": 256}
    result = run(tmp_path, text_corpus(tmp_path), sparse=sparse, config=settings)
    first, last = steps(tmp_path)[0], steps(tmp_path)[-1]
    assert abs(first["loss"] - LN_256) < 0.3
    assert last["loss"] < 1.5
    assert last["val_loss"] < 1.5
    assert (result.status, result.step, result.signal) == ("finished", 80, None)


@BOTH
def test_a_step_line_has_its_keys_and_sparse_models_their_gates(tmp_path: Path, sparse: bool) -> None:
    run(tmp_path, text_corpus(tmp_path), sparse=sparse)
    keys = {"step", "loss", "bits_per_byte", "lr", "grad_norm", "skipped", "tokens_per_s", "mfu", "elapsed_s"}
    keys |= {"gates"} if sparse else set()
    for line in steps(tmp_path):
        validated = {"val_loss", "val_bits_per_byte"} if line["step"] in (5, 10, 12) else set()
        validated |= {"selection"} if sparse and validated else set()
        assert set(line) == keys | validated
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        if sparse:
            assert [len(gates) for gates in line["gates"]] == [3, 3]
            assert all(0 < gate < 1 for gates in line["gates"] for gate in gates)
    assert [line["step"] for line in steps(tmp_path)] == list(range(1, 13))


@pytest.mark.usefixtures("no_interpreter")
def test_the_first_line_says_what_was_run_where(tmp_path: Path) -> None:
    told = Told()
    run(tmp_path, text_corpus(tmp_path), sparse=True, kernel="triton", notices=["a notice"], reporter=told)
    header = records(tmp_path)[0]
    assert header["event"] == "start"
    assert header["kernel"] == "torch"
    assert header["notices"][0] == "a notice"
    assert "triton" in header["notices"][1]
    assert header["notices"][1] in told.notices
    assert header["model"] == model_config(True).to_dict()
    assert header["train"] == train_config().to_dict()
    assert (header["device"].split()[0], header["dtype"]) == ("cpu", "float32")
    assert header["parameters"]["total"] == sum(tensor.numel() for tensor in weights(tmp_path).values())
    assert header["parameters"]["compression"] > 0
    assert header["data"]["train_tokens"] == 31 * 200 - header["data"]["val_tokens"]
    assert set(header["versions"]) == {"nsa", "torch", "python"}
    assert told.started == [header]
    assert told.lines == steps(tmp_path)
    assert told.progressed == list(range(1, 13))
    assert [summary["status"] for summary in told.finished] == ["finished"]


def test_lines_come_at_the_first_the_last_and_every_logged_or_validated_step(tmp_path: Path) -> None:
    run(tmp_path, text_corpus(tmp_path), config={"log_every": 4, "steps": 11})
    assert [line["step"] for line in steps(tmp_path)] == [1, 4, 5, 8, 10, 11]


def test_bits_per_byte_counts_the_bytes_of_a_token() -> None:
    assert bits_per_byte(math.log(2) * 6, tokens=10, num_bytes=30) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, tokens=0, num_bytes=0))


@BOTH
def test_the_same_run_gives_the_same_bits_twice_on_two_threads(tmp_path: Path, sparse: bool) -> None:
    corpus, before = text_corpus(tmp_path), torch.get_num_threads()
    settings = {"steps": 3, "batch_tokens": 16 * CONTEXT, "eval_every": 0}
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            run(tmp_path, corpus, name, sparse=sparse, model={"dropout": 0.1}, config=settings)
    finally:
        torch.set_num_threads(before)
    assert same_tensors(weights(tmp_path, "one"), weights(tmp_path, "two"))
    assert curve(tmp_path, "one") == curve(tmp_path, "two")
    assert not torch.are_deterministic_algorithms_enabled(), "the caller's setting must come back"


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    for seed in (1, 2):
        run(tmp_path, corpus, f"seed{seed}", config={"seed": seed, "steps": 1})
    assert curve(tmp_path, "seed1") != curve(tmp_path, "seed2")


@BOTH
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_micro_batches_equal_one_big_batch(tmp_path: Path, sparse: bool, micro: int) -> None:
    corpus, settings = text_corpus(tmp_path), {"batch_tokens": 8 * CONTEXT, "steps": 4, "eval_every": 0}
    options: dict[str, Any] = {"sparse": sparse, "dtype": torch.float64}
    run(tmp_path, corpus, "whole", config=settings, **options)
    run(tmp_path, corpus, "parts", config={**settings, "micro_batch_tokens": micro * CONTEXT + 1}, **options)
    for whole, part in zip(steps(tmp_path, "whole"), steps(tmp_path, "parts"), strict=True):
        # Logits are float32 whatever the weights' dtype.
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert part["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_micro_batches_are_as_large_as_allowed_and_cover_the_step_once(tmp_path: Path) -> None:
    plan = batches.plan_batches(model_config(), train_config(batch_tokens=8 * CONTEXT, micro_batch_tokens=3 * CONTEXT))
    parts = list(
        batches.training_batches(
            text_corpus(tmp_path).train, plan, seed=1, step=1, context=CONTEXT, device=torch.device("cpu")
        )
    )
    assert [len(part.inputs) for part in parts] == [3, 3, 2]
    assert sum(part.share for part in parts) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"batch_tokens": 100}, "--batch-tokens 100"),
        ({"batch_tokens": 8}, "--batch-tokens 8"),
        ({"micro_batch_tokens": 31}, "--micro-batch-tokens 31"),
    ],
)
def test_a_token_budget_that_holds_no_whole_windows_is_refused_by_flag(tmp_path: Path, fields: Any, flag: str) -> None:
    with pytest.raises(NsaError, match=flag) as caught:
        run(tmp_path, text_corpus(tmp_path), config=fields)
    assert caught.value.exit_code == ExitCode.USAGE
    assert not list(tmp_path.glob("ckpt*"))


def test_validation_is_the_same_every_time_and_leaves_no_trace_in_training(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    options: dict[str, Any] = {"model": {"dropout": 0.2}}
    run(tmp_path, corpus, "frozen", config={"lr": 0.0, "eval_every": 1}, **options)
    assert len({line["val_loss"] for line in steps(tmp_path, "frozen")}) == 1
    run(tmp_path, corpus, "often", config={"eval_every": 1}, **options)
    run(tmp_path, corpus, "never", config={"eval_every": 0}, **options)
    assert same_tensors(weights(tmp_path, "often"), weights(tmp_path, "never"))
    assert not any("val_loss" in line for line in steps(tmp_path, "never"))
    assert not (tmp_path / "never.best.safetensors").exists()


def test_the_validation_loss_is_the_models_own_on_the_held_out_windows(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, sparse=True, config={"eval_tokens": 10**6, "batch_tokens": 3 * CONTEXT})
    model, _ = load_checkpoint(tmp_path / "ckpt.safetensors")
    count = (len(corpus.val) - 1) // CONTEXT
    ids = torch.from_numpy(corpus.val[: count * CONTEXT + 1].astype("int64"))
    inputs, targets = ids[:-1].view(count, CONTEXT), ids[1:].view(count, CONTEXT)
    with torch.no_grad():
        assert steps(tmp_path)[-1]["val_loss"] == pytest.approx(float(model(inputs, targets)), rel=1e-5)


def test_data_without_a_held_out_tail_is_trained_on_without_validation(tmp_path: Path) -> None:
    result = run(tmp_path, text_corpus(tmp_path, val_fraction=0.0), config={"val_fraction": 0.0})
    assert result.best_val_loss is None
    assert not (tmp_path / "ckpt.best.safetensors").exists()


def test_best_holds_the_lowest_validation_and_nan_is_never_best(tmp_path: Path, monkeypatch: Any) -> None:
    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        validation = (call + 1) // 2  # two batches each
        return None if training else loss.new_tensor([math.nan, 3.0, 2.0, math.nan, 2.5][validation - 1])

    hook_losses(monkeypatch, change)
    result = run(tmp_path, text_corpus(tmp_path), config={"eval_every": 2, "steps": 10, "save_every": 0})
    assert [line["val_loss"] for line in steps(tmp_path) if "val_loss" in line] == [None, 3.0, 2.0, None, 2.5]
    assert (result.best_val_loss, result.best_step, result.val_loss) == (2.0, 6, 2.5)
    assert read_info(tmp_path / "ckpt.best.safetensors").step == 6
    assert read_info(tmp_path / "ckpt.best.safetensors").metadata["val_loss"] == 2.0
    assert read_info(tmp_path / "ckpt.safetensors").step == 10


def test_the_state_is_written_before_the_weights_that_it_can_restore(tmp_path: Path, monkeypatch: Any) -> None:
    written = []
    for name in ("save_state", "save_checkpoint"):
        real = getattr(saving, name)

        def noted(path: Path, *args: Any, real: Any = real, **kwargs: Any) -> None:
            written.append(path.name)
            real(path, *args, **kwargs)

        monkeypatch.setattr(saving, name, noted)
    run(tmp_path, text_corpus(tmp_path), config={"save_every": 6, "eval_every": 12})
    state, last, best = "ckpt.state.safetensors", "ckpt.safetensors", "ckpt.best.safetensors"
    assert written == [state, state, last, state, last, best]


def test_the_checkpoint_carries_the_run_and_loads_into_a_model(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, sparse=True)
    model, info = load_checkpoint(tmp_path / "ckpt.safetensors")
    assert (info.step, info.config) == (12, model_config(True))
    assert info.metadata["fingerprint"] == corpus.fingerprint
    assert info.metadata["train"] == train_config().to_dict()
    assert model(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 256)


def test_an_existing_checkpoint_is_refused_with_exit_2_and_kept(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NsaError, match="exists") as caught:
        run(tmp_path, corpus)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--resume" in caught.value.hint
    assert "--overwrite" in caught.value.hint
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_replaces_every_file_of_the_earlier_run(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    run(tmp_path, corpus, overwrite=True, config={"steps": 3, "eval_every": 0, "seed": 5})
    assert read_info(tmp_path / "ckpt.safetensors").step == 3
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "ckpt.best.safetensors").exists(), "the best weights were another run's"


def test_a_folder_for_the_checkpoint_is_made(tmp_path: Path) -> None:
    run(tmp_path, text_corpus(tmp_path), paths=RunPaths.beside(tmp_path / "new" / "model"), config={"steps": 2})
    names = {"model", "model.best.safetensors", "model.state.safetensors", "model.metrics.jsonl"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names


def test_a_single_non_finite_loss_is_skipped_counted_and_survived(tmp_path: Path, monkeypatch: Any) -> None:
    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        return loss * math.nan if training and call == 3 else None

    hook_losses(monkeypatch, change)
    result = run(tmp_path, text_corpus(tmp_path), config={"steps": 5})
    assert [line["loss"] is None for line in steps(tmp_path)] == [False, False, True, False, False]
    assert [line["skipped"] for line in steps(tmp_path)] == [0, 0, 1, 1, 1]
    assert result.skipped == 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path).values())


def test_ten_non_finite_steps_in_a_row_end_with_exit_4_and_keep_the_files(tmp_path: Path, monkeypatch: Any) -> None:
    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        return loss * math.inf if training and call > 6 else None

    hook_losses(monkeypatch, change)
    with pytest.raises(NsaError, match="steps 7 to 16") as caught:
        run(tmp_path, text_corpus(tmp_path), config={"steps": 40, "eval_every": 0, "save_every": 6, "log_every": 100})
    assert caught.value.exit_code == ExitCode.DIVERGED
    assert "--lr" in caught.value.hint
    assert read_info(tmp_path / "ckpt.safetensors").step == 12
    tensors, _ = load_state(tmp_path / "ckpt.state.safetensors")
    assert float(tensors["optimizer.norm.weight.step"]) == 6.0, "no update after the sixth"


def test_a_learning_rate_far_too_high_ends_as_diverged(tmp_path: Path) -> None:
    with pytest.raises(NsaError, match="diverged") as caught:
        run(tmp_path, text_corpus(tmp_path), config={"lr": 1e30, "steps": 40, "warmup": 0, "weight_decay": 100.0})
    assert caught.value.exit_code == ExitCode.DIVERGED


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_names_the_flag_that_helps(tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        raise error

    hook_losses(monkeypatch, change)
    with pytest.raises(NsaError, match=f"--micro-batch-tokens {4 * CONTEXT}") as caught:
        run(tmp_path, text_corpus(tmp_path))
    assert caught.value.exit_code == ExitCode.FAILURE
    assert caught.value.hint == f"try --micro-batch-tokens {2 * CONTEXT}"


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        raise RuntimeError("a bug")

    hook_losses(monkeypatch, change)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, text_corpus(tmp_path))


@BOTH
def test_bfloat16_arithmetic_keeps_float32_weights_and_moments(tmp_path: Path, sparse: bool) -> None:
    run(tmp_path, text_corpus(tmp_path), sparse=sparse, dtype=torch.bfloat16, config={"steps": 3})
    tensors, _ = load_state(tmp_path / "ckpt.state.safetensors")
    kept = [tensor.dtype for name, tensor in tensors.items() if name.startswith(("model.", "optimizer."))]
    assert set(kept) == {torch.float32}
    assert records(tmp_path)[0]["dtype"] == "bfloat16"


def test_float16_and_a_foreign_vocabulary_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16"):
        run(tmp_path, text_corpus(tmp_path), dtype=torch.float16)
    with pytest.raises(ValueError, match="vocab_size = 300"):
        run(tmp_path, text_corpus(tmp_path), model={"vocab_size": 300})
    assert not list(tmp_path.glob("ckpt*"))


def test_the_sampler_hook_sees_each_validated_step_and_disturbs_nothing(tmp_path: Path) -> None:
    corpus, seen = text_corpus(tmp_path), []

    def hook(model: torch.nn.Module, step: int, should_stop: Any) -> None:
        seen.append((step, model.training, torch.is_grad_enabled()))
        torch.rand(5)

    run(tmp_path, corpus, "with", model={"dropout": 0.1}, sampler_hook=hook)
    run(tmp_path, corpus, "without", model={"dropout": 0.1})
    assert seen == [(5, False, False), (10, False, False), (12, False, False)]
    assert same_tensors(weights(tmp_path, "with"), weights(tmp_path, "without"))
