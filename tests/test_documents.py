"""Documents kept apart: in the windows, in attention, in the loss, and through a resumed run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from nsa_cli.cli.app import run as command
from nsa_cli.data import NO_TARGET, ByteTokenizer, Documents, load_corpus
from nsa_cli.data.synthetic import make_synthetic
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from nsa_cli.training import batches
from tests.test_tokenizer import BPETokenizer, byte_level_spec
from tests.training_runs import (
    CONTEXT,
    curve,
    documents_corpus,
    model_config,
    run,
    same_tensors,
    steps,
    text_corpus,
    train_config,
    weights,
)

BOTH = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
CPU = torch.device("cpu")


@given(st.lists(st.integers(2, 30), min_size=2, max_size=20), st.integers(1, 20), st.data())
def test_a_window_says_where_documents_begin_and_never_predicts_across(sizes: list[int], context: int, data: Any) -> None:
    offsets = np.cumsum([0, *sizes])
    total = int(offsets[-1])
    context = min(context, total - 1)
    start = data.draw(st.integers(0, total - context - 1))
    of_token = np.searchsorted(offsets, np.arange(total), side="right")
    documents = Documents(np.arange(total, dtype=np.uint32), offsets, start, total)
    draws = np.array(data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)), dtype=np.uint64)
    inputs, targets, begins, *_ = documents.windows(draws, context=context)
    assert begins is not None
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == begins.shape == (len(draws), context)
    assert inputs.min() >= start
    np.testing.assert_array_equal(inputs[:, 0], start + draws % np.uint64(total - start - context))
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(context))
    crosses = of_token[inputs] != of_token[inputs + 1]
    np.testing.assert_array_equal(targets, np.where(crosses, NO_TARGET, inputs + 1))
    np.testing.assert_array_equal(begins[:, 1:], crosses[:, :-1])
    assert begins[:, 0].all()


def losses(model: Any, text: list[bytes], length: int) -> list[torch.Tensor]:
    """Each document's losses by token, all in one packed window of `length` tokens."""
    tokens = np.frombuffer(b"".join(text), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, text)])
    window = Documents(tokens, offsets, 0, len(tokens)).windows_at(np.array([0]), length)
    batch = batches._to_batch(window, slice(None), 1.0, CPU)
    assert batch.cu_seqlens is not None
    with torch.no_grad():
        logits = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
    each = F.cross_entropy(logits[0], batch.targets[0], ignore_index=NO_TARGET, reduction="none")
    return [each[start:stop] for start, stop in zip(offsets, [*offsets[1:-1], length], strict=False)]


@BOTH
def test_the_loss_of_a_document_does_not_depend_on_its_neighbours(sparse: bool) -> None:
    torch.manual_seed(3)
    model = build_model(model_config(sparse)).eval()
    middle = b"the middle one, which stays as it is."
    first, last = [b"one neighbour, ", middle, b"and another."], [b"SOMETHING ELSE ", middle, b"AND LONGER!!!!"]
    length = len(b"".join(first)) - 1
    here, there = losses(model, first, length)[1], losses(model, last, length)[1]
    assert torch.equal(here, there)
    assert here[-1] == 0, "the first token of the next document is nobody's target"
    alone = torch.tensor([list(middle)])
    with torch.no_grad():
        logits = model(alone[:, :-1])
    assert torch.allclose(here[:-1], F.cross_entropy(logits[0], alone[0, 1:], reduction="none"), atol=1e-5)


@BOTH
def test_packed_windows_have_the_mean_loss_of_their_documents(tmp_path: Path, sparse: bool) -> None:
    corpus = documents_corpus(tmp_path)
    model = build_model(model_config(sparse)).eval()
    plan = batches.BatchPlan(windows=6, micro=6)
    (batch,) = batches.training_batches(corpus.training, plan, seed=1, step=1, context=CONTEXT, device=CPU)
    assert batch.cu_seqlens is not None
    assert batch.inputs.shape == (1, 6 * CONTEXT)
    assert batch.cu_seqlens.dtype == torch.int32
    assert set(range(0, 6 * CONTEXT + 1, CONTEXT)) <= set(batch.cu_seqlens.tolist()), "windows are apart as well"
    total, count = 0.0, 0
    with torch.no_grad():
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            targets = batch.targets[:, start:stop]
            predicted = int((targets != NO_TARGET).sum())
            if predicted:
                total += float(model(batch.inputs[:, start:stop], targets)) * predicted
                count += predicted
        assert float(model(batch.inputs, batch.targets, batch.cu_seqlens)) == pytest.approx(total / count, rel=1e-5)


@BOTH
def test_accumulated_packed_micro_batches_equal_one_big_batch(tmp_path: Path, sparse: bool) -> None:
    corpus, settings = documents_corpus(tmp_path), {"batch_tokens": 8 * CONTEXT, "steps": 3, "eval_every": 0}
    options: dict[str, Any] = {"sparse": sparse, "dtype": torch.float64}
    run(tmp_path, corpus, "whole", config=settings, **options)
    run(tmp_path, corpus, "parts", config={**settings, "micro_batch_tokens": 3 * CONTEXT}, **options)
    for whole, part in zip(steps(tmp_path, "whole"), steps(tmp_path, "parts"), strict=True):
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert part["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@BOTH
def test_a_resumed_packed_run_continues_to_the_same_bits(tmp_path: Path, sparse: bool) -> None:
    corpus, config = documents_corpus(tmp_path), {"schedule": "constant", "eval_every": 2}
    run(tmp_path, corpus, "whole", sparse=sparse, config={**config, "steps": 6})
    run(tmp_path, corpus, "parts", sparse=sparse, config={**config, "steps": 4})
    resume = tmp_path / "parts.safetensors"
    run(tmp_path, documents_corpus(tmp_path), "parts", sparse=sparse, config={**config, "steps": 6}, resume=resume)
    assert same_tensors(weights(tmp_path, "whole"), weights(tmp_path, "parts"))
    assert curve(tmp_path, "whole") == curve(tmp_path, "parts")
    assert steps(tmp_path, "whole")[-1]["val_loss"] is not None


def test_one_document_is_trained_on_exactly_as_a_stream(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    assert corpus.training is corpus.train
    assert corpus.validation is corpus.val
    for packed in (True, False):
        run(tmp_path, corpus, f"pack{packed}", config={"pack": packed, "steps": 3})
    assert curve(tmp_path, "packTrue") == curve(tmp_path, "packFalse")


def test_windows_without_a_boundary_inside_are_rows_without_packing(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} " * 500)
    corpus = load_corpus([str(tmp_path)], ByteTokenizer(), val_fraction=0.0, context=CONTEXT)
    assert isinstance(corpus.training, Documents)
    plan = batches.BatchPlan(windows=2, micro=1)
    seen = set()
    for step in range(200):
        for batch in batches.training_batches(corpus.training, plan, seed=1, step=step, context=CONTEXT, device=CPU):
            assert batch.inputs.shape == (1, CONTEXT)
            seen.add(None if batch.cu_seqlens is None else len(batch.cu_seqlens))
    assert seen == {None, 3}


def test_files_and_lines_are_documents_and_no_pack_is_one_stream(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a file\n" * 3)
    lines = [json.dumps({"text": text}) for text in ("one", "two lines\nof it", "", "x")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.txt").write_text("y")
    packed, plain = (load_corpus([str(tmp_path)], ByteTokenizer(), val_fraction=0, context=2, pack=on) for on in (True, False))
    assert isinstance(packed.training, Documents)
    parts = [bytes(part) for part in np.split(packed.train, packed.training.offsets[1:-1])]
    # The last document is one token, which has nothing to predict, and stays with its neighbour.
    assert parts == [b"a file\n" * 3, b"one\n", b"two lines\nof it\n", b"x\ny"]
    assert bytes(plain.train) == b"".join(parts)
    assert plain.training is plain.train
    assert packed.fingerprint != plain.fingerprint
    (tmp_path / "all.txt").write_bytes(b"".join(parts))
    assert load_corpus([str(tmp_path / "all.txt")], ByteTokenizer(), val_fraction=0, context=1).fingerprint == plain.fingerprint


def test_no_token_of_a_vocabulary_reaches_into_the_next_document(tmp_path: Path) -> None:
    tokenizer = BPETokenizer(byte_level_spec())
    texts = ["The ferry left at", " noon. The ferry", " came back"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = load_corpus([str(file)], tokenizer, val_fraction=0, context=4)
    assert isinstance(corpus.training, Documents)
    parts = np.split(corpus.train, corpus.training.offsets[1:-1])
    assert [tokenizer.decode(part) for part in parts] == [b"The ferry left at\n", b" noon. The ferry\n", b" came back"]


def test_the_held_out_tail_keeps_its_documents_apart(tmp_path: Path) -> None:
    corpus = documents_corpus(tmp_path, val_fraction=0.3)
    train, val = corpus.training, corpus.validation
    assert isinstance(train, Documents)
    assert isinstance(val, Documents)
    assert (len(train), len(val)) == (len(corpus.train), len(corpus.val))
    windows = list(val.fixed_windows(context=CONTEXT, max_tokens=10**6))
    assert len(windows) == (len(val) - 1) // CONTEXT
    text = b"".join(bytes(window.inputs[0].astype(np.uint8)) for window in windows)
    assert bytes(corpus.val).startswith(text)
    assert any(window.begins is not None and window.begins[0, 1:].any() for window in windows)


def test_the_loss_of_a_packed_step_is_its_own_whatever_the_sampler_is_asked_before(tmp_path: Path) -> None:
    source = documents_corpus(tmp_path).training
    plan = batches.BatchPlan(windows=4, micro=2)

    def step(number: int) -> list[Any]:
        made = batches.training_batches(source, plan, seed=9, step=number, context=CONTEXT, device=CPU)
        return [tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in batch) for batch in made]

    third = step(3)
    assert step(4) != third
    assert step(3) == third
    assert sum(batch[2] for batch in third) == pytest.approx(1.0)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_replicas_share_a_step_and_a_validation_out(tmp_path: Path, replicas: int) -> None:
    corpus = documents_corpus(tmp_path)
    plan = batches.BatchPlan(windows=5, micro=2)
    options: dict[str, Any] = {"context": CONTEXT, "device": CPU}

    def rows(parts: list[batches.Batch]) -> list[list[int]]:
        return [row for part in parts if part.share for row in part.inputs.reshape(-1, CONTEXT).tolist()]

    def step(replica: int, count: int) -> list[batches.Batch]:
        return list(batches.training_batches(corpus.training, plan, seed=1, step=1, replica=replica, replicas=count, **options))

    def validation(replica: int, count: int) -> list[batches.Batch]:
        source = corpus.validation
        return list(batches.validation_batches(source, plan, max_tokens=10**6, replica=replica, replicas=count, **options))

    for share_out in (step, validation):
        shares = [share_out(replica, replicas) for replica in range(replicas)]
        assert len({len(share) for share in shares}) == 1, "each micro-batch may be a meeting of all"
        assert sorted(row for share in shares for row in rows(share)) == sorted(rows(share_out(0, 1)))
        assert all((part.targets != NO_TARGET).any() for share in shares for part in share)
    assert sum(part.share for replica in range(replicas) for part in step(replica, replicas)) == pytest.approx(1.0)


def test_the_windows_of_a_step_can_be_found_again_in_the_data(tmp_path: Path) -> None:
    packed, plan = documents_corpus(tmp_path), batches.BatchPlan(windows=5, micro=5)
    for corpus in (packed, documents_corpus(tmp_path, pack=False)):
        places = batches.window_places(corpus.training, plan, seed=1, step=3, context=CONTEXT)
        (batch,) = batches.training_batches(corpus.training, plan, seed=1, step=3, context=CONTEXT, device=CPU)
        assert isinstance(corpus.train, np.ndarray)
        found = [corpus.train[place : place + CONTEXT].tolist() for place in places if isinstance(place, int)]
        assert found == batch.inputs.reshape(-1, CONTEXT).tolist()
    (tmp_path / "a.txt").write_text("a" * 500)
    names = [f"{tmp_path}/a.txt@0.5", f"{tmp_path}/text.jsonl@0.3", "synthetic:mqar,pairs=2@0.2"]
    mixed = load_corpus(names, ByteTokenizer(), val_fraction=0.2, context=CONTEXT)
    plan = batches.BatchPlan(windows=40, micro=40)
    places = batches.window_places(mixed.training, plan, seed=1, step=3, context=CONTEXT)
    (batch,) = batches.training_batches(mixed.training, plan, seed=1, step=3, context=CONTEXT, device=CPU)
    for place, row in zip(map(str, places), batch.inputs.reshape(-1, CONTEXT).tolist(), strict=True):
        name, _, number = place.rpartition(":")
        if name == f"{tmp_path}/a.txt":
            assert row == [ord("a")] * CONTEXT
        elif name == f"{tmp_path}/text.jsonl":
            assert isinstance(packed.train, np.ndarray)
            assert row == packed.train[int(number) : int(number) + CONTEXT].tolist()
        else:
            task = make_synthetic("synthetic:mqar,pairs=2", ByteTokenizer(), context=CONTEXT)
            assert name == "synthetic:mqar,pairs=2"
            assert row == task.windows(np.array([int(number)], dtype=np.uint64), context=CONTEXT).inputs[0].tolist()


@pytest.mark.parametrize("flag", ["compile", "cuda_graph"])
def test_fixed_shapes_and_packed_documents_exclude_each_other(tmp_path: Path, flag: str) -> None:
    config = train_config(**{flag: True})
    with pytest.raises(NsaError, match=f"--{flag.replace('_', '-')} needs the same shapes") as caught:
        run(tmp_path, documents_corpus(tmp_path), config=dataclasses.asdict(config))
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--no-pack" in caught.value.hint
    batches.refuse_packing(documents_corpus(tmp_path, pack=False), config)
    batches.refuse_packing(text_corpus(tmp_path), config)


def test_a_resumption_with_no_pack_of_a_packed_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    documents_corpus(tmp_path)
    sizes = "--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --device cpu"
    assert command(f"train text.jsonl --steps 2 {sizes} -q".split()) == 0
    capsys.readouterr()
    assert command(["train", "text.jsonl", "--resume", "ckpt.safetensors", "--no-pack", "-q"]) == ExitCode.BAD_INPUT
    assert "--pack was true, is false" in capsys.readouterr().err
    assert command(["train", "text.jsonl", "--resume", "ckpt.safetensors", "-q"]) == 0



def test_a_dense_pass_over_packed_documents_asks_the_device_once_for_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every question is a wait of the host; all layers have the pass's answer."""
    read, asked = torch.Tensor.tolist, []

    def counted(tensor: torch.Tensor) -> Any:
        asked.append(tensor)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    ids = torch.randint(0, 256, (1, 24))
    build_model(model_config(depth=3))(ids, ids, torch.tensor([0, 3, 3, 17, 24], dtype=torch.int32))
    assert len(asked) == 1


def test_positions_and_blocks_count_anew_in_every_packed_document() -> None:
    model = build_model(model_config(True))  # blocks of 4 tokens, one every 2
    geometry = model._geometry(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([0, 3, 3, 17, 24]).int(), None, None)
    assert geometry.positions.tolist() == [*range(3), *range(14), *range(7)]
    assert geometry.block_starts is not None
    assert geometry.block_positions is not None
    assert geometry.block_starts.tolist() == [3, 5, 7, 9, 11, 13, 17, 19]
    assert geometry.block_positions.tolist() == [0, 2, 4, 6, 8, 10, 0, 2]
