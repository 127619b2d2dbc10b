"""Token shards: tokenized documents in one file that is mapped into memory instead of read.

Layout, little-endian:

    8 bytes   NSATOKEN
    uint32    version of the format
    uint32    n
    n bytes   the header, a JSON object filled up with blanks; the tokens begin at a multiple of 64
    tokens    `tokens` ids of `dtype` (uint8, uint16 or uint32), zeros up to a multiple of 8
    offsets   int64 [documents + 1]: where each document begins, and the number of tokens

The header has dtype, tokens, documents, largest (id), bytes (of text), tokenizer, fingerprint and fingerprint_packed (see
nsa_cli.data.corpus) and broken (what was wrong with the text, lines for the user).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nsa_cli.data.reading import bad_input
from nsa_cli.data.text import TextFacts, TokenText
from nsa_cli.data.tokenizer import Tokenizer, smallest_dtype, tokenizer_from_dict

MAGIC = b"NSATOKEN"
VERSION = 1
SUFFIX = ".tokens"

_PREFIX = struct.Struct("<8sII")
_ALIGN = 64
_RESERVED_BYTES = 8192
_CHECKED_AT_ONCE = 1 << 20
_DTYPES = ("uint8", "uint16", "uint32")
_COUNTS = ("tokens", "documents", "largest", "bytes")


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Whether it is a regular file that begins as a shard does."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def write_shard(path: Path, tokenizer: Tokenizer, fill: Callable[[Callable[[npt.NDArray[Any]], None]], TextFacts]) -> None:
    """A shard at `path`. fill(write) hands over the tokens, part by part, and returns what there is to say of them.

    Not atomic: give it the temporary file of `write_atomic`. Only the offsets are held in memory.
    """
    dtype = smallest_dtype(tokenizer.vocab_size).newbyteorder("<")
    said = tokenizer.to_dict()
    # The header stands before the tokens and is known after them: its place is kept free.
    room = _PREFIX.size + len(json.dumps(said)) + _RESERVED_BYTES
    start = -(-room // _ALIGN) * _ALIGN
    count = largest = 0
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(start)

        def write(ids: npt.NDArray[Any]) -> None:
            nonlocal count, largest
            file.write(np.ascontiguousarray(ids, dtype=dtype).data)
            count += len(ids)
            largest = max(largest, int(ids.max()) if len(ids) else 0)

        facts = fill(write)
        file.write(bytes(-count * dtype.itemsize % 8))
        file.write(np.ascontiguousarray(facts.offsets, dtype="<i8").data)
        header = {
            "dtype": dtype.name,
            "tokens": count,
            "documents": len(facts.offsets) - 1,
            "largest": largest,
            "bytes": facts.num_bytes,
            "tokenizer": said,
            "fingerprint": facts.fingerprint,
            "fingerprint_packed": facts.fingerprint_packed,
            "broken": [line[:500] for line in facts.broken],
        }
        text = json.dumps(header).encode()
        file.seek(0)
        file.write(_PREFIX.pack(MAGIC, VERSION, start - _PREFIX.size))
        assert len(text) <= start - _PREFIX.size, "the header outgrew its place"
        file.write(text.ljust(start - _PREFIX.size))


def read_shard(path: str | os.PathLike[str]) -> tuple[TokenText, Tokenizer]:
    """A shard, its tokens and offsets as np.memmap, and the tokenizer that made it.

    NsaError (exit 3): not a shard, of a newer version, truncated, or with a header or offsets that cannot be right.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header, start = _header(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise bad_input(f"cannot read {path}: {error.strerror or error}", "check that it is a readable file") from error
    dtype, tokens, documents = np.dtype(header["dtype"]).newbyteorder("<"), header["tokens"], header["documents"]
    behind = start + -(-tokens * dtype.itemsize // 8) * 8
    whole = behind + 8 * (documents + 1)
    if size != whole:
        raise _damaged(path, f"it has {size:,} bytes, and its header says {whole:,}")
    try:
        tokenizer = tokenizer_from_dict(header["tokenizer"])
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if tokens and header["largest"] >= tokenizer.vocab_size:
        raise _damaged(path, f"token id {header['largest']} is beyond its vocabulary of {tokenizer.vocab_size}")
    ids = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(tokens,)) if tokens else np.empty(0, dtype)
    offsets = np.memmap(path, dtype="<i8", mode="r", offset=behind, shape=(documents + 1,))
    _check_offsets(path, offsets, tokens)
    facts = TextFacts(offsets, header["bytes"], header["fingerprint"], header["fingerprint_packed"], tuple(header["broken"]))
    return TokenText(ids, facts), tokenizer


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, each value of its type, and where the tokens begin."""
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        raise bad_input(f"{path} is not a token shard", "nsa train --shards FOLDER writes them")
    if len(prefix) < _PREFIX.size:
        raise _damaged(path, "it ends within its header")
    _, version, length = _PREFIX.unpack(prefix)
    if version > VERSION:
        message = f"{path} is a token shard of version {version}, and this nsa reads up to {VERSION}"
        raise bad_input(message, "pip install -U nsa-cli")
    if version < 1:
        raise _damaged(path, f"version {version}")
    text = file.read(length)
    if len(text) < length:
        raise _damaged(path, "it ends within its header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    if wrong := _wrong_field(header):
        raise _damaged(path, f"{wrong} is {header.get(wrong)!r}"[:200])
    return header, _PREFIX.size + length


def _wrong_field(header: Mapping[str, Any]) -> str | None:
    """The first field that is missing or of the wrong type."""
    for name in _COUNTS:
        if type(header.get(name)) is not int or header[name] < 0:
            return name
    if header["documents"] < 1:
        return "documents"
    if header.get("dtype") not in _DTYPES:
        return "dtype"
    if not isinstance(header.get("tokenizer"), dict):
        return "tokenizer"
    for name in ("fingerprint", "fingerprint_packed"):
        if not isinstance(header.get(name), str):
            return name
    lines = header.get("broken")
    return None if isinstance(lines, list) and all(isinstance(line, str) for line in lines) else "broken"


def _check_offsets(path: Path, offsets: npt.NDArray[np.int64], tokens: int) -> None:
    ascending = offsets[0] == 0 and offsets[-1] == tokens
    for start in range(0, len(offsets), _CHECKED_AT_ONCE):
        ascending = ascending and bool((np.diff(offsets[start : start + _CHECKED_AT_ONCE + 1]) >= 0).all())
    if not ascending:
        raise _damaged(path, f"its documents do not ascend from 0 to its {tokens:,} tokens")


def _damaged(path: Path, reason: str) -> Exception:
    return bad_input(f"{path} is a damaged token shard: {reason}", "remove it; nsa train makes it again from the text")


def expect_random_access(tokens: npt.NDArray[Any]) -> None:
    """Tell the system not to read ahead in mapped tokens: windows lie anywhere (8 times as fast from a cold disk)."""
    mapped = tokens.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
