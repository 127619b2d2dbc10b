"""A run resumed with other data is refused with what changed, or goes on with it where the user insists."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_cli.checkpoint import load_state, save_state
from nsa_cli.data import ByteTokenizer, Corpus, load_corpus
from nsa_cli.errors import NsaError
from tests.test_resume import ckpt, interrupted_run
from tests.training_runs import CONTEXT, Told, records, run, same_tensors, text_corpus, weights


def load(*sources: str) -> Corpus:
    return load_corpus(sources, ByteTokenizer(), val_fraction=0.1, context=CONTEXT)


def test_a_refusal_says_what_the_data_was_and_is_and_names_the_way_on(tmp_path: Path) -> None:
    interrupted_run(tmp_path, text_corpus(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.glob("ckpt*")}
    with pytest.raises(NsaError) as caught:
        run(tmp_path, text_corpus(tmp_path, "another text. "), resume=ckpt(tmp_path))
    text = tmp_path / "text.txt"
    assert f"the data was 6,200 tokens of {text}, is 2,800 tokens of {text} (fingerprints " in caught.value.message
    assert "--force-data" in caught.value.hint
    with pytest.raises(NsaError, match="--seed was 1337, is 2; the data was") as caught:
        run(tmp_path, text_corpus(tmp_path, "another text. "), resume=ckpt(tmp_path), config={"seed": 2})
    assert "--force-data" not in caught.value.hint, "it would not be enough"
    with pytest.raises(NsaError, match=r"--seed was 1337, is 2$"):
        run(tmp_path, text_corpus(tmp_path, "another. "), resume=ckpt(tmp_path), config={"seed": 2}, force_data=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("ckpt*")} == before


def test_forced_data_goes_on_says_so_and_judges_the_best_anew(tmp_path: Path) -> None:
    interrupted_run(tmp_path, text_corpus(tmp_path))
    best = weights(tmp_path, "ckpt.best")
    corpus, told = text_corpus(tmp_path, "QUITE ANOTHER TEXT? "), Told()
    interrupted_run(tmp_path, corpus, at=9, resume=ckpt(tmp_path), force_data=True)
    assert same_tensors(weights(tmp_path, "ckpt.best"), best), "kept until there are better ones"
    meta = load_state(tmp_path / "ckpt.state.safetensors")[1]
    assert (meta["fingerprint"], meta["best_step"], meta["best_val_loss"]) == (corpus.fingerprint, 5, None)
    run(tmp_path, corpus, "moved", resume=ckpt(tmp_path), config={"eval_every": 0})
    assert same_tensors(weights(tmp_path, "moved.best"), best)
    result = run(tmp_path, corpus, resume=ckpt(tmp_path), reporter=told)
    assert (result.status, result.best_step) == ("finished", 12)
    assert not any("restored" in text for text in told.notices), "nothing was missing, and the data is now its own"
    resumed = [record for record in records(tmp_path) if record.get("event") == "resume"]
    assert [record["data"]["fingerprint"] for record in resumed] == [corpus.fingerprint] * 2
    assert "going on with other data: the data was 6,200 tokens" in resumed[0]["notices"][0]
    assert resumed[1]["notices"] == []


def test_forced_data_under_another_name_begins_with_no_best_loss_either(tmp_path: Path) -> None:
    interrupted_run(tmp_path, text_corpus(tmp_path))
    best = weights(tmp_path, "ckpt.best")
    corpus = text_corpus(tmp_path, "QUITE ANOTHER TEXT? ")
    interrupted_run(tmp_path, corpus, at=8, name="moved", resume=ckpt(tmp_path), force_data=True)
    meta = load_state(tmp_path / "moved.state.safetensors")[1]
    assert (meta["fingerprint"], meta["best_step"], meta["best_val_loss"]) == (corpus.fingerprint, 5, None)
    assert same_tensors(weights(tmp_path, "moved.best"), best)


def test_forced_data_of_another_tokenizer_is_still_refused(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus)
    state = tmp_path / "ckpt.state.safetensors"
    tensors, meta = load_state(state)
    save_state(state, tensors, {**meta, "tokenizer": {"name": "bpe"}, "fingerprint": "0" * 64})
    with pytest.raises(NsaError, match=r"the tokenizer was bpe, is bytes$"):
        run(tmp_path, corpus, resume=ckpt(tmp_path), force_data=True)


def test_a_state_that_says_nothing_of_its_data_is_resumed_all_the_same(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    interrupted_run(tmp_path, corpus)
    state = tmp_path / "ckpt.state.safetensors"
    tensors, meta = load_state(state)
    save_state(state, tensors, {key: value for key, value in meta.items() if key != "data"})
    with pytest.raises(NsaError, match="the data was another, is 2,800 tokens"):
        run(tmp_path, text_corpus(tmp_path, "another text. "), resume=ckpt(tmp_path))
    assert run(tmp_path, corpus, resume=ckpt(tmp_path)).status == "finished"


def test_a_changed_task_is_named_with_all_of_its_parameters_and_an_unchanged_one_goes_on(tmp_path: Path) -> None:
    interrupted_run(tmp_path, load("synthetic:mqar,pairs=4"))
    was = f"the data was synthetic:mqar,pairs=4,power=0.01,length={CONTEXT}"
    for other, now in (
        ("synthetic:mqar,pairs=5", f"synthetic:mqar,pairs=5,power=0.01,length={CONTEXT}"),
        ("synthetic:mqar,pairs=4,length=20", "synthetic:mqar,pairs=4,power=0.01,length=20"),
        ("synthetic:copying,tokens=4", f"synthetic:copying,tokens=4,symbols=16,length={CONTEXT}"),
    ):
        with pytest.raises(NsaError) as caught:
            run(tmp_path, load(other), resume=ckpt(tmp_path))
        assert f"{was}, is {now} (fingerprints " in caught.value.message
    again = load(f"synthetic:mqar?power=1e-2&length={CONTEXT}&pairs=4")
    assert run(tmp_path, again, resume=ckpt(tmp_path)).status == "finished"


def test_changed_weights_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a fox and a dog. " * 100)
    interrupted_run(tmp_path, load(f"{file}@0.5", "synthetic:mqar,pairs=4@0.5"))
    task = f"synthetic:mqar,pairs=4,power=0.01,length={CONTEXT}"
    with pytest.raises(NsaError) as caught:
        run(tmp_path, load(f"{file}@0.5", "synthetic:mqar,pairs=4@0.25"), resume=ckpt(tmp_path))
    assert f"the data was {file}@0.5 {task}@0.5, is {file}@0.5 {task}@0.25 (fingerprints " in caught.value.message
    assert run(tmp_path, load(f"{file}@0.5", "synthetic:mqar,pairs=4@0.5"), resume=ckpt(tmp_path)).status == "finished"
