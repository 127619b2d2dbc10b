"""Token ids in, token ids out: batched decoding with a key/value cache.

Prompts of unequal lengths are padded on the right and read together; then every sequence of the batch takes one token
a step. The continuations of a prompt share its reading, and a finished sequence leaves the batch. What a prompt gets
depends on the seed, its index and the continuation's number: the noise is a function of them alone, and the logits
differ between batches by rounding only. No text here: stopping is up to the caller, token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from nsa_cli.errors import ExitCode, NsaError, is_out_of_memory
from nsa_cli.generation.sampling import GumbelSource, SamplingConfig, choose, log_probabilities
from nsa_cli.model import Cache, Transformer
from nsa_cli.model.accounting import cache_bytes, decode_read_bytes, parameters_by_part
from nsa_cli.model.captured import CapturedStep
from nsa_cli.model.step import Step, can_step

FinishReason = Literal["stop", "length", "interrupted"]
OnToken = Callable[[int, int, int], bool]
ShouldStop = Callable[[], bool]

TOKEN_BUDGET = 1 << 15
"""Tokens, padding and continuations included, that one batch may come to hold in the cache; on a GPU, at least."""
CACHE_SHARE = 0.3
"""Of a GPU's free memory that a batch's cache may fill: rows that go on are copied, and prompts shared by several stay."""
MAX_ROWS = 128
PREFILL_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}
"""Prompt tokens of a batch that one forward pass reads: the first pass runs the training kernels."""
EAGER_STEPS = 8
"""Steps of the same rows before a graph is captured."""
CAPTURED_FROM = 50
"""Steps still to come from which a capture pays: it costs about as much as so many."""
SHARED_STEP = 1 << 24
"""Weights times rows from which a decoding step on a CPU is worth more than one thread."""
_WINDOW = 8 * MAX_ROWS
_RESERVED_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One finished continuation. prompt: the prompt's index. continuation: its number, from 0.

    tokens: the ids drawn, the one that stopped it included. logprobs: the model's own log-probability of each in
    nats, if asked for. finish_reason: "stop" (the caller's on_token said so), "length" (max_tokens) or "interrupted".
    elapsed_s: from the start of its batch's prefill.
    """

    prompt: int
    continuation: int
    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    elapsed_s: float


@dataclass
class GenerationStats:
    """Totals of one call. prefill_s and decode_s are wall-clock seconds. cache_bytes: of the largest cache held. read_bytes: what
    the last step on a cache read of it, by `accounting.decode_read_bytes`."""

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cache_bytes: int = 0
    read_bytes: int = 0
    interrupted: bool = False

    @property
    def tokens_per_s(self) -> float:
        """Tokens drawn a second of decoding; 0 when none were."""
        return self.tokens / self.decode_s if self.decode_s > 0 else 0.0


class _Interrupted(Exception):
    """should_stop answered true in the middle of a prefill."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    on_token: OnToken | None = None,
    should_stop: ShouldStop | None = None,
    use_cache: bool = True,
    logprobs: bool = False,
    vocab_size: int | None = None,
) -> list[Continuation]:
    """Continuations of every prompt, in the order of (prompt, continuation). `decode` says what the arguments mean.

    Interrupted, the list holds what had been begun.
    """
    found: list[Continuation] = []
    decode(
        model,
        prompts,
        config,
        on_finish=found.append,
        on_token=on_token,
        should_stop=should_stop,
        use_cache=use_cache,
        logprobs=logprobs,
        vocab_size=vocab_size,
    )
    return sorted(found, key=lambda c: (c.prompt, c.continuation))


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    on_finish: Callable[[Continuation], None],
    on_token: OnToken | None = None,
    should_stop: ShouldStop | None = None,
    use_cache: bool = True,
    logprobs: bool = False,
    vocab_size: int | None = None,
    token_budget: int | None = None,
    prefill_tokens: int | None = None,
) -> GenerationStats:
    """Draw config.continuations continuations of every prompt and hand each to on_finish as it ends, in no fixed order.

    prompts: token ids, at least one each. on_token(prompt, continuation, id) sees every token as it is drawn and ends
    the sequence with "stop" by returning True. should_stop is polled between forward passes; once true, the sequences
    in hand finish as "interrupted" and the rest is not begun. use_cache=False recomputes the full forward pass for
    every token. vocab_size: draw ids below it only. token_budget: padded tokens of a batch, prompts and room for
    continuations; a prompt that exceeds it goes alone. prefill_tokens: prompt tokens of a batch in one forward pass. Both have
    defaults that suit the device.

    The model is in eval mode meanwhile. ValueError for an empty prompt or an id that the model does not know; NsaError
    (exit 3) if its logits are not finite.
    """
    _check_prompts(prompts, model.config.vocab_size)
    vocab = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    run = _Run(model, config, on_finish, on_token, should_stop, logprobs, vocab)
    rows = [len(prompt) + config.max_tokens for prompt in prompts]
    token_budget = token_budget or _token_budget(model)
    prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(model.device.type, 1 << 13)
    training = model.training
    model.eval()
    # Triton and graphs work on the current device, whatever the tensors'.
    current = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    try:
        with torch.inference_mode(), current:
            for batch in plan_batches(rows, config.continuations, token_budget):
                chunk = max(1, prefill_tokens // len(batch))
                width = max(rows[i] for i in batch)
                wave = max(1, min(MAX_ROWS, token_budget // width))
                with _explained_memory(model, min(wave, len(batch) * config.continuations), width):
                    run.batch([(i, prompts[i]) for i in batch], wave, chunk, use_cache)
                if run.stats.interrupted:
                    break
    finally:
        model.train(training)
    return run.stats


def _token_budget(model: Transformer) -> int:
    if model.device.type != "cuda":
        return TOKEN_BUDGET
    free, _ = torch.cuda.mem_get_info(model.device)
    a_token = cache_bytes(model.config, 1 << 20, model.token_emb.weight.element_size()) / (1 << 20)
    return max(TOKEN_BUDGET, int(CACHE_SHARE * free / a_token))


def plan_batches(rows: Sequence[int], continuations: int, token_budget: int) -> Iterator[list[int]]:
    """Indices of prompts that are decoded together, so that the widest row times the number of rows is within the
    budget.

    rows: tokens that each prompt's row comes to hold. Prompts of like length go together, but only inside windows of
    consecutive ones, since output is in input order and the first answers should not wait for the last prompt.
    """
    for first in range(0, len(rows), _WINDOW):
        window = sorted(range(first, min(first + _WINDOW, len(rows))), key=lambda i: rows[i])
        batch: list[int] = []
        batches: list[list[int]] = [batch]
        for i in window:
            count = (len(batch) + 1) * continuations
            if batch and (count > MAX_ROWS or count * rows[i] > token_budget):
                batch = []
                batches.append(batch)
            batch.append(i)
        yield from sorted((sorted(batch) for batch in batches), key=lambda batch: batch[0])


def _check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no tokens: a continuation needs at least one to start from")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = next(token for token in prompt if not 0 <= token < vocab)
            raise ValueError(f"prompt {i} holds token {wrong}: the model knows 0 to {vocab - 1}")


@contextmanager
def _explained_memory(model: Transformer, rows: int, tokens: int) -> Iterator[None]:
    """NsaError with exit 1 in place of the allocators' errors: what was at work, and the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = model.token_emb.weight.element_size()
        held = rows * cache_bytes(model.config, tokens, size) / 2**30
        message = f"out of memory: {rows} sequences of up to {tokens} tokens, whose cache alone takes {held:.3g} GiB"
        hint = "lower --max-tokens or shorten the prompt" + (", give fewer prompts at once, or a smaller -n" if rows > 1 else "")
        hint += "; --dtype bfloat16 halves it" if size == 4 else ""
        raise NsaError(message, hint, ExitCode.FAILURE) from error


@contextmanager
def _few_threads(model: Transformer, rows: int) -> Iterator[None]:
    """One CPU thread inside where a step is too small to share: waiting for the other threads would cost more than they do
    (and ten times as much when something else has their core)."""
    before = torch.get_num_threads()
    if model.device.type == "cpu" and rows * parameters_by_part(model.config)["total"] < SHARED_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Decoder(Protocol):
    """Some sequences, and how they grow by a token."""

    @property
    def nbytes(self) -> int: ...

    @property
    def read_bytes(self) -> int:
        """Bytes of the cache that the last step read."""

    def step(self, ids: Tensor, left: int) -> Tensor:
        """Append one token to every row (ids int64 [rows]); logits float32 [rows, vocab] of what follows. left: steps after
        this one, at most."""

    def select(self, rows: Tensor) -> _Decoder:
        """These rows, which may repeat, as a decoder of its own."""


class _Cached:
    """Rows that live in a key/value cache. On a GPU, by `Step`, and once some steps were made, the others replay a graph."""

    def __init__(self, model: Transformer, cache: Cache, step: Step | None) -> None:
        self._model, self._cache, self._step, self._steps = model, cache, step, 0
        self._captured: CapturedStep | None = None

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def read_bytes(self) -> int:
        config, size = self._model.config, self._cache.itemsize
        return sum(decode_read_bytes(config, length, size) for length in self._cache.host_lengths)

    def step(self, ids: Tensor, left: int) -> Tensor:
        if self._step is None:
            logits: Tensor = self._model(ids[:, None], cache=self._cache)
            return logits[:, -1]
        self._steps += 1
        if self._captured is None:
            self._captured = CapturedStep(self._step, self._cache)
        return self._captured(ids, capture=self._steps > EAGER_STEPS and left >= CAPTURED_FROM)

    def select(self, rows: Tensor) -> _Cached:
        return _Cached(self._model, self._cache.select(rows), self._step)


class _Recomputed:
    """Rows that are kept as token ids and read anew at every step: slow, and the cache's measure."""

    nbytes = read_bytes = 0

    def __init__(self, model: Transformer, rows: list[list[int]]) -> None:
        self._model, self._rows = model, rows

    def logits(self) -> Tensor:
        last = torch.tensor([len(row) - 1 for row in self._rows], device=self._model.device)
        logits: Tensor = self._model(_padded(self._rows, self._model.device))
        return logits[torch.arange(len(self._rows), device=last.device), last]

    def step(self, ids: Tensor, left: int) -> Tensor:
        for row, token in zip(self._rows, ids.tolist(), strict=True):
            row.append(token)
        return self.logits()

    def select(self, rows: Tensor) -> _Recomputed:
        return _Recomputed(self._model, [list(self._rows[i]) for i in rows.tolist()])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [rows, longest], padded on the right with token 0."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return ids.to(device)


@dataclass
class _Row:
    """One sequence of the batch while it grows."""

    prompt: int
    continuation: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False


@dataclass
class _Run:
    """What every batch of one `decode` call has in common."""

    model: Transformer
    config: SamplingConfig
    on_finish: Callable[[Continuation], None]
    on_token: OnToken | None
    should_stop: ShouldStop | None
    logprobs: bool
    vocab: int
    step: Step | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)

    def batch(self, prompts: Sequence[tuple[int, Sequence[int]]], wave: int, chunk: int, use_cache: bool) -> None:
        """Read some (index, ids) together, `chunk` tokens of each at a time, then draw `wave` continuations at a
        time."""
        started = time.perf_counter()
        decoder: _Decoder
        try:
            if use_cache:
                decoder, logits = self._prefill([ids for _, ids in prompts], chunk)
            else:
                decoder = _Recomputed(self.model, [list(ids) for _, ids in prompts])
                logits = decoder.logits()
        except _Interrupted:
            self.stats.interrupted = True
            return
        logits = logits[:, : self.vocab]
        if not bool(logits.isfinite().all()):
            message = "the model's logits are not finite: its weights hold infinities or NaN, or overflow in this dtype"
            raise NsaError(message, "use an earlier checkpoint, or try --dtype float32", ExitCode.BAD_INPUT)
        self.stats.prefill_s += time.perf_counter() - started
        self.stats.prompt_tokens += sum(len(ids) for _, ids in prompts)

        jobs = [(row, number) for row in range(len(prompts)) for number in range(self.config.continuations)]
        for first in range(0, len(jobs), wave):
            part = jobs[first : first + wave]
            rows = [_Row(prompts[row][0], number) for row, number in part]
            if len(part) == len(prompts) == len(jobs):
                own: list[_Decoder] = [decoder]
                firsts = logits
            else:
                places = torch.tensor([row for row, _ in part], device=logits.device)
                own, firsts = [decoder.select(places)], logits[places]
            if first + wave >= len(jobs):
                del decoder  # nobody but the one who draws holds the cache: it goes when fewer rows go on in a smaller one
            self._draw(own, firsts, rows, started)
            if self.stats.interrupted:
                return

    def _prefill(self, prompts: Sequence[Sequence[int]], chunk: int) -> tuple[_Cached, Tensor]:
        """A cache that holds the prompts, and the logits after each one's last token, float32 [rows, vocab]."""
        ids = _padded(prompts, self.model.device)
        rows, width = ids.shape
        cache = self.model.make_cache(rows, width + min(self.config.max_tokens, _RESERVED_TOKENS))
        lengths = [len(prompt) for prompt in prompts]
        found = torch.empty(rows, self.model.config.vocab_size, dtype=torch.float32, device=ids.device)
        for start in range(0, width, chunk):
            if self._stopping():
                raise _Interrupted
            counts = [min(max(length - start, 0), chunk) for length in lengths]
            logits = self.model(ids[:, start : start + chunk], cache=cache, counts=counts, last=True)
            here = [i for i, length in enumerate(lengths) if start < length <= start + chunk]
            found[here] = logits[here, 0]
        if self.step is None and can_step(self.model):
            self.step = Step(self.model)
        return _Cached(self.model, cache, self.step), found

    def _draw(self, own: list[_Decoder], logits: Tensor, rows: list[_Row], started: float) -> None:
        """One token a row a step, from the logits of what follows each, until every row has ended. own: the decoder, which
        is taken out."""
        with _few_threads(self.model, len(rows)):
            self._draw_rows(own, logits, rows, started)

    def _draw_rows(self, own: list[_Decoder], logits: Tensor, rows: list[_Row], started: float) -> None:
        decoder, config, decode_started = own.pop(), self.config, time.perf_counter()
        gumbel: GumbelSource | None = None
        if config.temperature > 0:
            streams = [(row.prompt, row.continuation) for row in rows]
            gumbel = GumbelSource(config.seed, streams, logits.shape[-1], logits.device)
        for position in range(config.max_tokens):
            if self._stopping():
                self.stats.interrupted = True
                break
            ids = choose(logits, config, None if gumbel is None else gumbel.at(position))
            logprobs = log_probabilities(logits, ids).tolist() if self.logprobs else None
            self._deliver(rows, ids.tolist(), logprobs, started)
            live = [i for i, row in enumerate(rows) if not row.done]
            if position + 1 == config.max_tokens or not live:
                break
            # Leaving rows out copies the cache, so a large batch waits until an eighth of it has finished.
            if len(rows) - len(live) > len(rows) // 8:
                self._note_cache(decoder)
                keep = torch.tensor(live, device=ids.device)
                decoder, ids, rows = decoder.select(keep), ids[keep], [rows[i] for i in live]
                if gumbel is not None:
                    gumbel.select(keep)
            logits = decoder.step(ids, config.max_tokens - position - 2)[:, : self.vocab]
        self._note_cache(decoder)
        self.stats.decode_s += time.perf_counter() - decode_started
        for row in rows:
            self._finish(row, "interrupted" if self.stats.interrupted else "length", started)

    def _deliver(self, rows: list[_Row], ids: list[int], logprobs: list[float] | None, started: float) -> None:
        for i, row in enumerate(rows):
            if row.done:
                continue
            row.tokens.append(ids[i])
            if logprobs is not None:
                row.logprobs.append(logprobs[i])
            self.stats.tokens += 1
            if self.on_token is not None and self.on_token(row.prompt, row.continuation, ids[i]):
                self._finish(row, "stop", started)

    def _finish(self, row: _Row, reason: FinishReason, started: float) -> None:
        if row.done:
            return
        row.done = True
        self.on_finish(
            Continuation(
                prompt=row.prompt,
                continuation=row.continuation,
                tokens=row.tokens,
                logprobs=row.logprobs if self.logprobs else None,
                finish_reason=reason,
                elapsed_s=time.perf_counter() - started,
            )
        )

    def _stopping(self) -> bool:
        return self.should_stop is not None and self.should_stop()

    def _note_cache(self, decoder: _Decoder) -> None:
        self.stats.cache_bytes = max(self.stats.cache_bytes, decoder.nbytes)
        self.stats.read_bytes = decoder.read_bytes
