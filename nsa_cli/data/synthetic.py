"""Tasks that tell whether attention finds what it needs: made as they are trained on, at any length.

`synthetic:NAME` or `synthetic:NAME,parameter=value,...` stands for a task where DATA stands for a file. A window is a function
of one 64-bit draw, and only answers have targets. `length` is the tokens of one example, the context if left out; shorter
examples follow one another in a window, each a document. Ids are the tokenizer's: bytes, unless another is given.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nsa_cli.data.documents import NO_TARGET, Windows
from nsa_cli.data.reading import bad_input
from nsa_cli.data.sampler import step_draws
from nsa_cli.data.tokenizer import Tokenizer
from nsa_cli.errors import NsaError

PREFIX = "synthetic:"

_GENERATOR_VERSION = 1
_VALIDATION_LANE = 1
Example = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Draws:
    """Random numbers from one draw. Raw bits alone: their stream is fixed for good, numpy's distributions are not."""

    def __init__(self, draw: int) -> None:
        self._raw = np.random.Philox(key=np.array([draw, 0], dtype=np.uint64)).random_raw

    def below(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """Independent numbers in 0 .. bound - 1."""
        return (self._raw(count) % np.uint64(bound)).astype(np.int64)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Independent numbers in (0, 1)."""
        return ((self._raw(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def distinct(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """`count` different numbers in 0 .. bound - 1, in random order."""
        return np.argsort(self._raw(bound), kind="stable")[:count]


@dataclass(frozen=True)
class Task(ABC):
    """One task; its fields are its parameters. ValueError in __post_init__ names the wrong one."""

    NAME: ClassVar[str]

    @abstractmethod
    def least_length(self, tokenizer: Tokenizer) -> int:
        """Tokens of the shortest example; ValueError for parameters that the vocabulary cannot hold."""

    @abstractmethod
    def example(self, draws: Draws, length: int, tokenizer: Tokenizer) -> Example:
        """Inputs and targets, int64 [length]; NO_TARGET wherever no answer is asked for."""


@dataclass(frozen=True)
class Passkey(Task):
    """Find a number in a long text (Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300).

    Filler sentences; somewhere among them "The pass key is 71432. Remember it. 71432 is the pass key."; at the end "What is
    the pass key? The pass key is ", whose answer is the number. The paper's opening instruction is left out.

    digits: of the number. depth: where it stands, from 0 (at the beginning) to 1 (just before the question); -1: anywhere.
    """

    NAME: ClassVar[str] = "passkey"
    FILLER: ClassVar[bytes] = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    QUESTION: ClassVar[bytes] = b"What is the pass key? The pass key is "

    digits: int = 5
    depth: float = -1.0

    def __post_init__(self) -> None:
        _require(1 <= self.digits <= 100, "digits", self.digits, "must be between 1 and 100")
        _require(self.depth == -1 or 0 <= self.depth <= 1, "depth", self.depth, "must be between 0 and 1, or -1 for anywhere")

    def least_length(self, tokenizer: Tokenizer) -> int:
        words = sum(len(tokenizer.encode(text)) for text in (*self._needle(b""), self.QUESTION))
        return words + 3 * self.digits - 1

    def example(self, draws: Draws, length: int, tokenizer: Tokenizer) -> Example:
        key = "".join(map(str, draws.below(10, self.digits))).encode()
        place = float(draws.uniform(1)[0]) if self.depth == -1 else self.depth
        before, between, after = self._needle(key)
        needle = [tokenizer.encode(text) for text in (before, key, between, key, after)]
        question, answer = tokenizer.encode(self.QUESTION), tokenizer.encode(key)
        filler = tokenizer.encode(self.FILLER)
        left = length + 1 - sum(map(len, needle)) - len(question) - len(answer)
        filling = np.resize(filler, left)
        cut = round(place * left)
        parts = [filling[:cut], *needle, filling[cut:], question, answer]
        return _answered(np.concatenate(parts).astype(np.int64), np.arange(length + 1) > length - len(answer))

    def _needle(self, key: bytes) -> tuple[bytes, bytes, bytes]:
        return b"The pass key is ", b". Remember it. ", b" is the pass key. "


@dataclass(frozen=True)
class Mqar(Task):
    """Multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927).

    `pairs` different keys, each followed by its value; then every key once more, at places that a power law over the distance
    draws, its value the answer. Keys are ids below half of the vocabulary, values and what lies between the others. The value
    stands behind its key the second time as well, as text would have it.

    power: a of the density a x^(a - 1) over the places left: below 1, most questions come soon.
    """

    NAME: ClassVar[str] = "mqar"

    pairs: int = 8
    power: float = 0.01

    def __post_init__(self) -> None:
        _require(self.pairs >= 1, "pairs", self.pairs, "must be at least 1")
        _require(0 < self.power < math.inf, "power", self.power, "must be above 0")

    def least_length(self, tokenizer: Tokenizer) -> int:
        keys = tokenizer.vocab_size // 2
        _require(self.pairs <= keys, "pairs", self.pairs, f"must be at most {keys}, the keys of a vocabulary of {2 * keys}")
        return 4 * self.pairs - 1

    def example(self, draws: Draws, length: int, tokenizer: Tokenizer) -> Example:
        keys_below, pairs = tokenizer.vocab_size // 2, self.pairs
        values_of = tokenizer.vocab_size - keys_below
        keys = draws.distinct(keys_below, pairs)
        values = keys_below + draws.below(values_of, pairs)
        text = keys_below + draws.below(values_of, length + 1)
        text[: 2 * pairs] = np.stack((keys, values), axis=1).reshape(-1)
        places = (length + 1) // 2 - pairs
        # Weighted choice without replacement: the first of exponential clocks of these rates.
        rates = self.power * np.arange(1, places + 1, dtype=np.float64) ** (self.power - 1)
        chosen = np.argsort(-np.log(draws.uniform(places)) / rates, kind="stable")[:pairs]
        starts = 2 * pairs + 2 * chosen
        text[starts], text[starts + 1] = keys, values
        return _answered(text, np.isin(np.arange(length + 1), starts + 1))


@dataclass(frozen=True)
class Copying(Task):
    """Selective copying (Gu and Dao, "Mamba", arXiv 2312.00752; after Jing et al., arXiv 1706.02761).

    `tokens` symbols stand at random places among noise (id 0); at the end as many marks (id 1) ask for them in order, each
    mark's target one symbol.

    symbols: how many different ones there are, ids 2 and up.
    """

    NAME: ClassVar[str] = "copying"

    tokens: int = 16
    symbols: int = 16

    def __post_init__(self) -> None:
        _require(self.tokens >= 1, "tokens", self.tokens, "must be at least 1")
        _require(self.symbols >= 2, "symbols", self.symbols, "must be at least 2")

    def least_length(self, tokenizer: Tokenizer) -> int:
        most = tokenizer.vocab_size - 2
        _require(self.symbols <= most, "symbols", self.symbols, f"must be at most {most}, the vocabulary less noise and mark")
        return 2 * self.tokens

    def example(self, draws: Draws, length: int, tokenizer: Tokenizer) -> Example:
        inputs = np.zeros(length, dtype=np.int64)
        targets = np.full(length, NO_TARGET)
        places = np.sort(draws.distinct(length - self.tokens, self.tokens))
        inputs[places] = targets[-self.tokens :] = 2 + draws.below(self.symbols, self.tokens)
        inputs[-self.tokens :] = 1
        return inputs, targets


TASKS: dict[str, type[Task]] = {task.NAME: task for task in (Passkey, Mqar, Copying)}


@dataclass(frozen=True, eq=False)
class Synthetic:
    """A task as a Source without end. length: tokens of an example; packed: whether several, or a rest, share a window."""

    task: Task
    length: int
    context: int
    tokenizer: Tokenizer
    packed: bool

    endless: ClassVar[bool] = True

    def __len__(self) -> int:
        """0: there are no tokens before they are asked for."""
        return 0

    def windows(self, draws: npt.NDArray[np.uint64], *, context: int) -> Windows:
        """A window for each draw; what is left of one behind its last whole example is id 0 without targets."""
        assert context == self.context, context
        inputs = np.zeros((len(draws), context), dtype=np.int64)
        targets = np.full_like(inputs, NO_TARGET)
        for row, draw in enumerate(draws):
            stream = Draws(int(draw))
            for start in range(0, context - self.length + 1, self.length):
                part = slice(start, start + self.length)
                inputs[row, part], targets[row, part] = self.task.example(stream, self.length, self.tokenizer)
        begins = np.zeros(inputs.shape, dtype=np.bool_)
        begins[:, :: self.length] = True
        return Windows(inputs, targets, begins if self.packed else None, graded=True)

    def places(self, draws: npt.NDArray[np.uint64], *, context: int) -> list[int | str]:
        """The draws."""
        numbers: list[int | str] = draws.tolist()
        return numbers

    def fixed_windows(self, *, context: int, max_tokens: int) -> Iterator[Windows]:
        """max_tokens // context windows (at least one), from draws that no training step makes."""
        for draw in step_draws(seed=0, step=0, count=max(1, max_tokens // context), lane=_VALIDATION_LANE):
            yield self.windows(np.array([draw], dtype=np.uint64), context=context)

    @property
    def spelled_out(self) -> str:
        """The source with every parameter, given or not: what `make_synthetic` makes this one of."""
        values = {**dataclasses.asdict(self.task), "length": self.length}
        return ",".join([f"{PREFIX}{self.task.NAME}", *(f"{key}={value}" for key, value in values.items())])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the task, its parameters and the tokenizer."""
        said = [_GENERATOR_VERSION, self.task.NAME, dataclasses.asdict(self.task), self.length, self.tokenizer.to_dict()]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def make_synthetic(spec: str, tokenizer: Tokenizer, *, context: int, pack: bool = True) -> Synthetic:
    """The source that `synthetic:NAME,parameter=value` names (`?` and `&` part as well as commas do).

    NsaError (exit 3): an unknown task or parameter, with the nearest one; a value that is none or does not fit.
    """
    name, *settings = re.split("[,?&]", spec.removeprefix(PREFIX))
    if name not in TASKS:
        raise bad_input(f"{spec}: no task {name!r}", f"{_nearest(name, TASKS)}tasks are {', '.join(TASKS)}")
    kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(TASKS[name])}
    kinds["length"] = int
    values: dict[str, Any] = {}
    for setting in filter(None, settings):
        key, _, text = setting.partition("=")
        if key not in kinds:
            raise bad_input(f"{spec}: no parameter {key!r}", f"{_nearest(key, kinds)}{name} takes {', '.join(kinds)}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            wanted = "an integer" if kinds[key] is int else "a number"
            raise bad_input(f"{spec}: {key} {text!r} is not {wanted}", f"write {key}={8 if kinds[key] is int else 0.5}") from None
    length = values.pop("length", context)
    try:
        task = TASKS[name](**values)
        least = task.least_length(tokenizer)
    except ValueError as error:
        raise bad_input(f"{spec}: {error}", f"{name} takes {', '.join(kinds)}") from error
    if not least <= length <= context:
        raise _too_long(spec, length, least, context)
    return Synthetic(task, length, context, tokenizer, packed=pack and length < context)


def _too_long(spec: str, length: int, least: int, context: int) -> NsaError:
    if length > context:
        return bad_input(f"{spec}: length {length} is more than --seq-len {context}", f"--seq-len {length}, or a smaller length")
    hint = f"--seq-len {least}, or parameters that need less"
    return bad_input(f"{spec}: an example takes at least {least} tokens, and it has {length}", hint)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {value!r}: {rule}")


def _answered(text: npt.NDArray[np.int64], answers: npt.NDArray[np.bool_]) -> Example:
    """Inputs and targets of a text [length + 1] whose tokens at `answers` are to be predicted."""
    return text[:-1], np.where(answers, text, NO_TARGET)[1:]
