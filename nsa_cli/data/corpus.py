"""The training data of one run: sources on the command line in, two arrays of token ids out, the same every time."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nsa_cli.data.tokenizer import Tokenizer
from nsa_cli.errors import ExitCode, NsaError

_TEXT = "txt text md markdown rst org tex log csv tsv json jsonl ndjson xml html css yaml yml toml ini cfg"
_CODE = "py pyi c h cc cpp hpp cu cuh rs go java kt js ts jsx tsx rb lua pl r jl hs ml swift sql sh"

TEXT_SUFFIXES = frozenset("." + suffix for suffix in f"{_TEXT} {_CODE}".split(" "))
"""What a folder is searched for (also with .gz after it). A file that is named or matched by a glob may have any."""

_RECORDS = (".jsonl", ".ndjson")
_OWN_OUTPUT = ".metrics.jsonl"


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens to judge by.

    train, val: 1-D ids, the smallest of uint8, uint16 and uint32 that holds the vocabulary; val is the text's end.
    train_bytes, val_bytes: bytes of text that they stand for. fingerprint: sha256 (hex) over the text and the
    tokenizer. sources: every file read, in order, "-" for stdin.
    """

    train: npt.NDArray[Any]
    val: npt.NDArray[Any]
    train_bytes: int
    val_bytes: int
    fingerprint: str
    sources: list[str]
    tokenizer: Tokenizer


def load_corpus(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    context: int,
    text_key: str = "text",
    stdin: BinaryIO | None = None,
) -> Corpus:
    """Read, join, tokenize and split.

    sources, in the order given:
      a file: its bytes; `.gz` is unpacked; of `.jsonl` and `.ndjson` the string under `text_key` of every line's
      object; a folder: the files below it whose suffix is in TEXT_SUFFIXES (or that and .gz), sorted by path; names
        that begin with a dot are skipped, as is `*.metrics.jsonl`, what nsa writes beside a checkpoint; links to folders
        are not followed;
      a glob that the shell left as it is: its matches, sorted; `**` crosses folders;
      `-`: stdin, to its end.
    A file reached twice is read once: its copy in the held-out tail would be validation on training data. Between two
    files (or records) a newline is added where the first does not end with one.

    The validation set is the last val_fraction of the tokens, rounded, but never so few or so many that either part
    has less than the context + 1 tokens of one window; val_fraction 0 leaves it empty.

    Raises NsaError (exit 3): a source missing, unreadable, without text, damaged or not text; too few tokens.
    """
    texts: list[bytes] = []
    names: list[str] = []
    for name in _expand(sources):
        names.append(name)
        texts.append(_read(name, text_key, stdin))
    shown = _shown(names[0]) if len(names) == 1 else f"{len(names)} files"
    if not any(texts):
        raise _bad(f"no training data: {shown}, nothing in it", "give a file with some text in it")
    digest = hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode())
    pieces: list[npt.NDArray[Any]] = []
    total_bytes = 0
    for name, text in zip(names, _joined(texts), strict=True):
        digest.update(text)
        total_bytes += len(text)
        pieces.append(_encode(tokenizer, name, text))
    tokens = np.concatenate(pieces)
    held_out = _held_out(len(tokens), val_fraction, context, shown)
    train, val = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    val_bytes = tokenizer.count_bytes(val)
    return Corpus(
        train=train,
        val=val,
        train_bytes=max(0, total_bytes - val_bytes),
        val_bytes=val_bytes,
        fingerprint=digest.hexdigest(),
        sources=names,
        tokenizer=tokenizer,
    )


def _bad(message: str, hint: str) -> NsaError:
    return NsaError(message, hint, ExitCode.BAD_INPUT)


def _shown(name: str) -> str:
    return "stdin" if name == "-" else name


def _expand(sources: Sequence[str]) -> list[str]:
    """Every file to read, once, in order."""
    if not sources:
        raise _bad("no training data", "name a file, a folder, or - for stdin")
    found: list[str] = []
    seen: set[str] = set()
    for source in sources:
        for name in _files(source):
            key = name if name == "-" else os.path.realpath(name)
            if key not in seen:
                seen.add(key)
                found.append(name)
    return found


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
            raise _bad(f"no file matches {source}", "quote nothing, or check the pattern with ls")
        for match in matches:
            # `**` matches folders as well as what is in them; the files come by themselves.
            if not Path(match).is_dir():
                yield match
            elif "**" not in source:
                yield from _folder(Path(match))
    else:
        raise _bad(f"no such file or folder: {source}", "check the path; DATA is files, folders, globs, or - for stdin")


def _folder(folder: Path) -> list[str]:
    def unreadable(error: OSError) -> None:
        raise _bad(f"cannot read folder {error.filename}: {error.strerror}", f"chmod u+rx {error.filename}") from error

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if _is_text_name(name) and Path(parent, name).is_file()]
    if not found:
        raise _bad(f"no text files in folder {folder}", "name the files themselves, or a glob: any suffix is read then")
    return [str(path) for path in sorted(found, key=lambda path: path.parts)]


def _is_text_name(name: str) -> bool:
    if name.endswith(_OWN_OUTPUT):
        return False
    stem = name.lower().removesuffix(".gz")
    return not name.startswith(".") and Path(stem).suffix in TEXT_SUFFIXES


def _read(name: str, text_key: str, stdin: BinaryIO | None) -> bytes:
    if name == "-":
        return (stdin or sys.stdin.buffer).read()
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        hint = f"chmod u+r {name}" if isinstance(error, PermissionError) else "check that it is a readable file"
        raise _bad(f"cannot read {name}: {error.strerror}", hint) from error
    plain = name.lower()
    if plain.endswith(".gz"):
        plain = plain.removesuffix(".gz")
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            reason = "it ends too early" if isinstance(error, EOFError) else str(error)
            hint = f"fetch it again; gzip -t {name} checks it"
            raise _bad(f"{name} is not a whole gzip file: {reason}", hint) from error
    if plain.endswith(_RECORDS):
        return b"".join(_joined(_records(name, data, text_key)))
    return data


def _records(name: str, data: bytes, text_key: str) -> list[bytes]:
    texts: list[bytes] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 text, or nested too deep"
            raise _bad(f"{where} is not JSON: {reason}", "a .jsonl file has one JSON object a line") from error
        if not isinstance(record, dict):
            raise _bad(f"{where} is not a JSON object", 'a line looks like {"text": "..."}')
        if not isinstance(record.get(text_key), str):
            found = ", ".join(list(record)[:8]) or "no keys at all"
            wrong = "is not a string" if text_key in record else "is missing"
            raise _bad(f"{where}: key {text_key!r} {wrong}", f"--text-key names the text's key; this line has {found}")
        # A lone surrogate is legal JSON, and not a character.
        texts.append(record[text_key].encode("utf-8", errors="replace"))
    return texts


def _joined(texts: Iterable[bytes]) -> Iterator[bytes]:
    """The same texts, with a newline after each that has none and has a text behind it."""
    held: bytes | None = None
    for text in texts:
        if held is not None:
            yield held if not held or held.endswith(b"\n") else held + b"\n"
        held = text
    if held is not None:
        yield held


def _encode(tokenizer: Tokenizer, name: str, text: bytes) -> npt.NDArray[Any]:
    try:
        return tokenizer.encode(text)
    except NsaError as error:
        raise NsaError(f"{_shown(name)}: {error.message}", error.hint, error.exit_code) from error


def _held_out(tokens: int, val_fraction: float, context: int, shown: str) -> int:
    """How many tokens at the end are the validation set."""
    window = context + 1
    needed = window if val_fraction == 0 else 2 * window
    if tokens < needed:
        parts = "one window" if val_fraction == 0 else "one window to train on and one to validate on"
        less = "" if val_fraction == 0 else ", or --val-fraction 0"
        counts = f"{shown} has {tokens:,} tokens, and --seq-len {context} needs at least {needed:,}"
        raise _bad(f"too little data: {counts} ({parts})", f"give more text, a smaller --seq-len{less}")
    if val_fraction == 0:
        return 0
    return min(max(round(tokens * val_fraction), window), tokens - window)
