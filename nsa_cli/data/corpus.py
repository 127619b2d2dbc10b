"""The training data of one run: sources on the command line in, token ids and documents out, the same every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nsa_cli.data.cache import IN_MEMORY_BYTES, Notify, default_folder, sharded_text, text_size
from nsa_cli.data.documents import Documents
from nsa_cli.data.groups import Group, parse_data
from nsa_cli.data.mixture import Mixture, Source
from nsa_cli.data.reading import Broken, bad_input, read_pieces, shown
from nsa_cli.data.shards import expect_random_access, is_shard, read_shard
from nsa_cli.data.synthetic import Synthetic, make_synthetic
from nsa_cli.data.text import TokenText, tokens_in_memory
from nsa_cli.data.tokenizer import Tokenizer

_COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens to judge by.

    train, val: 1-D ids, the smallest of uint8, uint16 and uint32 that holds the vocabulary; val is the text's end. Mapped
    into memory where they come from a shard; of several texts, a Source.
    train_bytes, val_bytes: bytes of text that they stand for. fingerprint: sha256 (hex) over the text, the tokenizer
    and, where windows keep documents apart, their ends. sources: every file read, in order, "-" for stdin.
    train_documents, val_documents: the same tokens as documents; None where there is one alone, or a plain stream.
    notices: what of the input was passed over or repaired, lines for the user. weights: of the sources that validation tells
    apart, by name.
    """

    train: npt.NDArray[Any] | Source
    val: npt.NDArray[Any] | Source
    train_bytes: int
    val_bytes: int
    fingerprint: str
    sources: list[str]
    tokenizer: Tokenizer
    train_documents: Documents | None = None
    val_documents: Documents | None = None
    notices: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})

    @property
    def train_tokens(self) -> int | None:
        """How many there are; None: as many as are asked for."""
        return _tokens(self.train)

    @property
    def val_tokens(self) -> int | None:
        """How many there are; None: as many as are asked for."""
        return _tokens(self.val)

    @property
    def training(self) -> npt.NDArray[Any] | Source:
        """What training windows are drawn from."""
        return self.train if self.train_documents is None else self.train_documents

    @property
    def validation(self) -> npt.NDArray[Any] | Source:
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
    strict: bool = True,
    shards: Path | None = None,
    notify: Notify | None = None,
) -> Corpus:
    """Read, tokenize and split.

    sources, in the order given:
      a file: its bytes; `.gz` is unpacked; of `.jsonl` and `.ndjson` the string under `text_key` of every line's
        object, of `.parquet` (extra `data`) that column of every row;
      a folder: the files below it whose suffix is in TEXT_SUFFIXES (or that and .gz), sorted by path; names that begin with
        a dot are skipped, as is `*.metrics.jsonl`, what nsa writes beside a checkpoint; links to folders are not followed;
      a glob that the shell left as it is: its matches, sorted; `**` crosses folders;
      `-`: stdin, to its end;
      `synthetic:NAME,...`, a task (nsa_cli.data.synthetic), alone or with a weight;
      a token shard (nsa_cli.data.shards), known by its first bytes; a folder without text files is its `*.tokens`.
    A file reached twice is read once: its copy in the held-out tail would be validation on training data. Between two
    files (or records) a newline is added where the first does not end with one.

    All files of text are one text. Where there are shards as well, or several, each text's windows come up by its share of
    the tokens. `SOURCE@WEIGHT`, for every source, makes a text of each, whose windows come up by weight. Every text holds
    out a tail of its own.

    pack: each file and each record is a document, which no other sees (nsa_cli.data.documents); False: one stream.
    strict: refuse broken input (a line of .jsonl without text, a damaged .gz, bytes that are not UTF-8 for a tokenizer that
    needs it); False: pass it over or repair it, and say so in `notices`. With nothing else there it is refused all the same.
    shards: a folder for token shards. Text of more than IN_MEMORY_BYTES is never in memory whole: it is tokenized into a
    shard there, or in the user's cache. notify: told, in one line each, what takes long.

    The validation set is the last val_fraction of the tokens, rounded, but never so few or so many that either part
    has less than the context + 1 tokens of one window; val_fraction 0 leaves it empty.

    Raises NsaError (exit 3): a source missing, unreadable, without text, damaged or not text; too few tokens; a shard of
    another tokenizer.
    """
    groups = parse_data(sources)
    notify = notify or _nobody
    loaded: list[tuple[Group, str, TokenText]] = []
    made: list[tuple[Group, Corpus]] = []
    for group in groups:
        if group.task:
            source = make_synthetic(group.task, tokenizer, context=context, pack=pack)
            made.append((group, _synthetic(source, group.names, val_fraction)))
            continue
        files, kept = _apart(group.names)
        if files:
            label = shown(files[0]) if len(files) == 1 else f"{len(files)} files"
            text = _read_text(files, tokenizer, text_key, stdin, Broken(strict=strict), shards, notify)
            if not len(text.tokens):
                raise bad_input(f"no training data: {label}, nothing in it", "give a file with some text in it")
            loaded.append((group, label, text))
        loaded += [(group, name, _shard(name, tokenizer)) for name in kept]
    notices = [f"{label}: {line}" if len(loaded) > 1 else line for _, label, text in loaded for line in text.facts.broken]
    for line in notices:
        if strict:
            raise bad_input(line, "leave out --strict, or make the token shard again from sound text")
        notify(line)
    names = [name for group in groups for name in group.names]
    parts = [_split(label, text, tokenizer, names, val_fraction, context, pack) for _, label, text in loaded]
    for _, _, text in loaded:
        expect_random_access(text.tokens)
    parts += [corpus for _, corpus in made]
    members = [group for group, *_ in loaded] + [group for group, _ in made]
    corpus = parts[0] if len(parts) == 1 else _mixed(parts, members, names, context)
    return replace(corpus, notices=tuple(notices))


def shard_tokenizer(sources: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of the first token shard among the sources; None where there is none."""
    names = (name for group in parse_data(sources) if not group.task for name in group.names)
    shard = next((name for name in names if name != "-" and is_shard(name)), None)
    return None if shard is None else read_shard(shard)[1]


def _nobody(line: str) -> None: ...


def _apart(names: list[str]) -> tuple[list[str], list[str]]:
    """Files of text, and shards."""
    sides: tuple[list[str], list[str]] = ([], [])
    for name in names:
        sides[name != "-" and is_shard(name)].append(name)
    return sides


def _read_text(
    files: list[str],
    tokenizer: Tokenizer,
    text_key: str,
    stdin: BinaryIO | None,
    broken: Broken,
    shards: Path | None,
    notify: Notify,
) -> TokenText:
    if shards is None and text_size(files) <= IN_MEMORY_BYTES:
        return tokens_in_memory(read_pieces(files, text_key, stdin, broken), tokenizer, broken)
    folder = shards or default_folder()
    return sharded_text(files, tokenizer, folder=folder, text_key=text_key, stdin=stdin, broken=broken, notify=notify)


def _shard(name: str, tokenizer: Tokenizer) -> TokenText:
    text, made_by = read_shard(name)
    if made_by.to_dict() != tokenizer.to_dict():
        kind = "other " if made_by.name == tokenizer.name else ""
        message = f"{name} holds tokens of {kind}{made_by.name}, and this run's tokenizer is {tokenizer.name}"
        raise bad_input(message, "give its own --tokenizer, or train on the text itself")
    return text


def _split(
    label: str, text: TokenText, tokenizer: Tokenizer, names: list[str], val_fraction: float, context: int, pack: bool
) -> Corpus:
    """One text and its held-out tail."""
    tokens, facts = text.tokens, text.facts
    packed = pack and len(facts.offsets) > 2 and context > 1  # a window of one token has no neighbour to keep apart
    cut = len(tokens) - _held_out(len(tokens), val_fraction, context, label)
    val_bytes = _count_bytes(tokenizer, tokens[cut:])
    return Corpus(
        train=tokens[:cut],
        val=tokens[cut:],
        train_bytes=max(0, facts.num_bytes - val_bytes),
        val_bytes=val_bytes,
        fingerprint=facts.fingerprint_packed if packed else facts.fingerprint,
        sources=names,
        tokenizer=tokenizer,
        train_documents=Documents(tokens, facts.offsets, 0, cut) if packed else None,
        val_documents=Documents(tokens, facts.offsets, cut, len(tokens)) if packed and cut < len(tokens) else None,
    )


def _synthetic(source: Synthetic, names: list[str], val_fraction: float) -> Corpus:
    """A task; val_fraction 0 leaves it without validation, any other with a whole one."""
    nothing: npt.NDArray[Any] = np.empty(0, np.uint8)
    val = source if val_fraction > 0 else nothing
    return Corpus(source, val, 0, 0, source.fingerprint, names, source.tokenizer)


def _count_bytes(tokenizer: Tokenizer, tokens: npt.NDArray[Any]) -> int:
    starts = range(0, len(tokens), _COUNTED_AT_ONCE)
    return sum(tokenizer.count_bytes(tokens[start : start + _COUNTED_AT_ONCE]) for start in starts)


def _mixed(parts: Sequence[Corpus], groups: Sequence[Group], names: list[str], context: int) -> Corpus:
    """Several texts as one corpus: groups by weight, the texts of a group by size."""
    sizes = [float(max(len(part.train) - context, 1)) for part in parts]
    totals = {group.label: 0.0 for group in groups}
    for group, size in zip(groups, sizes, strict=True):
        totals[group.label] += size
    weights = [group.weight * size / totals[group.label] for group, size in zip(groups, sizes, strict=True)]
    labels = [group.label for group in groups]
    train, val = (_mixture([side(part) for part in parts], weights, labels) for side in (_training, _validation))
    said = json.dumps([[part.fingerprint, weight] for part, weight in zip(parts, weights, strict=True)])
    return Corpus(
        train=train,
        val=val,
        # Bits per byte mean nothing where some windows are made of no text.
        train_bytes=0 if train.endless else sum(part.train_bytes for part in parts),
        val_bytes=0 if val.endless else sum(part.val_bytes for part in parts),
        fingerprint=hashlib.sha256(said.encode()).hexdigest(),
        sources=names,
        tokenizer=parts[0].tokenizer,
        weights={group.label: group.weight for group in groups},
    )


def _tokens(side: npt.NDArray[Any] | Source) -> int | None:
    return len(side) if isinstance(side, np.ndarray) or not side.endless else None


def _training(part: Corpus) -> npt.NDArray[Any] | Source:
    return part.training


def _validation(part: Corpus) -> npt.NDArray[Any] | Source:
    return part.validation


def _mixture(sides: Sequence[npt.NDArray[Any] | Source], weights: Sequence[float], names: Sequence[str]) -> Mixture:
    return Mixture(tuple(_as_source(side) for side in sides), tuple(weights), tuple(names))


def _as_source(tokens: npt.NDArray[Any] | Source) -> Source:
    if isinstance(tokens, np.ndarray):
        return Documents(tokens, np.array([0, len(tokens)]), 0, len(tokens))
    return tokens


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
