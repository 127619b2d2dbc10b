"""Files on the command line to documents: found, unpacked and read in pieces, so that no file is ever whole in memory.

A document is a file, stdin, a line of `.jsonl`, or a row of `.parquet` (extra `data`).
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nsa_cli.errors import ExitCode, NsaError

_TEXT = "txt text md markdown rst org tex log csv tsv json jsonl ndjson parquet xml html css yaml yml toml ini cfg"
_CODE = "py pyi c h cc cpp hpp cu cuh rs go java kt js ts jsx tsx rb lua pl r jl hs ml swift sql sh"

TEXT_SUFFIXES = frozenset("." + suffix for suffix in f"{_TEXT} {_CODE}".split(" "))
"""What a folder is searched for (also with .gz after it). A file that is named or matched by a glob may have any."""

PIECE_BYTES = 1 << 22
"""Most bytes of a file in one piece, but for a line of .jsonl."""

_RECORDS = (".jsonl", ".ndjson")
_TABLE = ".parquet"
_OWN_OUTPUT = ".metrics.jsonl"
_BLOCK_BYTES = 1 << 16
_ROWS = 256


class Piece(NamedTuple):
    """A part of a document. offset: bytes of the document before it. last: whether the document ends with it."""

    name: str
    text: bytes
    offset: int
    last: bool


class Broken:
    """Input that cannot be used: refused if strict, else passed over, counted by kind, and the first of a kind kept."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.found: dict[str, tuple[int, NsaError]] = {}

    def add(self, kind: str, error: NsaError, count: int = 1) -> None:
        """One more (or `count`) of `kind`, one of NO_TEXT, DAMAGED and NOT_UTF8; strict raises the error."""
        if self.strict:
            raise error
        before, first = self.found.get(kind, (0, error))
        self.found[kind] = (before + count, first)

    def lines(self) -> tuple[str, ...]:
        """A line for the user for each kind."""
        return tuple(
            f"{kind.format(count=f'{count:,}', s='' if count == 1 else 's')}; the first: {first.message} (--strict refuses this)"
            for kind, (count, first) in self.found.items()
        )

    def refuse_nothing_left(self) -> None:
        """Raise the first error, if there was one: nothing else is left."""
        for _, error in self.found.values():
            raise error


NO_TEXT = "passed over {count} record{s} without text"
DAMAGED = "kept what can be read of {count} damaged file{s}"
NOT_UTF8 = "replaced {count} sequence{s} of bytes that cannot be UTF-8"


def bad_input(message: str, hint: str) -> NsaError:
    """An NsaError with exit 3."""
    return NsaError(message, hint, ExitCode.BAD_INPUT)


def shown(name: str) -> str:
    """A source's name in messages."""
    return "stdin" if name == "-" else name


def expand(sources: Sequence[str], seen: set[str] | None = None) -> list[str]:
    """Every file to read, once, in order; NsaError (exit 3) for a source that is not there. seen: files to leave out, added
    to."""
    if not sources:
        raise bad_input("no training data", "name a file, a folder, or - for stdin")
    found: list[str] = []
    seen = set() if seen is None else seen
    for source in sources:
        for name in _files(source):
            key = name if name == "-" else os.path.realpath(name)
            if key not in seen:
                seen.add(key)
                found.append(name)
    return found


def read_pieces(names: Iterable[str], text_key: str, stdin: BinaryIO | None, broken: Broken) -> Iterator[Piece]:
    """The documents of the files, in order, each in pieces of about PIECE_BYTES that end after a line where they can.

    A newline is added to a document that does not end with one and has another behind it. Where a piece ends depends
    on the text alone. NsaError (exit 3) for a file that cannot be read. Damaged files and records without text: see Broken.
    """
    held: Piece | None = None
    for name in names:
        for piece in _pieces(name, text_key, stdin, broken):
            if held is not None:
                apart = held.last and held.text and not held.text.endswith(b"\n")
                yield held._replace(text=held.text + b"\n") if apart else held
            held = piece
    if held is not None:
        yield held


def _files(source: str) -> Iterator[str]:
    path = Path(source)
    if source == "-":
        yield source
    elif path.is_dir():
        yield from _folder(path)
    elif os.path.lexists(source):
        yield source
    elif glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute patterns)
        if not matches:
            raise bad_input(f"no file matches {source}", "quote nothing, or check the pattern with ls")
        for match in matches:
            # `**` matches folders as well as what is in them; the files come by themselves.
            if not Path(match).is_dir():
                yield match
            elif "**" not in source:
                yield from _folder(Path(match))
    else:
        raise bad_input(f"no such file or folder: {source}", "check the path; DATA is files, folders, globs, or - for stdin")


def _folder(folder: Path) -> list[str]:
    def unreadable(error: OSError) -> None:
        raise bad_input(f"cannot read folder {error.filename}: {error.strerror}", f"chmod u+rx {error.filename}") from error

    found: list[Path] = []
    shards: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if _is_text_name(name) and Path(parent, name).is_file()]
        shards += [Path(parent, name) for name in files if name.endswith(".tokens") and not name.startswith(".")]
    found = found or shards
    if not found:
        raise bad_input(f"no text files in folder {folder}", "name the files themselves, or a glob: any suffix is read then")
    return [str(path) for path in sorted(found, key=lambda path: path.parts)]


def _is_text_name(name: str) -> bool:
    if name.endswith(_OWN_OUTPUT):
        return False
    stem = name.lower().removesuffix(".gz")
    return not name.startswith(".") and Path(stem).suffix in TEXT_SUFFIXES


def _pieces(name: str, text_key: str, stdin: BinaryIO | None, broken: Broken) -> Iterator[Piece]:
    if name == "-":
        yield from _text_pieces(name, stdin or sys.stdin.buffer)
        return
    plain = name.lower()
    try:
        with Path(name).open("rb") as file:
            stream: Any = file
            if plain.endswith(_TABLE):
                yield from _rows(name, text_key, broken)
                return
            if plain.endswith(".gz"):
                plain = plain.removesuffix(".gz")
                stream = _Unpacked(name, file, broken)
            if plain.endswith(_RECORDS):
                yield from _records(name, stream, text_key, broken)
            else:
                yield from _text_pieces(name, stream)
    except OSError as error:
        hint = f"chmod u+r {name}" if isinstance(error, PermissionError) else "check that it is a readable file"
        raise bad_input(f"cannot read {name}: {error.strerror or error}", hint) from error


class _Unpacked:
    """The content of a gzip file; a damaged one ends where it cannot be read any further."""

    def __init__(self, name: str, file: BinaryIO, broken: Broken) -> None:
        self._name, self._broken = name, broken
        self._inner: gzip.GzipFile | None = gzip.GzipFile(fileobj=file)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, b"" at the end."""
        data = bytearray()
        while self._inner is not None and len(data) < size:
            try:
                block = self._inner.read1(min(size - len(data), _BLOCK_BYTES))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                reason = "it ends too early" if isinstance(error, EOFError) else str(error)
                hint = f"fetch it again; gzip -t {self._name} checks it"
                self._broken.add(DAMAGED, bad_input(f"{self._name} is not a whole gzip file: {reason}", hint))
                block = b""
            if not block:
                self._inner = None
            data += block
        return bytes(data)


def _text_pieces(name: str, file: Any) -> Iterator[Piece]:
    held, offset = b"", 0
    while block := file.read(PIECE_BYTES):
        held += block
        if len(held) > PIECE_BYTES:
            cut = _cut(held)
            yield Piece(name, held[:cut], offset, False)
            held, offset = held[cut:], offset + cut
    yield Piece(name, held, offset, True)


def _cut(text: bytes) -> int:
    """Where to end a piece: after a line, else before a character; something is left for the last piece."""
    end = text.rfind(b"\n", 0, len(text) - 1) + 1
    if end == 0:
        end = len(text) - 1
        while end > len(text) - 4 and text[end] & 0xC0 == 0x80:
            end -= 1
    return end


def _records(name: str, file: Any, text_key: str, broken: Broken) -> Iterator[Piece]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                text = _text_of(f"{name}, line {number}", line, text_key)
            except NsaError as error:
                broken.add(NO_TEXT, error)
            else:
                yield Piece(name, text, 0, True)


def _lines(file: Any) -> Iterator[bytes]:
    held = b""
    while block := file.read(PIECE_BYTES):
        *lines, held = (held + block).split(b"\n")
        yield from lines
    yield held


def _text_of(where: str, line: bytes, text_key: str) -> bytes:
    """The text of a line of .jsonl; NsaError says why there is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 text, or nested too deep"
        raise bad_input(f"{where} is not JSON: {reason}", "a .jsonl file has one JSON object a line") from error
    if not isinstance(record, dict):
        raise bad_input(f"{where} is not a JSON object", 'a line looks like {"text": "..."}')
    if not isinstance(record.get(text_key), str):
        found = ", ".join(list(record)[:8]) or "no keys at all"
        wrong = "is not a string" if text_key in record else "is missing"
        raise bad_input(f"{where}: key {text_key!r} {wrong}", f"--text-key names the text's key; this line has {found}")
    # A lone surrogate is legal JSON, and not a character.
    text: str = record[text_key]
    return text.encode("utf-8", errors="replace")


def _rows(name: str, text_key: str, broken: Broken) -> Iterator[Piece]:
    """The texts of a column of a .parquet file, a document a row; of the file, some rows are in memory at once."""
    try:
        from pyarrow import parquet
        from pyarrow.lib import ArrowException
    except ImportError as error:
        message = f"{name}: a .parquet file needs the pyarrow package, which is not installed"
        raise NsaError(message, "pip install 'nsa-cli[data]'", ExitCode.FAILURE) from error
    row = 0
    try:
        with parquet.ParquetFile(name) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                hint = f"--text-key names the text's column; this file has {', '.join(columns[:8]) or 'none'}"
                raise bad_input(f"{name}: no column {text_key!r}", hint)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(value, (str, bytes)):
                        yield Piece(name, value.encode("utf-8", "replace") if isinstance(value, str) else value, 0, True)
                    else:
                        what = "is null" if value is None else f"is {type(value).__name__}, not text"
                        hint = "--text-key names the text's column"
                        broken.add(NO_TEXT, bad_input(f"{name}, row {row}: {text_key!r} {what}", hint))
    except ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise bad_input(f"{name} is not a parquet file that can be read: {reason}", "fetch or write it again") from error
