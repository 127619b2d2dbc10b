"""Token shards: the same corpus as from memory, found again, mapped rather than read, and refused when they are not whole."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa_cli.checkpoint import read_info
from nsa_cli.cli.app import run as command
from nsa_cli.data import ByteTokenizer, Corpus, Documents, Mixture, Tokenizer, cache, corpus, load_corpus, reading
from nsa_cli.data.shards import read_shard
from nsa_cli.errors import ExitCode, NsaError
from tests.test_tokenizer import BPETokenizer, byte_level_spec
from tests.training_runs import curve, run, same_tensors, weights

SMALL = "--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --device cpu"


def write_text(folder: Path, lines: int = 80) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("The ferry left at noon, grün und müde.\n" * lines)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i} of it " * (1 + i % 3)}) + "\n" for i in range(lines)))
    return [str(folder / "a.txt"), str(folder / "b.jsonl")]


def load(names: list[str], tokenizer: Tokenizer | None = None, **options: Any) -> Corpus:
    settings: dict[str, Any] = {"val_fraction": 0.2, "context": 32, **options}
    return load_corpus(names, tokenizer or ByteTokenizer(), **settings)


def only_shard(folder: Path) -> Path:
    (path,) = folder.iterdir()
    assert path.suffix == ".tokens"
    return path


def same(one: Corpus, other: Corpus) -> None:
    for side in ("train", "val"):
        np.testing.assert_array_equal(getattr(one, side), getattr(other, side))
    for a, b in ((one.training, other.training), (one.validation, other.validation)):
        assert type(a) is type(b) or {type(a), type(b)} == {np.ndarray, np.memmap}
        if isinstance(a, Documents) and isinstance(b, Documents):
            np.testing.assert_array_equal(a.offsets, b.offsets)
            assert (a.start, a.stop) == (b.start, b.stop)
    assert (one.fingerprint, one.train_bytes, one.val_bytes) == (other.fingerprint, other.train_bytes, other.val_bytes)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_shard_gives_the_corpus_that_memory_gives(tmp_path: Path, kind: str, pack: bool) -> None:
    names = write_text(tmp_path / "text")
    tokenizer = ByteTokenizer() if kind == "bytes" else BPETokenizer(byte_level_spec())
    expected = load(names, tokenizer, pack=pack)
    made = load(names, tokenizer, pack=pack, shards=tmp_path / "shards")
    assert isinstance(made.train, np.memmap)
    same(made, expected)
    same(load(names, tokenizer, pack=pack, shards=tmp_path / "shards"), expected)
    same(load([str(only_shard(tmp_path / "shards"))], tokenizer, pack=pack), expected)
    same(load([str(tmp_path / "shards")], tokenizer, pack=pack), expected)


def test_a_shard_is_found_again_without_reading_the_text_until_the_text_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_text(tmp_path / "text")
    told: list[str] = []
    options: dict[str, Any] = {"shards": tmp_path / "shards", "notify": told.append}
    first = load(names, **options)
    path = only_shard(tmp_path / "shards")
    assert f"tokenizing into {path}" in told[0]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_pieces", lambda *_: pytest.fail("the text was read again"))
        same(load(names, **options), first)
    assert told[1:] == [f"using the token shard {path}"]
    Path(names[0]).write_text("Something else now, and longer than a window.\n" * 10)
    changed = load(names, **options)
    assert changed.fingerprint == load(names).fingerprint != first.fingerprint


def test_another_key_or_tokenizer_makes_another_shard(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one text, of one", "other": "and another text"}\n' * 5)
    names, folder = [str(tmp_path / "a.jsonl")], tmp_path / "shards"
    for options in ({}, {"text_key": "other"}, {"tokenizer": BPETokenizer(byte_level_spec())}):
        same(load(names, shards=folder, context=4, **options), load(names, context=4, **options))
    assert len(list(folder.iterdir())) == 3


def test_large_text_goes_to_the_users_cache_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_text(tmp_path / "text")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not isinstance(load(names).train, np.memmap)
    monkeypatch.setattr(corpus, "IN_MEMORY_BYTES", 1000)
    expected = load(names, shards=tmp_path / "elsewhere")
    assert not (tmp_path / "cache").exists()
    told: list[str] = []
    same(load(names, notify=told.append), expected)
    assert only_shard(tmp_path / "cache" / "nsa").name in told[0]
    assert "--shards" in told[0]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_stays_bounded_however_large_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(corpus, "IN_MEMORY_BYTES", 1 << 20)
    line = "x" * 10_000
    file = tmp_path / f"large{suffix}"
    file.write_text((json.dumps({"text": line}) if suffix == ".jsonl" else line) + "\n")
    file.write_bytes(file.read_bytes() * 800)
    assert file.stat().st_size > 8_000_000
    load([str(write_text(tmp_path / "warm")[0])], shards=tmp_path / "warm up")  # imports what is imported late
    tracemalloc.start()
    try:
        made = load([str(file)], shards=tmp_path / "shards")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert isinstance(made.train, np.memmap)
    assert isinstance(made.val, np.memmap)
    assert len(made.train) + len(made.val) > 8_000_000


def test_a_run_on_a_shard_is_the_run_on_its_text_to_the_bit(tmp_path: Path) -> None:
    names = write_text(tmp_path / "text")
    for name, options in (("memory", {}), ("mapped", {"shards": tmp_path / "shards"})):
        run(tmp_path, load(names, **options), name, config={"steps": 4, "eval_every": 2})
    assert same_tensors(weights(tmp_path, "memory"), weights(tmp_path, "mapped"))
    assert curve(tmp_path, "memory") == curve(tmp_path, "mapped")


def test_stdin_goes_into_a_shard_named_by_its_text(tmp_path: Path) -> None:
    data = b"text from the pipe, more than a window of it.\n" * 20
    for _ in range(2):
        made = load(["-"], stdin=io.BytesIO(data), shards=tmp_path / "shards")
        assert isinstance(made.train, np.memmap)
        assert bytes(made.train) + bytes(made.val) == data
        assert only_shard(tmp_path / "shards").name.startswith("stdin-")


def test_several_shards_are_drawn_from_by_their_size_and_each_holds_out_its_tail(tmp_path: Path) -> None:
    for name, size in (("a", 3000), ("b", 1000)):
        (tmp_path / f"{name}.txt").write_text(name * size)
        load([str(tmp_path / f"{name}.txt")], shards=tmp_path / "shards")
    (tmp_path / "c.txt").write_text("c" * 2000)
    names = [str(tmp_path / "shards"), str(tmp_path / "c.txt")]
    mixed = load(names)
    assert isinstance(mixed.training, Mixture)
    assert (len(mixed.train), len(mixed.val), mixed.train_bytes, mixed.val_bytes) == (4800, 1200, 4800, 1200)
    draws = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    inputs = mixed.training.windows(draws, context=32).inputs
    assert (inputs == inputs[:, :1]).all(), "a window is of one text"
    shares = [float((inputs[:, 0] == ord(name)).mean()) for name in "abc"]
    np.testing.assert_allclose(shares, [0.5, 1 / 6, 1 / 3], atol=0.03)
    assert isinstance(mixed.validation, Mixture)
    held_out = [chr(window.inputs[0, 0]) for window in mixed.validation.fixed_windows(context=32, max_tokens=10**6)]
    assert {name: held_out.count(name) for name in "abc"} == {"a": 18, "b": 6, "c": 12}
    assert load(names).fingerprint == mixed.fingerprint != load(names[:1]).fingerprint


def test_a_shard_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    load(write_text(tmp_path / "text"), shards=tmp_path / "shards")
    with pytest.raises(NsaError, match=r"holds tokens of bytes, and this run's tokenizer is bpe") as caught:
        load([str(tmp_path / "shards")], BPETokenizer(byte_level_spec()))
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def shard(folder: Path) -> Path:
    """A small shard of three documents."""
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"the text of {name}\n" * 9)
    load([str(folder)], shards=folder / "shards")
    return only_shard(folder / "shards")


def changed_header(change: dict[str, Any]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        (length,) = struct.unpack("<I", data[12:16])
        header = json.loads(data[16 : 16 + length]) | change
        return data[:16] + json.dumps(header).encode().ljust(length) + data[16 + length :]

    return changed


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda data: b"just some text", "is not a token shard"),
        (lambda data: b"", "is not a token shard"),
        (lambda data: data[:12], "ends within its header"),
        (lambda data: data[:200], "ends within its header"),
        (lambda data: data[:-1], "its header says"),
        (lambda data: data[:-300], "its header says"),
        (lambda data: data + b"\0", "its header says"),
        (lambda data: data[:8] + struct.pack("<I", 2) + data[12:], "version 2, and this nsa reads up to 1"),
        (lambda data: data[:8] + struct.pack("<I", 0) + data[12:], "version 0"),
        (lambda data: data[:16] + b"!" + data[17:], "header is not JSON"),
        (lambda data: data[:-16] + struct.pack("<q", 1) + data[-8:], "do not ascend"),
        (lambda data: data[:-8] + struct.pack("<q", 7), "do not ascend"),
        (changed_header({"dtype": "float64"}), "dtype is 'float64'"),
        (changed_header({"tokens": -1}), "tokens is -1"),
        (changed_header({"tokens": 10}), "its header says"),
        (changed_header({"documents": True}), "documents is True"),
        (changed_header({"documents": 0}), "documents is 0"),
        (changed_header({"largest": 999}), "token id 999 is beyond its vocabulary of 256"),
        (changed_header({"tokenizer": {"name": "words"}}), "tokenizer name = 'words'"),
        (changed_header({"tokenizer": None}), "tokenizer is None"),
        (changed_header({"fingerprint": 3}), "fingerprint is 3"),
        (changed_header({"broken": [3]}), "broken is"),
    ],
)
def test_a_shard_that_is_not_whole_ours_and_known_is_refused(
    tmp_path: Path, harm: Callable[[bytes], bytes], reason: str
) -> None:
    path = shard(tmp_path / "text")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(NsaError) as caught:
        read_shard(path)
    assert reason in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_damaged_shard_is_made_again_from_its_text(tmp_path: Path) -> None:
    names = write_text(tmp_path / "text")
    expected = load(names, shards=tmp_path / "shards")
    path = only_shard(tmp_path / "shards")
    whole = path.read_bytes()
    told: list[str] = []
    del expected
    path.write_bytes(whole[:-9])
    same(load(names, shards=tmp_path / "shards", notify=told.append), load(names))
    assert "damaged" in told[0]
    assert path.read_bytes() == whole


def test_tokenizing_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine so far \xff")
    with pytest.raises(NsaError, match="not UTF-8"):
        load([str(tmp_path / "a.txt")], BPETokenizer(byte_level_spec()), shards=tmp_path / "shards")
    assert not list((tmp_path / "shards").iterdir())


def test_processes_that_want_one_shard_wait_for_the_one_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, real = write_text(tmp_path / "text"), cache.write_shard
    begun, told = threading.Event(), list[str]()

    def slow(*arguments: Any) -> None:
        begun.set()
        time.sleep(0.3)
        real(*arguments)

    monkeypatch.setattr(cache, "write_shard", slow)
    options: dict[str, Any] = {"shards": tmp_path / "shards", "notify": told.append}
    other = threading.Thread(target=load, args=[names], kwargs=options)
    other.start()
    assert begun.wait(60)
    same(load(names, **options), load(names))
    other.join()
    assert [line.split()[0] for line in told] == ["tokenizing", "using"]
    only_shard(tmp_path / "shards")


def test_a_folder_that_cannot_be_written_is_named_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file")
    with pytest.raises(NsaError, match="cannot write") as caught:
        load(write_text(tmp_path / "text"), shards=tmp_path / "shards")
    assert caught.value.exit_code == ExitCode.FAILURE
    assert "--shards" in caught.value.hint


def test_the_command_line_trains_on_shards_with_the_tokenizer_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    Path("tokenizer.json").write_text(json.dumps(byte_level_spec()))
    assert command(f"train text --shards shards --tokenizer tokenizer.json --steps 1 {SMALL}".split()) == 0
    assert "tokenizing into shards/a.txt-" in capsys.readouterr().err
    assert command(f"train shards --steps 1 --out again.safetensors {SMALL}".split()) == 0
    one, other = (read_info(name) for name in ("ckpt.safetensors", "again.safetensors"))
    assert other.tokenizer.name == "bpe"
    assert one.metadata["fingerprint"] == other.metadata["fingerprint"]
