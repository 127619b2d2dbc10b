"""Bytes to token ids and back: the bytes themselves, or a BPE vocabulary read through the `tokenizers` package.

A tokenizer travels inside the checkpoint as a dict of JSON values (`to_dict`), so that a model is never separated
from the meaning of its ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nsa_cli.errors import ExitCode, NsaError

Ids = npt.NDArray[Any]

_CHUNK_CHARS = 1 << 20


class Tokenizer(Protocol):
    """What the rest of the house asks of a tokenizer.

    name: "bytes" or "bpe". vocab_size: ids are 0 .. vocab_size - 1.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, data: bytes) -> Ids:
        """Token ids of `data`: 1-D, the smallest of uint8, uint16 and uint32 that holds vocab_size - 1."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of the text, an unfinished UTF-8 character at the end included. An id out of range: ValueError."""

    def count_bytes(self, ids: Ids) -> int:
        """len(decode(ids)), without making the text: what turns a loss a token into bits a byte."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which `tokenizer_from_dict` makes an equal tokenizer."""


class ByteTokenizer:
    """One token a byte, 256 of them: every file is valid, and decoding is exact."""

    name = "bytes"
    vocab_size = 256

    def encode(self, data: bytes) -> Ids:
        """The bytes as uint8, without a copy (hence read-only)."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The same bytes again; an id outside 0 .. 255 raises ValueError."""
        _check_ids(ids, self.vocab_size)
        return bytes(int(i) for i in ids)

    def count_bytes(self, ids: Ids) -> int:
        return len(ids)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


class BPETokenizer:
    """A `tokenizer.json` of the `tokenizers` package (extra `bpe`).

    Truncation and padding set in the file are switched off: they would drop data or add to it. Special tokens are not
    added. Texts are encoded in pieces of about 2^20 characters cut after a line end, so that memory stays bounded; a
    token that would have crossed such a cut is two tokens.

    `decode` is exact byte by byte for byte-level vocabularies (GPT-2's kind): decode(a + b) == decode(a) + decode(b),
    an unfinished character included. Other kinds join words by rule, so that text is stable only from the left: a
    continuation's text is decode(prompt + continuation)[len(decode(prompt)):], which is right for every tokenizer.
    """

    name = "bpe"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """spec: the parsed tokenizer.json. NsaError without the `tokenizers` package, ValueError for a bad spec."""
        self._spec = dict(spec)
        try:
            self._inner = _tokenizers().Tokenizer.from_str(json.dumps(self._spec))
        except NsaError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"not a tokenizer that the tokenizers package reads: {_one_line(error)}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        ids = self._inner.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError("the tokenizer's vocabulary is empty")
        # Ids may have holes (a removed token): the embedding needs a row up to the highest.
        self.vocab_size: int = max(ids.values()) + 1
        self._dtype = smallest_dtype(self.vocab_size)
        self._bytes = _token_bytes(self._inner, self.vocab_size) if _is_byte_level(self._spec) else None

    def encode(self, data: bytes) -> Ids:
        """Ids of UTF-8 text. Other bytes raise NsaError (exit 3) with the offset of the first wrong one."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
            hint = "convert it to UTF-8, or leave out --tokenizer: the default tokens are bytes and take any file"
            raise NsaError(f"{wrong}, which the BPE tokenizer needs", hint, ExitCode.BAD_INPUT) from error
        encoded = self._inner.encode_batch(list(_pieces(text)), add_special_tokens=False)  # a thread a piece
        pieces = [np.asarray(piece.ids, dtype=self._dtype) for piece in encoded]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self._dtype)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of the text; an id outside the vocabulary raises ValueError, one that no token has gives nothing."""
        ids = [int(i) for i in ids]
        _check_ids(ids, self.vocab_size)
        if self._bytes is not None:
            return b"".join([self._bytes[i] for i in ids])
        # Byte-fallback tokens at the end may be the first half of a character: the package would print U+FFFD, which
        # the next token would change. Their bytes are known, so they are appended as they are.
        tail: list[int] = []
        while ids and (byte := _fallback_byte(self._inner.id_to_token(ids[-1]))) is not None:
            tail.append(byte)
            ids.pop()
        text: str = self._inner.decode(ids, skip_special_tokens=False)
        return text.encode("utf-8") + bytes(reversed(tail))

    def count_bytes(self, ids: Ids) -> int:
        if self._bytes is None:
            return len(self.decode(ids.tolist()))
        lengths = np.array([len(token) for token in self._bytes], dtype=np.int64)
        return int(np.bincount(ids, minlength=self.vocab_size) @ lengths)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "tokenizer": self._spec}


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds the vocabulary."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def load_tokenizer(path: str | None) -> Tokenizer:
    """The byte tokenizer for None, else the BPE tokenizer of a tokenizer.json. A bad file raises NsaError (exit 3)."""
    if path is None:
        return ByteTokenizer()
    hint = "--tokenizer takes a tokenizer.json of the tokenizers package; without it the tokens are bytes"
    try:
        spec = json.loads(Path(path).read_bytes())
        if not isinstance(spec, dict):
            raise ValueError("not a JSON object")
        return BPETokenizer(spec)
    except OSError as error:
        raise NsaError(f"cannot read tokenizer {path}: {error.strerror}", hint, ExitCode.BAD_INPUT) from error
    except (ValueError, RecursionError) as error:
        raise NsaError(f"tokenizer {path}: {_one_line(error)}", hint, ExitCode.BAD_INPUT) from error


def tokenizer_from_dict(values: Mapping[str, Any]) -> Tokenizer:
    """Inverse of `Tokenizer.to_dict`. ValueError for anything else; NsaError without the `tokenizers` package."""
    name = values.get("name")
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == BPETokenizer.name and isinstance(values.get("tokenizer"), Mapping):
        return BPETokenizer(values["tokenizer"])
    raise ValueError(f"tokenizer name = {name!r}: must be bytes, or bpe with its vocabulary")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        message = "a BPE tokenizer needs the tokenizers package, which is not installed"
        raise NsaError(message, "pip install 'nsa-cli[bpe]'", ExitCode.FAILURE) from error
    return tokenizers


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"token id {wrong}: must be between 0 and {vocab_size - 1}")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    decoder = spec.get("decoder") or {}
    return decoder.get("type") == "ByteLevel"


def _token_bytes(inner: Any, vocab_size: int) -> list[bytes]:
    """Bytes of every id of a byte-level vocabulary, which spells each byte as one printable character."""
    spelled = _byte_of_char()
    added = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
    table: list[bytes] = []
    for i in range(vocab_size):
        token = inner.id_to_token(i) or ""
        if i in added or any(char not in spelled for char in token):
            table.append(token.encode("utf-8"))
        else:
            table.append(bytes(spelled[char] for char in token))
    return table


def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the 68 others for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _fallback_byte(token: str | None) -> int | None:
    if token is None or len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
