"""Prompts in, text out: what `nsa sample` reads from stdin and writes to stdout, as bytes.

Framing. Lines: one prompt a line, its newline stripped. Whole: all of the input is one prompt, kept to the byte.
Null: NUL ends a prompt. A newline (NUL with null) follows every continuation, in the order of (prompt, continuation).
Where there are several prompts, one a line, a newline also ends a continuation, so that line i answers prompt i; with
null, NUL does. One prompt's continuations keep their newlines, and so does JSON, whose strings need no frame.

An empty prompt starts from a newline, as if after a blank line: there is no token for "nothing".
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from nsa_cli.data.tokenizer import Tokenizer
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.generation.engine import Continuation, ShouldStop, decode
from nsa_cli.generation.sampling import SamplingConfig
from nsa_cli.model import Transformer

Framing = Literal["lines", "whole", "null"]
Write = Callable[[bytes], object]

_CONTEXT_IDS = 16
# Narrower than 80..BF after these leads, which rules out overlong forms, surrogates and what lies beyond U+10FFFF.
_SECOND_BYTE = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text comes in and goes out.

    framing: see the module's docstring. stops: a continuation ends before any of them. jsonl: one JSON object a
    continuation instead of bytes. echo: the prompt before its continuation (JSON always has it). logprobs: the ids
    and their log-probabilities in the JSON. timings: elapsed seconds in the JSON, which then differs from run to run.
    use_cache=False recomputes every token from the whole text. facts: keys that every JSON object ends with. Wrong
    values raise ValueError.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    framing: Framing = "lines"
    stops: tuple[bytes, ...] = ()
    jsonl: bool = False
    echo: bool = False
    logprobs: bool = False
    timings: bool = False
    use_cache: bool = True
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.framing not in ("lines", "whole", "null"):
            raise ValueError(f"framing = {self.framing!r}: must be one of lines, whole, null")
        if any(not stop for stop in self.stops):
            raise ValueError(f"stop = {self.stops!r}: must not be empty, since that would end every text at once")
        for name in ("logprobs", "timings"):
            if getattr(self, name) and not self.jsonl:
                raise ValueError(f"{name} = True: needs jsonl, since plain text has no place for them")


def split_prompts(data: bytes, framing: Framing) -> list[bytes]:
    """The prompts in `data`; none if it is empty. A frame's end mark is stripped and nothing else: a carriage return
    stays."""
    if not data:
        return []
    if framing == "whole":
        return [data]
    mark = b"\0" if framing == "null" else b"\n"
    return data.removesuffix(mark).split(mark)


def incomplete_tail(data: bytes) -> int:
    """Bytes (0 to 3) at the end of `data` that begin a UTF-8 character and do not finish it. Bytes that can never
    become part of one are not counted: nothing is gained by waiting for them."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead & 0xC0 == 0x80:
            continue
        length = 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 1
        if length <= size:
            return 0
        low, high = _SECOND_BYTE.get(lead, (0x80, 0xBF))
        return size if size == 1 or low <= data[1 - size] <= high else 0
    return 0


class StreamFilter:
    """Text as it may be shown, from bytes as they come: cut before the first stop string, never inside a UTF-8
    character.

    Joined, the outputs of any feeds and of `finish` are the input up to the earliest start of any stop string. Bytes
    that might still turn out to begin a stop string, or that begin a character, are held back; invalid bytes pass as
    they are.
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = b""
        self.stopped = False

    def feed(self, data: bytes) -> bytes:
        """Take some bytes and give those that may be shown; `stopped` tells that a stop string has been found."""
        if self.stopped:
            return b""
        self._held += data
        cut = self._stop_start()
        doubt = self._doubt_start()
        if cut is not None and cut <= doubt:
            self.stopped = True
            shown, self._held = self._held[:cut], b""
            return shown
        # A stop found behind `doubt` must wait: one that starts earlier may yet be completed, and would win.
        safe = self._held[:doubt]
        size = len(safe) - incomplete_tail(safe)
        shown, self._held = self._held[:size], self._held[size:]
        return shown

    def finish(self) -> bytes:
        """What was held back, at the end of the bytes."""
        rest, self._held = self._held[: self._stop_start()], b""
        return rest

    def _stop_start(self) -> int | None:
        """Start of the earliest stop string, or None."""
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _doubt_start(self) -> int:
        """Start of the longest end of the held bytes with which a stop string begins, without being all of it."""
        size = len(self._held)
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for start in range(max(0, size - longest), size):
            end = self._held[start:]
            if any(len(stop) > len(end) and stop.startswith(end) for stop in self._stops):
                return start
        return size


class TokenText:
    """Bytes of one token after another, for any tokenizer.

    Tokenizers that join words by rule give a token's text only in its place: the text is what it adds to the decoded
    ids before it, of which the last few are kept.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = [] if tokenizer.name == "bytes" else list(prompt[-_CONTEXT_IDS:])
        self._new: list[int] = []
        self._given = b""

    def feed(self, token: int) -> bytes:
        """The bytes that `token` adds."""
        if self._tokenizer.name == "bytes":
            return self._tokenizer.decode((token,))
        if len(self._new) == _CONTEXT_IDS:
            self._context, self._new = self._new, []
        before = self._tokenizer.decode(self._context + self._new)
        self._new.append(token)
        after = self._tokenizer.decode(self._context + self._new)
        # Only bytes that were never a character can be spelt anew by what follows; they are out already and stay.
        return after[len(before) :] if after.startswith(before) else self._tokenizer.decode((token,))


@dataclass
class _Pending:
    """One continuation on its way out."""

    text: TokenText
    filter: StreamFilter
    waiting: list[bytes] = field(default_factory=list)
    finished: bool = False


class _Output:
    """Writes continuations in the order of (prompt, continuation), the first unfinished one as it comes."""

    def __init__(
        self,
        prompts: Sequence[bytes],
        ids: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        write: Write,
        options: TextOptions,
    ) -> None:
        self._prompts, self._ids, self._tokenizer, self._write, self._options = prompts, ids, tokenizer, write, options
        self._stops = options.stops
        self._mark = b"\n"
        if not options.jsonl and options.framing == "null":
            self._mark, self._stops = b"\0", (*options.stops, b"\0")
        elif not options.jsonl and len(prompts) > 1:
            self._stops = (*options.stops, b"\n")
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._head = (0, 0)
        self.reasons: Counter[str] = Counter()

    def token(self, prompt: int, continuation: int, token: int) -> bool:
        """Take a token; true once its text holds a stop string."""
        pending = self._at((prompt, continuation))
        self._show((prompt, continuation), pending.filter.feed(pending.text.feed(token)))
        return pending.filter.stopped

    def finish(self, continuation: Continuation) -> None:
        """Take the end of a continuation, and write all that has been waiting for it."""
        key = continuation.prompt, continuation.continuation
        pending = self._at(key)
        self.reasons[continuation.finish_reason] += 1
        self._show(key, pending.filter.finish())
        if self._options.jsonl:
            text = b"".join(pending.waiting)
            pending.waiting = [json_line(continuation, self._prompts[continuation.prompt], text, self._options)]
        else:
            self._show(key, self._mark)
        pending.finished = True
        while (head := self._pending.get(self._head)) is not None and head.finished:
            self._drain(head)
            del self._pending[self._head]
            prompt, number = self._head
            last = number + 1 == self._options.sampling.continuations
            self._head = (prompt + 1, 0) if last else (prompt, number + 1)

    def start(self) -> None:
        """Echo the first prompt before its first token is there."""
        self._at(self._head)
        self._show(self._head, b"")

    def _at(self, key: tuple[int, int]) -> _Pending:
        pending = self._pending.get(key)
        if pending is None:
            pending = _Pending(TokenText(self._tokenizer, self._ids[key[0]]), StreamFilter(self._stops))
            if self._options.echo and not self._options.jsonl:
                pending.waiting.append(self._prompts[key[0]])
            self._pending[key] = pending
        return pending

    def _show(self, key: tuple[int, int], data: bytes) -> None:
        pending = self._pending[key]
        if data:
            pending.waiting.append(data)
        if key == self._head and not self._options.jsonl:
            self._drain(pending)

    def _drain(self, pending: _Pending) -> None:
        for data in pending.waiting:
            self._write(data)
        pending.waiting = []


def json_line(continuation: Continuation, prompt: bytes, text: bytes, options: TextOptions) -> bytes:
    """One line of --jsonl, UTF-8.

    prompt, text: where bytes are not UTF-8 they show U+FFFD, and prompt_base64 or text_base64 holds them whole.
    index: the prompt's. tokens: how many were drawn, a stop string's included. token_ids and logprobs (nats) with
    options.logprobs. Last, options.facts.
    """
    record: dict[str, Any] = {"prompt": None, "text": None, "index": continuation.prompt}
    for name, data in (("prompt", prompt), ("text", text)):
        record[name] = data.decode("utf-8", "replace")
        if record[name].encode("utf-8") != data:
            record[f"{name}_base64"] = base64.b64encode(data).decode("ascii")
    record["continuation"] = continuation.continuation
    record["tokens"] = len(continuation.tokens)
    record["finish_reason"] = continuation.finish_reason
    if options.logprobs:
        record["token_ids"] = continuation.tokens
        record["logprobs"] = continuation.logprobs
    if options.timings:
        record["elapsed_s"] = round(continuation.elapsed_s, 6)
    record |= options.facts
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def run(
    model: Transformer,
    tokenizer: Tokenizer,
    stdin: BinaryIO,
    write: Write,
    options: TextOptions,
    *,
    should_stop: ShouldStop | None = None,
) -> dict[str, Any]:
    """Read prompts from stdin to its end and write their continuations; all of `nsa sample` but its flags.

    write takes bytes as they come and makes them visible at once (it flushes). Every call holds whole UTF-8
    characters, as far as the model drew whole ones. should_stop is polled at every token.

    Returns prompts, continuations, prompt_tokens, tokens, prefill_s, decode_s, tokens_per_s (of decoding), cache_bytes
    (held), read_bytes (of it, by the last step), finish_reasons (a count of each) and
    interrupted. NsaError (exit 3) without a prompt.
    """
    prompts = split_prompts(stdin.read(), options.framing)
    if not prompts:
        hint = "pipe one prompt a line, for example: echo 'Once' | nsa sample CKPT"
        raise NsaError("no prompt on stdin", hint, ExitCode.BAD_INPUT)
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    output = _Output(prompts, ids, tokenizer, write, options)
    output.start()
    stats = decode(
        model,
        ids,
        options.sampling,
        on_finish=output.finish,
        on_token=output.token,
        should_stop=should_stop,
        use_cache=options.use_cache,
        logprobs=options.logprobs,
        vocab_size=tokenizer.vocab_size,
    )
    return {
        "prompts": len(prompts),
        "continuations": sum(output.reasons.values()),
        "prompt_tokens": stats.prompt_tokens,
        "tokens": stats.tokens,
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s,
        "tokens_per_s": stats.tokens_per_s,
        "cache_bytes": stats.cache_bytes,
        "read_bytes": stats.read_bytes,
        "finish_reasons": dict(output.reasons),
        "interrupted": stats.interrupted,
    }


def _encode(tokenizer: Tokenizer, prompt: bytes) -> list[int]:
    """The prompt's ids; those of a newline if it has none, and token 0 of a tokenizer that drops newlines too."""
    ids: list[int] = tokenizer.encode(prompt).tolist() or tokenizer.encode(b"\n").tolist() or [0]
    return ids
