"""Documents to tokens, part by part: what is in memory at once is one piece of the text, and where documents end."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nsa_cli.data.reading import NOT_UTF8, Broken, Piece, shown
from nsa_cli.data.tokenizer import Tokenizer, smallest_dtype
from nsa_cli.errors import NsaError


@dataclass(frozen=True, eq=False)
class TextFacts:
    """What is to be said of tokenized documents besides the tokens.

    offsets: int64 [documents + 1], where each begins, and the number of tokens. num_bytes: of the text.
    fingerprint: sha256 (hex) of text and tokenizer; fingerprint_packed: of them and the offsets.
    broken: what was wrong with the text and passed over, lines for the user.
    """

    offsets: npt.NDArray[np.int64]
    num_bytes: int
    fingerprint: str
    fingerprint_packed: str
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenText:
    """Tokenized documents: 1-D ids, in memory or mapped into it."""

    tokens: npt.NDArray[Any]
    facts: TextFacts


def tokenize(
    pieces: Iterable[Piece], tokenizer: Tokenizer, write: Callable[[npt.NDArray[Any]], None], broken: Broken
) -> TextFacts:
    """The documents' tokens through `write`, each document by itself: no token reaches from one into the next.

    A document of one token, which has nothing to predict, goes with its neighbour. `broken` is the one that the pieces were
    read with; where nothing but broken input came, its first error is raised.
    """
    digest = hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode())
    ends = array("q", [0])
    total = num_bytes = 0
    for piece in pieces:
        text, ids = _encode(tokenizer, piece, broken)
        digest.update(text)
        write(ids)
        total += len(ids)
        num_bytes += len(text)
        if piece.last and total - ends[-1] >= 2:
            ends.append(total)
    if total == 0:
        broken.refuse_nothing_left()
    if len(ends) > 1:
        ends.pop()
    ends.append(total)
    offsets = np.frombuffer(ends, dtype=np.int64)
    fingerprint = digest.hexdigest()
    packed = hashlib.sha256(fingerprint.encode())
    packed.update(offsets.data)
    return TextFacts(offsets, num_bytes, fingerprint, packed.hexdigest(), broken.lines())


def tokens_in_memory(pieces: Iterable[Piece], tokenizer: Tokenizer, broken: Broken) -> TokenText:
    """`tokenize` into an array."""
    data, dtype = bytearray(), smallest_dtype(tokenizer.vocab_size)  # one buffer: a million lines would be as many arrays
    facts = tokenize(pieces, tokenizer, lambda ids: data.extend(ids.astype(dtype, copy=False).data), broken)
    return TokenText(np.frombuffer(data, dtype=dtype) if data else np.empty(0, dtype), facts)


def _encode(tokenizer: Tokenizer, piece: Piece, broken: Broken) -> tuple[bytes, npt.NDArray[Any]]:
    """The piece's text and tokens; where the tokenizer wants UTF-8 and the text is not, U+FFFD replaces what is wrong."""
    text = piece.text
    try:
        return text, tokenizer.encode(text)
    except NsaError as error:
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as wrong:
            where = f"byte 0x{text[wrong.start]:02x} at offset {piece.offset + wrong.start}"
            message = f"{shown(piece.name)}: {where} is not UTF-8, which the tokenizer needs"
            repaired = text.decode("utf-8", errors="replace")
            count = repaired.count("\ufffd") - text.count("\ufffd".encode())
            broken.add(NOT_UTF8, NsaError(message, error.hint, error.exit_code), count)
            return repaired.encode(), tokenizer.encode(repaired.encode())
        raise
