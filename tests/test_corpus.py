"""Sources in, tokens out: the same order every time, a held-out tail, and one clear line for all that is wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.data import ByteTokenizer, Corpus, load_corpus
from nsa_cli.errors import ExitCode, NsaError
from tests.test_tokenizer import BPETokenizer, byte_level_spec


def load(*sources: str | Path, val_fraction: float = 0.0, context: int = 1, **others: Any) -> Corpus:
    names = [str(source) for source in sources]
    return load_corpus(names, ByteTokenizer(), val_fraction=val_fraction, context=context, **others)


def refused(*sources: str | Path, **others: Any) -> str:
    """The message; the exit code is 3, message and hint are one line each, and the hint is there."""
    with pytest.raises(NsaError) as caught:
        load(*sources, **others)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every kind of file that is read or skipped."""
    root = tmp_path / "data"
    for name, content in {
        "b.txt": b"b\n", "a.md": b"a\n", "sub/deep/c.py": b"c\n", "sub/z.TXT": b"z\n",
        ".hidden.txt": b"no", ".git/x.txt": b"no", "image.png": b"no", "noextension": b"no", "sub/y.bin": b"no",
    }.items():  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "d.txt.gz").write_bytes(gzip.compress(b"d\n"))
    (root / "e.jsonl").write_text('{"text": "e"}\n')
    (root / "loop").symlink_to(root)
    return root


def test_a_file_is_its_bytes_one_token_each(tmp_path: Path) -> None:
    path = tmp_path / "x.unknown"
    path.write_bytes(bytes(range(256)))
    corpus = load(path)
    assert corpus.train.dtype == np.uint8
    assert bytes(corpus.train) == bytes(range(256))
    assert (len(corpus.val), corpus.train_bytes, corpus.val_bytes) == (0, 256, 0)
    assert corpus.sources == [str(path)]


def test_a_folder_gives_its_text_files_sorted_and_skips_the_hidden_and_the_unknown(folder: Path) -> None:
    corpus = load(folder)
    assert bytes(corpus.train) == b"a\nb\nd\ne\nc\nz\n"
    names = ["a.md", "b.txt", "d.txt.gz", "e.jsonl", "sub/deep/c.py", "sub/z.TXT"]
    assert corpus.sources == [str(folder / name) for name in names]


def test_a_folder_that_a_run_writes_into_is_read_without_the_runs_own_metrics(folder: Path) -> None:
    expected = load(folder)
    (folder / "ckpt.metrics.jsonl").write_text('{"event": "start"}\n')
    assert load(folder).sources == expected.sources
    assert load(folder).fingerprint == expected.fingerprint


def test_the_order_of_a_folder_is_not_the_order_of_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(folder)
    walk = os.walk

    def shuffled(*arguments: Any, **others: Any) -> Any:
        for parent, folders, files in walk(*arguments, **others):
            random.shuffle(folders)
            random.shuffle(files)
            yield parent, folders, files

    monkeypatch.setattr(os, "walk", shuffled)
    again = load(folder)
    assert (again.sources, again.fingerprint) == (expected.sources, expected.fingerprint)


def test_sources_keep_the_order_they_are_given_in(folder: Path) -> None:
    assert bytes(load(folder / "sub/z.TXT", folder / "b.txt").train) == b"z\nb\n"


def test_an_unexpanded_glob_is_expanded_in_order(folder: Path) -> None:
    assert bytes(load(folder / "*.[mt]*").train) == b"a\nb\nd\n"
    assert bytes(load(folder / "s*").train) == b"c\nz\n"
    assert bytes(load(folder / "sub" / "**" / "*.py").train) == b"c\n"


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes(b"yes")
    (tmp_path / "a1.txt").write_bytes(b"no!")
    assert bytes(load(tmp_path / "a[1].txt").train) == b"yes"


def test_a_file_reached_twice_is_read_once(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder / "b.txt")
    assert bytes(load(folder / "b.txt", folder / "link.txt", folder / "*.txt", folder / "a.md").train) == b"b\na\n"


def test_a_newline_parts_files_that_do_not_end_with_one(tmp_path: Path) -> None:
    for name, content in {"1.txt": b"one", "2.txt": b"", "3.txt": b"two\n", "4.txt": b"three"}.items():
        (tmp_path / name).write_bytes(content)
    assert bytes(load(tmp_path).train) == b"one\ntwo\nthree"


def test_stdin_is_a_dash_and_may_stand_among_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n")
    corpus = load(tmp_path / "a.txt", "-", "-", stdin=io.BytesIO(b"from the pipe"))
    assert bytes(corpus.train) == b"a\nfrom the pipe"
    assert corpus.sources[1:] == ["-"]


def test_a_named_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    os.close(writer)
    try:
        assert bytes(load(f"/dev/fd/{reader}").train) == b"through a pipe"
    finally:
        os.close(reader)


def test_jsonl_gives_the_text_of_every_record(tmp_path: Path) -> None:
    lines = ['{"text": "one", "n": 1}', "", '{"n": 2, "text": "zwölf\\n"}', '{"text": "\\ud800!"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    assert bytes(load(tmp_path).train) == "one\nzwölf\n?!\npacked".encode()


def test_the_text_key_may_be_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": 3}\n')
    assert bytes(load(tmp_path, text_key="body").train) == b"yes"


def test_the_fingerprint_is_of_text_and_tokenizer_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some text, some more")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"some text, some more"))
    (tmp_path / "c.txt").write_bytes(b"some text, some mire")
    plain = load(tmp_path / "a.txt")
    assert plain.fingerprint == load(tmp_path / "b.txt.gz").fingerprint
    assert plain.fingerprint == load(tmp_path / "a.txt", context=3, val_fraction=0.3).fingerprint
    assert plain.fingerprint != load(tmp_path / "c.txt").fingerprint
    other = load_corpus([str(tmp_path / "a.txt")], BPETokenizer(byte_level_spec()), val_fraction=0, context=1)
    assert plain.fingerprint != other.fingerprint
    identity = json.dumps(ByteTokenizer().to_dict(), sort_keys=True).encode()
    assert plain.fingerprint == hashlib.sha256(identity + b"some text, some more").hexdigest()


@given(st.integers(2, 400), st.floats(0.0, 0.9), st.integers(1, 100))
def test_the_split_is_the_tail_and_leaves_each_part_a_window(
    tmp_path_factory: pytest.TempPathFactory, size: int, fraction: float, context: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "x.txt"
    text = bytes(place % 256 for place in range(size))
    path.write_bytes(text)
    needed = (context + 1) * (1 if fraction == 0 else 2)
    if size < needed:
        message = refused(path, val_fraction=fraction, context=context)
        assert f"has {size} tokens" in message
        assert f"--seq-len {context}" in message
        assert f"at least {needed}" in message
        assert ("--val-fraction" in message) == (fraction > 0)
        return
    corpus = load(path, val_fraction=fraction, context=context)
    assert bytes(corpus.train) + bytes(corpus.val) == text
    assert len(corpus.train) > context
    assert (corpus.train_bytes, corpus.val_bytes) == (len(corpus.train), len(corpus.val))
    if fraction == 0:
        assert len(corpus.val) == 0
    else:
        assert len(corpus.val) > context
        if context < size * fraction < size - context - 2:
            assert abs(len(corpus.val) - size * fraction) <= 1


def test_bytes_of_a_bpe_corpus_are_those_of_its_text(tmp_path: Path) -> None:
    text = "Grüße aus Langport, and then some more of it.\n" * 30
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = BPETokenizer(byte_level_spec())
    corpus = load_corpus([str(tmp_path)], tokenizer, val_fraction=0.25, context=16)
    assert corpus.train.dtype == np.uint16
    assert corpus.train_bytes + corpus.val_bytes == len(text.encode())
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.val) == text.encode()
    assert corpus.val_bytes == len(tokenizer.decode(corpus.val))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "no training data" in refused()
    assert "no such file or folder: nowhere.txt" in refused("nowhere.txt")
    assert "no file matches" in refused(tmp_path / "*.txt")
    assert "no text files in folder" in refused(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    assert "cannot read" in refused(tmp_path / "gone.txt")


def test_what_is_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    assert "a.txt" in refused(tmp_path / "a.txt")
    assert "2 files" in refused(tmp_path)
    assert "stdin" in refused("-", stdin=io.BytesIO(b""))


def test_a_file_without_permission_is_refused_with_chmod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"secret")

    def denied(self: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert f"cannot read {path}: Permission denied | chmod u+r {path}" == refused(path)


def test_a_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "sub/deep: Permission denied" in refused(folder)


@pytest.mark.parametrize("harm", ["half", "flip", "plain", "empty"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, harm: str) -> None:
    packed = gzip.compress(random.Random(3).randbytes(1000))
    flipped = packed[:500] + bytes([packed[500] ^ 255]) + packed[501:]
    content = {"half": packed[:500], "flip": flipped, "plain": b"just text", "empty": packed[:5]}[harm]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    assert f"{path} is not a whole gzip file" in refused(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "open', "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'["text"]', "line 2 is not a JSON object"),
        (b'{"body": "x", "id": 1}', "line 2: key 'text' is missing | --text-key names"),
        (b'{"body": "x", "id": 1}', "this line has body, id"),
        (b'{"text": null}', "line 2: key 'text' is not a string"),
        (b"{}", "no keys at all"),
    ],
)
def test_a_bad_jsonl_line_is_refused_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert reason in refused(path)


def test_bytes_that_are_not_text_are_refused_by_bpe_with_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"fine \xfe")
    with pytest.raises(NsaError, match=r"a\.bin: byte 0xfe at offset 5 is not UTF-8") as caught:
        load_corpus([str(path)], BPETokenizer(byte_level_spec()), val_fraction=0, context=1)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
