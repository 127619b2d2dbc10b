"""A resumed run is the uninterrupted one, to the bit on a CPU, or it is refused with what changed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsa_cli.checkpoint import load_state, read_info, save_checkpoint, save_state
from nsa_cli.config import NSAConfig
from nsa_cli.data import Corpus
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training import RunPaths, run_settings, saving
from nsa_cli.training.metrics import MetricsLog
from tests.training_runs import (
    GEOMETRY,
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
DROPOUT = {"dropout": 0.1}


class Killed(Exception):
    """Stands for a process that ends between two lines of the metrics."""


def stopping(at: int, how: Any) -> Told:
    def act(line: dict[str, Any]) -> None:
        if line["step"] == at:
            how()

    return Told(act)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    raise Killed


def interrupted_run(folder: Path, corpus: Corpus, at: int = 7, **options: Any) -> None:
    result = run(folder, corpus, reporter=stopping(at, interrupt), **options)
    assert (result.status, result.step, result.signal) == ("interrupted", at, signal.SIGINT)


def ckpt(folder: Path, name: str = "ckpt") -> Path:
    return folder / f"{name}.safetensors"


def assert_same_run(folder: Path, a: str, b: str) -> None:
    assert curve(folder, a) == curve(folder, b)
    assert same_tensors(weights(folder, a), weights(folder, b))
    assert same_tensors(weights(folder, f"{a}.best"), weights(folder, f"{b}.best"))
    assert same_tensors(weights(folder, f"{a}.state"), weights(folder, f"{b}.state"))


@BOTH
@pytest.mark.parametrize("at", [1, 5, 7, 8])
def test_an_interrupted_run_goes_on_to_the_bits_of_an_uninterrupted_one(tmp_path: Path, sparse: bool, at: int) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole", sparse=sparse, model=DROPOUT)
    interrupted_run(tmp_path, corpus, at, sparse=sparse, model=DROPOUT)
    result = run(tmp_path, corpus, sparse=sparse, model=DROPOUT, resume=ckpt(tmp_path))
    assert (result.status, result.step) == ("finished", 12)
    assert_same_run(tmp_path, "ckpt", "whole")


@BOTH
def test_a_killed_run_goes_on_from_its_last_saved_state(tmp_path: Path, sparse: bool) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole", sparse=sparse, model=DROPOUT)
    with pytest.raises(Killed):
        run(tmp_path, corpus, sparse=sparse, model=DROPOUT, reporter=stopping(11, kill))
    with (tmp_path / "ckpt.metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    assert steps_in(tmp_path)[-2:] == [10, 11]
    told = Told()
    run(tmp_path, corpus, sparse=sparse, model=DROPOUT, resume=ckpt(tmp_path), reporter=told)
    assert told.started[0]["from_step"] == 10
    assert [line["step"] for line in told.lines] == [11, 12]
    assert_same_run(tmp_path, "ckpt", "whole")


def steps_in(folder: Path, name: str = "ckpt") -> list[int]:
    """Step numbers of the whole lines of a metrics file that may end in half a line."""
    found = []
    for line in (folder / f"{name}.metrics.jsonl").read_text().splitlines():
        if line.endswith("}") and "step" in json.loads(line):
            found.append(json.loads(line)["step"])
    return found


def test_an_interruption_during_validation_is_made_up_by_the_resumed_run(tmp_path: Path, monkeypatch: Any) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole", sparse=True, model=DROPOUT)

    def change(call: int, training: bool, loss: Tensor) -> Tensor | None:
        if not training and call == 3:  # the first of two batches at step 10
            interrupt()
        return None

    with monkeypatch.context() as patch:
        hook_losses(patch, change)
        result = run(tmp_path, corpus, sparse=True, model=DROPOUT)
    assert (result.status, result.step) == ("interrupted", 10)
    assert steps_in(tmp_path)[-1] == 9
    run(tmp_path, corpus, sparse=True, model=DROPOUT, resume=ckpt(tmp_path))
    assert_same_run(tmp_path, "ckpt", "whole")


def test_an_interruption_in_the_last_validation_is_not_a_finished_run(tmp_path: Path, monkeypatch: Any) -> None:
    corpus = text_corpus(tmp_path)
    with monkeypatch.context() as patch:
        hook_losses(patch, lambda call, training, loss: None if training else interrupt())
        result = run(tmp_path, corpus, config={"steps": 4, "eval_every": 4})
    assert (result.status, result.step, result.best_val_loss) == ("interrupted", 4, None)
    result = run(tmp_path, corpus, config={"steps": 4, "eval_every": 4}, resume=ckpt(tmp_path))
    assert (result.status, result.best_step) == ("finished", 4)
    assert "val_loss" in steps(tmp_path)[-1]
    assert read_info(tmp_path / "ckpt.best.safetensors").step == 4


def test_the_metrics_say_where_a_run_was_resumed(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus)
    run(tmp_path, corpus, resume=ckpt(tmp_path), notices=["on another machine"])
    kinds = [record.get("event", record.get("step")) for record in records(tmp_path)]
    assert kinds == ["start", *range(1, 8), "resume", *range(8, 13)]
    resumed = records(tmp_path)[8]
    assert (resumed["from_step"], resumed["notices"], resumed["kernel"]) == (7, ["on another machine"], "torch")
    elapsed = [line["elapsed_s"] for line in steps(tmp_path)]
    assert elapsed == sorted(elapsed), "time goes on where it stopped"


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    told = Told()
    result = run(tmp_path, corpus, resume=ckpt(tmp_path), reporter=told)
    assert (result.status, result.step) == ("finished", 12)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert "nothing to do" in told.notices[-1]


@pytest.mark.parametrize("given", ["ckpt.safetensors", "ckpt.state.safetensors"])
def test_either_file_names_the_run_even_when_the_weights_are_lost(tmp_path: Path, given: str) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole")
    interrupted_run(tmp_path, corpus)
    ckpt(tmp_path).unlink()
    run(tmp_path, corpus, resume=tmp_path / given)
    assert_same_run(tmp_path, "ckpt", "whole")


def test_weights_that_were_not_written_after_the_state_are_restored(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    last, best = weights(tmp_path), weights(tmp_path, "ckpt.best")
    ckpt(tmp_path).unlink()
    (tmp_path / "ckpt.best.safetensors").unlink()
    told = Told()
    run(tmp_path, corpus, resume=ckpt(tmp_path), reporter=told)
    assert same_tensors(weights(tmp_path), last)
    assert same_tensors(weights(tmp_path, "ckpt.best"), best)
    assert sum("restored" in text for text in told.notices) == 2


def test_a_run_resumed_under_another_name_takes_its_history_along_and_leaves_the_old_one(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole")
    interrupted_run(tmp_path, corpus)
    before = {path: path.read_bytes() for path in tmp_path.glob("ckpt.*")}
    run(tmp_path, corpus, "moved", resume=ckpt(tmp_path))
    assert_same_run(tmp_path, "moved", "whole")
    assert {path: path.read_bytes() for path in tmp_path.glob("ckpt.*")} == before


def test_a_run_moved_over_another_one_replaces_all_of_it(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    run(tmp_path, corpus, "other", config={"seed": 3})
    assert not same_tensors(weights(tmp_path), weights(tmp_path, "other"))
    result = run(tmp_path, corpus, "other", resume=ckpt(tmp_path), overwrite=True)
    assert (result.status, result.step) == ("finished", 12)
    assert_same_run(tmp_path, "other", "ckpt")


def test_resuming_into_another_runs_files_is_refused_with_exit_2(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "other")
    interrupted_run(tmp_path, corpus)
    with pytest.raises(NsaError, match="exists") as caught:
        run(tmp_path, corpus, "other", resume=ckpt(tmp_path))
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"config": {"batch_tokens": 64}}, "--batch-tokens was 128, is 64"),
        ({"config": {"seed": 2}}, "--seed was 1337, is 2"),
        ({"config": {"weight_decay": 0.0}}, "--weight-decay was 0.1, is 0.0"),
        ({"config": {"lr": 1e-4}}, "--lr was 0.003, is 0.0001"),
        ({"config": {"steps": 40}}, "--steps was 12, is 40"),
        ({"config": {"steps": 3}}, "--steps was 12, is 3"),
        ({"config": {"schedule": "linear"}}, "--schedule was cosine, is linear"),
        ({"config": {"val_fraction": 0.2}}, "--val-fraction was 0.1, is 0.2"),
        ({"model": {"depth": 3}}, "--depth was 2, is 3"),
        ({"model": {"dropout": 0.5}}, "--dropout was 0.0, is 0.5"),
        ({"sparse": False}, "the model was sparse, is dense"),
        ({"model": {"nsa": NSAConfig(**{**vars(GEOMETRY), "window": 9})}}, "--window was 8, is 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_setting_is_refused_by_name_with_exit_3(tmp_path: Path, options: Any, named: str) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus, sparse=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("ckpt*")}
    with pytest.raises(NsaError, match=named) as caught:
        run(tmp_path, corpus, resume=ckpt(tmp_path), **{"sparse": True, **options})
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.message.count(" was ") == 1, "only what changed is named"
    assert {path: path.read_bytes() for path in tmp_path.glob("ckpt*")} == before


def test_changed_data_is_refused(tmp_path: Path) -> None:
    interrupted_run(tmp_path, text_corpus(tmp_path))
    with pytest.raises(NsaError, match="the data was") as caught:
        run(tmp_path, text_corpus(tmp_path, "another text. "), resume=ckpt(tmp_path))
    assert caught.value.exit_code == ExitCode.BAD_INPUT


@pytest.mark.parametrize(
    ("settings", "longer"),
    [({"schedule": "constant"}, {"steps": 16}), ({"schedule": "wsd", "decay_ratio": 0.25}, {"steps": 20})],
    ids=["constant", "wsd before its decay"],
)
def test_a_run_can_be_made_longer_if_its_past_learning_rates_stay_the_same(
    tmp_path: Path, settings: dict[str, Any], longer: dict[str, Any]
) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole", config={**settings, **longer})
    interrupted_run(tmp_path, corpus, config=settings)
    result = run(tmp_path, corpus, config={**settings, **longer}, resume=ckpt(tmp_path))
    assert result.step == longer["steps"]
    assert_same_run(tmp_path, "ckpt", "whole")


def test_cadence_and_micro_batches_may_change(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus)
    changed = {"log_every": 5, "eval_every": 0, "save_every": 0, "micro_batch_tokens": 64}
    result = run(tmp_path, corpus, resume=ckpt(tmp_path), config=changed)
    assert result.status == "finished"
    assert [line["step"] for line in steps(tmp_path)] == [*range(1, 8), 10, 12]


def test_skipped_updates_are_remembered(tmp_path: Path, monkeypatch: Any) -> None:
    corpus = text_corpus(tmp_path)
    with monkeypatch.context() as patch:
        hook_losses(patch, lambda call, training, loss: loss * float("nan") if training and call == 2 else None)
        interrupted_run(tmp_path, corpus)
    assert run(tmp_path, corpus, resume=ckpt(tmp_path)).skipped == 1


def test_the_settings_of_a_run_can_be_read_back(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, sparse=True, config={"steps": 3, "beta2": 0.9})
    expected = (model_config(True), train_config(steps=3, beta2=0.9))
    assert run_settings(ckpt(tmp_path)) == expected
    ckpt(tmp_path).unlink()
    assert run_settings(tmp_path / "ckpt.state.safetensors") == expected


def test_a_run_without_its_state_file_is_refused_with_exit_3(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    for given in ("nowhere.safetensors", "ckpt.best.safetensors"):
        with pytest.raises(NsaError, match=r"no .*\.state\.safetensors beside it") as caught:
            run(tmp_path, corpus, resume=tmp_path / given)
        assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_damaged_states_are_refused_with_exit_3(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus)
    state = tmp_path / "ckpt.state.safetensors"
    whole = state.read_bytes()
    tensors, meta = load_state(state)

    def refused(reason: str) -> None:
        with pytest.raises(NsaError, match=reason) as caught:
            run(tmp_path, corpus, resume=ckpt(tmp_path))
        assert caught.value.exit_code == ExitCode.BAD_INPUT

    state.write_bytes(whole[:-100])
    refused("damaged")
    save_file(load_file(ckpt(tmp_path)), state)
    refused("not one of nsa's")
    save_state(state, tensors, {key: value for key, value in meta.items() if key != "fingerprint"})
    refused("without 'fingerprint'")
    save_state(state, {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, meta)
    refused("does not fit the model")
    save_state(state, {name: tensor for name, tensor in tensors.items() if name != "rng.cpu"}, meta)
    refused("does not fit the model")


@pytest.mark.parametrize(
    "wrong",
    [
        {"train": {"foo": 1}},
        {"train": 5},
        {"train": {"steps": -1}},
        {"train": {"steps": "x"}},
        {"model": 5},
        {"model": {"dim": "wide"}},
        {"step": "abc"},
        {"step": -1},
        {"step": True},
        {"elapsed_s": "abc"},
        {"best_val_loss": "abc"},
        {"best_step": "abc"},
        {"pending": 3},
        {"pending": {"foo": 1}},
        {"tokenizer": []},
        {"fingerprint": 1},
    ],
    ids=str,
)
def test_a_state_whose_metadata_was_tampered_with_is_refused_in_one_line_with_exit_3(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, config={"steps": 1, "eval_every": 0})
    state = tmp_path / "ckpt.state.safetensors"
    tensors, meta = load_state(state)
    save_state(state, tensors, {**meta, **wrong})
    for read in (lambda: run_settings(state), lambda: run(tmp_path, corpus, resume=ckpt(tmp_path))):
        with pytest.raises(NsaError, match=r"ckpt\.state\.safetensors is damaged") as caught:
            read()
        assert caught.value.exit_code == ExitCode.BAD_INPUT
        assert "\n" not in caught.value.message


def test_weights_whose_metadata_was_tampered_with_are_written_anew_from_the_state(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    last = weights(tmp_path)
    save_checkpoint(ckpt(tmp_path), last, config=model_config(), step=12, extra={"train": {"foo": 1}})
    told = Told()
    assert run_settings(ckpt(tmp_path)) == (model_config(), train_config())
    run(tmp_path, corpus, resume=ckpt(tmp_path), reporter=told)
    assert same_tensors(weights(tmp_path), last)
    assert any("restored" in text for text in told.notices)


def test_a_run_killed_before_its_first_save_goes_on_from_step_0(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole", model=DROPOUT)
    with pytest.raises(Killed):
        run(tmp_path, corpus, model=DROPOUT, reporter=stopping(3, kill))
    told = Told()
    run(tmp_path, corpus, model=DROPOUT, resume=ckpt(tmp_path), reporter=told)
    assert told.started[0]["from_step"] == 0
    assert_same_run(tmp_path, "ckpt", "whole")


def test_a_run_killed_while_it_replaced_another_goes_on_as_itself(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    new = {"seed": 3, "eval_every": 4}
    run(tmp_path, corpus, "whole", config=new)
    run(tmp_path, corpus)
    with pytest.raises(Killed):
        run(tmp_path, corpus, overwrite=True, config=new, reporter=stopping(3, kill))
    assert run_settings(ckpt(tmp_path)) == (model_config(), train_config(**new))
    run(tmp_path, corpus, config=new, resume=ckpt(tmp_path))
    assert_same_run(tmp_path, "ckpt", "whole")
    assert records(tmp_path)[0]["train"]["seed"] == 3


def test_a_run_killed_before_it_began_its_metrics_does_not_take_an_earlier_runs(tmp_path: Path, monkeypatch: Any) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus)
    before = (tmp_path / "ckpt.metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "start", lambda *arguments: kill())
        with pytest.raises(Killed):
            run(tmp_path, corpus, overwrite=True, config={"seed": 3})
    assert (tmp_path / "ckpt.metrics.jsonl").read_bytes() == before
    run(tmp_path, corpus, config={"seed": 3}, resume=ckpt(tmp_path))
    assert [record["train"]["seed"] for record in records(tmp_path) if "event" in record] == [3, 3]


def test_weights_of_a_replaced_run_at_the_same_step_are_not_taken_for_the_new_ones(tmp_path: Path, monkeypatch: Any) -> None:
    corpus = text_corpus(tmp_path)
    new = {"seed": 3, "save_every": 5}
    run(tmp_path, corpus, "whole", config=new)
    interrupted_run(tmp_path, corpus, at=5)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", lambda *arguments, **options: kill())
        with pytest.raises(Killed):
            run(tmp_path, corpus, overwrite=True, config=new)
    assert read_info(ckpt(tmp_path)).step == 5
    run(tmp_path, corpus, config=new, resume=ckpt(tmp_path), reporter=stopping(6, interrupt))
    best = load_state(tmp_path / "ckpt.state.safetensors")[1]["best_val_loss"]
    assert read_info(tmp_path / "ckpt.best.safetensors").metadata["val_loss"] == best
    run(tmp_path, corpus, config=new, resume=ckpt(tmp_path))
    assert_same_run(tmp_path, "ckpt", "whole")


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_reader_that_goes_away_costs_no_step(tmp_path: Path, at: int) -> None:
    def gone() -> None:
        raise BrokenPipeError

    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "whole")
    with pytest.raises(BrokenPipeError):
        run(tmp_path, corpus, reporter=stopping(at, gone))
    assert read_info(ckpt(tmp_path)).step == at
    told = Told()
    run(tmp_path, corpus, resume=ckpt(tmp_path), reporter=told)
    assert told.started[0]["from_step"] == at
    assert_same_run(tmp_path, "ckpt", "whole")


def test_the_files_of_a_run_are_named_after_its_checkpoint() -> None:
    paths = RunPaths.beside(Path("runs/a.safetensors"))
    names = [path.name for path in (paths.last, paths.best, paths.state, paths.metrics)]
    assert names == ["a.safetensors", "a.best.safetensors", "a.state.safetensors", "a.metrics.jsonl"]
    assert RunPaths.beside(Path("model.v2")).state == Path("model.v2.state.safetensors")
    assert RunPaths.of_run(Path("runs/a.state.safetensors")) == paths
