"""Broken input: passed over, counted and named, or refused when strict."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from nsa_cli.cli.app import run as command
from nsa_cli.data import ByteTokenizer, Corpus, Tokenizer, load_corpus, reading
from nsa_cli.errors import ExitCode, NsaError
from tests.test_tokenizer import BPETokenizer, byte_level_spec
from tests.training_runs import records

SMALL = "--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-tokens 32 --steps 1 --device cpu"


def load(*sources: Path, tokenizer: Tokenizer | None = None, **options: Any) -> Corpus:
    settings: dict[str, Any] = {"val_fraction": 0.0, "context": 1, "strict": False, **options}
    return load_corpus([str(source) for source in sources], tokenizer or ByteTokenizer(), **settings)


def refusal(*sources: Path, **options: Any) -> str:
    with pytest.raises(NsaError) as caught:
        load(*sources, **options)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.hint
    return caught.value.message


def bad_lines(folder: Path) -> Path:
    file = folder / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"body": 1}\n{"text": "open\n\n{"text": "two"}\n[1]\n{"text": "\xff"}\n')
    return file


def test_lines_without_text_are_passed_over_counted_and_the_first_is_named(tmp_path: Path) -> None:
    corpus = load(bad_lines(tmp_path))
    assert bytes(corpus.train) == b"one\ntwo"
    first = f"{tmp_path}/a.jsonl, line 2: key 'text' is missing"
    assert corpus.notices == (f"passed over 4 records without text; the first: {first} (--strict refuses this)",)
    assert refusal(bad_lines(tmp_path), strict=True) == first


@pytest.mark.parametrize("harm", ["half", "flip"])
def test_a_damaged_gzip_file_gives_what_can_be_read(tmp_path: Path, harm: str) -> None:
    text = b"".join(b"%d " % number for number in random.Random(5).sample(range(10**6), 40_000))
    packed = gzip.compress(text)
    middle = len(packed) // 2
    file = tmp_path / "a.txt.gz"
    file.write_bytes(packed[:middle] if harm == "half" else packed[:-6] + bytes(6))
    (tmp_path / "b.txt").write_bytes(b"a whole file")
    corpus = load(tmp_path)
    read = bytes(corpus.train).removesuffix(b"\na whole file")
    assert text.startswith(read)
    assert len(read) > 0.4 * len(text)
    (line,) = corpus.notices
    assert line.startswith(f"kept what can be read of 1 damaged file; the first: {file} is not a whole gzip file: ")
    assert "is not a whole gzip file" in refusal(tmp_path, strict=True)


def test_a_truncated_packed_jsonl_gives_its_whole_lines(tmp_path: Path) -> None:
    numbers = random.Random(6).sample(range(10**9), 3000)
    packed = gzip.compress("".join(json.dumps({"text": str(number)}) + "\n" for number in numbers).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    corpus = load(tmp_path)
    lines = bytes(corpus.train).decode().split()
    assert lines == [str(number) for number in numbers[: len(lines)]]
    assert len(lines) > 1000
    assert [line.split(";")[0] for line in corpus.notices] == [
        "kept what can be read of 1 damaged file",
        "passed over 1 record without text",
    ]


def test_bytes_that_are_not_utf8_are_replaced_for_bpe_and_kept_as_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    tokenizer = BPETokenizer(byte_level_spec())
    data = b"The ferry left at noon.\n" * 10 + b"bad \xfe\xe6\x97 and \xff, \xef\xbf\xbd is not.\n" + "grün".encode()
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    corpus = load(file, tokenizer=tokenizer)
    assert tokenizer.decode(corpus.train) == data.decode("utf-8", "replace").encode()
    where = f"{file}: byte 0xfe at offset 244 is not UTF-8, which the tokenizer needs"
    (line,) = corpus.notices
    assert line == f"replaced 3 sequences of bytes that cannot be UTF-8; the first: {where} (--strict refuses this)"
    assert refusal(file, tokenizer=tokenizer, strict=True) == where
    plain = load(file, strict=True)
    assert bytes(plain.train) == data
    assert plain.notices == ()


def test_a_character_between_two_pieces_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 61)
    tokenizer, text = BPETokenizer(byte_level_spec()), "渡し船🚣ü" * 200
    (tmp_path / "a.txt").write_text(text)
    corpus = load(tmp_path / "a.txt", tokenizer=tokenizer, strict=True)
    assert tokenizer.decode(corpus.train).decode() == text


def test_with_nothing_sound_the_first_error_is_the_answer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "all of them"}\n' * 3)
    (tmp_path / "b.txt.gz").write_text("not packed")
    for options in ({}, {"shards": tmp_path / "shards"}):
        assert "line 1: key 'text' is missing" in refusal(tmp_path, **options)
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_shard_remembers_what_was_wrong_with_its_text(tmp_path: Path) -> None:
    file, told = bad_lines(tmp_path), list[str]()
    options: dict[str, Any] = {"shards": tmp_path / "shards", "notify": told.append}
    made = load(file, **options)
    assert load(file, **options).notices == made.notices == load(tmp_path / "shards").notices
    assert told.count(made.notices[0]) == 2
    for source in (file, tmp_path / "shards"):
        assert "passed over 4 records" in refusal(source, strict=True, **options)


def test_the_command_line_goes_on_with_a_notice_and_refuses_when_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": "a line long enough to train on"})] * 4
    Path("a.jsonl").write_text("\n".join([*lines, "{}", *lines]))
    assert command(f"train a.jsonl --strict {SMALL}".split()) == ExitCode.BAD_INPUT
    assert "nsa: error: a.jsonl, line 5: key 'text' is missing" in capsys.readouterr().err
    assert command(f"train a.jsonl {SMALL}".split()) == 0
    said = "passed over 1 record without text; the first: a.jsonl, line 5: key 'text' is missing (--strict refuses this)"
    assert f"nsa: {said}" in capsys.readouterr().err.splitlines()
    assert records(tmp_path)[0]["notices"] == [said]
