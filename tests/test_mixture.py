"""DATA with weights: windows come up as often as asked, the same ones every time, and every source is validated on its tail."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa_cli.checkpoint import load_checkpoint
from nsa_cli.cli.app import run as command
from nsa_cli.data import ByteTokenizer, Corpus, Mixture, load_corpus, step_draws
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training.signals import Interruption
from nsa_cli.training.validation import validation_loss
from tests.training_runs import CONTEXT, curve, records, run, same_tensors, steps, weights

SMALL = "--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --steps 1 --device cpu"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.txt, b.txt (of one letter each) and a folder c of two files."""
    monkeypatch.chdir(tmp_path)
    Path("c").mkdir()
    for name, size in {"a.txt": 4000, "b.txt": 1000, "c/1.txt": 700, "c/2.txt": 300}.items():
        Path(name).write_text(name[0] * size)
    return tmp_path


def load(*sources: str, **options: Any) -> Corpus:
    settings: dict[str, Any] = {"val_fraction": 0.25, "context": CONTEXT, **options}
    return load_corpus(sources, ByteTokenizer(), **settings)


def refused(*sources: str) -> str:
    with pytest.raises(NsaError) as caught:
        load(*sources)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.hint
    return caught.value.message


def letters(corpus: Corpus, count: int = 4000) -> dict[str, float]:
    """The share of training windows of each letter."""
    source = corpus.training
    assert isinstance(source, Mixture)
    inputs = source.windows(step_draws(seed=1, step=1, count=count), context=CONTEXT).inputs
    of_windows = inputs.max(axis=1)
    assert ((inputs == of_windows[:, None]) | (inputs == ord("\n"))).all(), "a window is of one source"
    return {name: float((of_windows == ord(name)).mean()) for name in "abc"}


def test_windows_come_up_by_weight_whatever_the_sizes(here: Path) -> None:
    shares = letters(load("a.txt@0.2", "b.txt@.5", "c@3e-1"))
    assert shares == pytest.approx({"a": 0.2, "b": 0.5, "c": 0.3}, abs=0.03)
    assert letters(load("a.txt@1", "[b]*@3", "c@4")) == pytest.approx({"a": 1 / 8, "b": 3 / 8, "c": 0.5}, abs=0.03)
    assert letters(load("-@1", "b.txt@1", stdin=io.BytesIO(b"a" * 500)))["a"] == pytest.approx(0.5, abs=0.03)


def test_a_window_depends_on_its_own_draw_alone(here: Path) -> None:
    source = load("a.txt@0.5", "b.txt@0.2", "c@0.3").training
    assert isinstance(source, Mixture)
    draws = step_draws(seed=3, step=7, count=40)
    whole = source.windows(draws, context=CONTEXT)
    part = source.windows(draws[13:20], context=CONTEXT)
    for one, other in zip(whole[:3], part[:3], strict=True):
        assert one is not None
        np.testing.assert_array_equal(one[13:20], other)


def test_where_a_window_begins_does_not_show_which_source_it_is_of(here: Path) -> None:
    Path("a.txt").write_bytes(bytes(range(128)) * 8)
    Path("b.txt").write_bytes(bytes(range(128, 256)) * 8)
    source = load("a.txt@1", "b.txt@1", val_fraction=0.0).training
    assert isinstance(source, Mixture)
    first = source.windows(step_draws(seed=5, step=5, count=20_000), context=CONTEXT).inputs[:, 0]
    counts = np.bincount(first, minlength=256)
    expected = len(first) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350, "255 degrees of freedom; fixed seed, so no chance is left"


def test_every_source_holds_out_its_own_tail_and_gets_its_share_of_a_validation(here: Path) -> None:
    corpus = load("a.txt@0.2", "b.txt@0.8")
    assert (len(corpus.train), len(corpus.val)) == (3750, 1250)
    assert corpus.weights == {"a.txt": 0.2, "b.txt": 0.8}
    assert isinstance(corpus.validation, Mixture)
    windows = list(corpus.validation.fixed_windows(context=CONTEXT, max_tokens=5 * CONTEXT))
    assert [(window.source, chr(window.inputs[0, 0])) for window in windows] == [("a.txt", "a")] + [("b.txt", "b")] * 4


def test_the_loss_of_a_mixture_is_that_of_its_sources_by_weight(here: Path) -> None:
    corpus = load("a.txt@1", "b.txt@3")
    told = run(here, corpus, config={"steps": 4, "eval_every": 2, "eval_tokens": 10**6})
    line = steps(here)[-1]
    parts = line["val_losses"]
    assert parts.keys() == {"a.txt", "b.txt"}
    assert line["val_loss"] == pytest.approx(0.25 * parts["a.txt"] + 0.75 * parts["b.txt"])
    assert told.val_loss == line["val_loss"]
    model, _ = load_checkpoint(here / "ckpt.safetensors")
    for name in ("a", "b"):
        alone = load(f"{name}.txt")
        assert isinstance(alone.val, np.ndarray)
        expected = single_loss(model, alone)
        assert parts[f"{name}.txt"] == pytest.approx(expected, rel=1e-5)


def single_loss(model: Any, corpus: Corpus) -> float:
    from contextlib import nullcontext

    import torch

    from nsa_cli.training.batches import BatchPlan, validation_batches

    batches = validation_batches(
        corpus.validation, BatchPlan(4, 4), context=CONTEXT, max_tokens=10**6, device=torch.device("cpu")
    )
    with torch.no_grad():
        found = validation_loss(
            model, batches, autocast=nullcontext, interruption=Interruption(), weights=corpus.weights
        )
    assert found is not None
    assert (found.losses, found.accuracies, found.accuracy) == ({}, {}, None)
    return found.loss


def test_a_resumed_run_on_a_mixture_continues_to_the_same_bits(here: Path) -> None:
    sources = ("a.txt@0.5", "b.txt@0.2", "c@0.3")
    config = {"schedule": "constant", "eval_every": 2}
    run(here, load(*sources), "whole", config={**config, "steps": 6})
    run(here, load(*sources), "parts", config={**config, "steps": 4})
    run(here, load(*sources), "parts", config={**config, "steps": 6}, resume=here / "parts.safetensors")
    assert same_tensors(weights(here, "whole"), weights(here, "parts"))
    assert curve(here, "whole") == curve(here, "parts")


def test_other_weights_are_other_data(here: Path) -> None:
    one, same, other = (load(f"a.txt@{weight}", "b.txt@1").fingerprint for weight in ("0.5", ".50", "0.6"))
    assert one == same != other
    assert load("a.txt@0.5").fingerprint == load("a.txt").fingerprint


def test_a_file_that_is_really_called_so_is_that_file(here: Path) -> None:
    Path("a.txt@0.5").write_text("x" * 200)
    corpus = load("a.txt@0.5")
    assert bytes(corpus.train)[:1] == b"x"
    assert load("a.txt@0.50").sources == ["a.txt"]
    Path("who@where.txt").write_text("y" * 200)
    assert load("who@where.txt").sources == ["who@where.txt"]


def test_weights_that_cannot_be_are_named(here: Path) -> None:
    assert refused("a.txt@0.5", "b.txt") == "b.txt has no weight, and other DATA has"
    assert "a.txt@0: the weight 0 is not above 0" in refused("a.txt@0", "b.txt@1")
    assert "a.txt@-1: the weight -1 is not above 0" in refused("a.txt@-1")
    assert "the weight 1e999 is not above 0 and finite" in refused("a.txt@1e999")
    assert "no such file or folder: none.txt" in refused("none.txt@0.5", "b.txt@0.5")
    assert "no such file or folder: a.txt@half" in refused("a.txt@half")
    assert refused("c@0.5", "c/1.txt@0.5") == "c/1.txt names only files that other DATA has named"
    Path("b.txt").write_text("short")
    assert "too little data: b.txt has 5 tokens" in refused("a.txt@0.5", "b.txt@0.5")


def test_the_command_line_takes_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"train a.txt@0.7 b.txt@0.3 {SMALL}".split()) == 0
    assert records(here)[0]["data"]["sources"] == ["a.txt", "b.txt"]
    assert steps(here)[-1]["val_losses"].keys() == {"a.txt", "b.txt"}
