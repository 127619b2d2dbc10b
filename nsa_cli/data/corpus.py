"""The training data of one run: sources on the command line in, token ids and documents out, the same every time."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nsa_cli.data.documents import Documents
from nsa_cli.data.reading import Piece, bad_input, expand, read_pieces, shown
from nsa_cli.data.tokenizer import Tokenizer
from nsa_cli.errors import NsaError


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens to judge by.

    train, val: 1-D ids, the smallest of uint8, uint16 and uint32 that holds the vocabulary; val is the text's end.
    train_bytes, val_bytes: bytes of text that they stand for. fingerprint: sha256 (hex) over the text, the tokenizer
    and, where windows keep documents apart, their ends. sources: every file read, in order, "-" for stdin.
    train_documents, val_documents: the same tokens as documents; None where there is one alone, or a plain stream.
    """

    train: npt.NDArray[Any]
    val: npt.NDArray[Any]
    train_bytes: int
    val_bytes: int
    fingerprint: str
    sources: list[str]
    tokenizer: Tokenizer
    train_documents: Documents | None = None
    val_documents: Documents | None = None

    @property
    def training(self) -> npt.NDArray[Any] | Documents:
        """What training windows are drawn from."""
        return self.train if self.train_documents is None else self.train_documents

    @property
    def validation(self) -> npt.NDArray[Any] | Documents:
        """What validation windows are cut from."""
        return self.val if self.val_documents is None else self.val_documents


def load_corpus(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    context: int,
    text_key: str = "text",
    stdin: BinaryIO | None = None,
    pack: bool = True,
) -> Corpus:
    """Read, tokenize and split.

    sources, in the order given:
      a file: its bytes; `.gz` is unpacked; of `.jsonl` and `.ndjson` the string under `text_key` of every line's
      object; a folder: the files below it whose suffix is in TEXT_SUFFIXES (or that and .gz), sorted by path; names
        that begin with a dot are skipped, as is `*.metrics.jsonl`, what nsa writes beside a checkpoint; links to folders
        are not followed;
      a glob that the shell left as it is: its matches, sorted; `**` crosses folders;
      `-`: stdin, to its end.
    A file reached twice is read once: its copy in the held-out tail would be validation on training data. Between two
    files (or records) a newline is added where the first does not end with one.

    pack: each file and each record is a document, which no other sees (nsa_cli.data.documents); False: one stream.

    The validation set is the last val_fraction of the tokens, rounded, but never so few or so many that either part
    has less than the context + 1 tokens of one window; val_fraction 0 leaves it empty.

    Raises NsaError (exit 3): a source missing, unreadable, without text, damaged or not text; too few tokens.
    """
    names = expand(sources)
    label = shown(names[0]) if len(names) == 1 else f"{len(names)} files"
    text = tokenize(read_pieces(names, text_key, stdin), tokenizer)
    if not len(text.tokens):
        raise bad_input(f"no training data: {label}, nothing in it", "give a file with some text in it")
    tokens, documents = text.tokens, len(text.offsets) - 1
    packed = pack and documents > 1
    cut = len(tokens) - _held_out(len(tokens), val_fraction, context, label)
    val_bytes = tokenizer.count_bytes(tokens[cut:])
    return Corpus(
        train=tokens[:cut],
        val=tokens[cut:],
        train_bytes=max(0, text.num_bytes - val_bytes),
        val_bytes=val_bytes,
        fingerprint=text.fingerprint_packed if packed else text.fingerprint,
        sources=names,
        tokenizer=tokenizer,
        train_documents=Documents(tokens, text.offsets, 0, cut) if packed else None,
        val_documents=Documents(tokens, text.offsets, cut, len(tokens)) if packed and cut < len(tokens) else None,
    )


@dataclass(frozen=True)
class TokenText:
    """Tokenized documents.

    offsets: int64 [documents + 1], where each begins, and the number of tokens. num_bytes: of the text.
    fingerprint: of text and tokenizer; fingerprint_packed: of them and the offsets.
    """

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    num_bytes: int
    fingerprint: str
    fingerprint_packed: str


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer) -> TokenText:
    """The documents in tokens, each by itself: no token reaches from one into the next.

    A document of one token, which has nothing to predict, goes with its neighbour.
    """
    digest = hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode())
    parts: list[npt.NDArray[Any]] = []
    ends = array("q", [0])
    total = num_bytes = 0
    for piece in pieces:
        digest.update(piece.text)
        ids = _encode(tokenizer, piece)
        parts.append(ids)
        total += len(ids)
        num_bytes += len(piece.text)
        if piece.last and total - ends[-1] >= 2:
            ends.append(total)
    if len(ends) > 1:
        ends.pop()
    ends.append(total)
    tokens = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    offsets = np.frombuffer(ends, dtype=np.int64)
    fingerprint = digest.hexdigest()
    packed = hashlib.sha256(fingerprint.encode() + offsets.tobytes()).hexdigest()
    return TokenText(tokens, offsets, num_bytes, fingerprint, packed)


def _encode(tokenizer: Tokenizer, piece: Piece) -> npt.NDArray[Any]:
    try:
        return tokenizer.encode(piece.text)
    except NsaError as error:
        raise NsaError(f"{shown(piece.name)}: {error.message}", error.hint, error.exit_code) from error


def _held_out(tokens: int, val_fraction: float, context: int, label: str) -> int:
    """How many tokens at the end are the validation set."""
    window = context + 1
    needed = window if val_fraction == 0 else 2 * window
    if tokens < needed:
        parts = "one window" if val_fraction == 0 else "one window to train on and one to validate on"
        less = "" if val_fraction == 0 else ", or --val-fraction 0"
        counts = f"{label} has {tokens:,} tokens, and --seq-len {context} needs at least {needed:,}"
        raise bad_input(f"too little data: {counts} ({parts})", f"give more text, a smaller --seq-len{less}")
    if val_fraction == 0:
        return 0
    return min(max(round(tokens * val_fraction), window), tokens - window)
