"""A small model, dense and sparse: one training step, prefill of a cache, and decoding one token at that context.

The weights are random and the tokens bytes; what is timed is what `nsa train` and `nsa sample` run. Dense models run
under whichever of PyTorch's attention backends is fastest for each of the three; they decode by our own kernels where those
are faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_cli.benchmark import parity
from nsa_cli.benchmark.dense import backends, use_backend
from nsa_cli.benchmark.measuring import Bench
from nsa_cli.benchmark.options import Shape
from nsa_cli.benchmark.parity import Parity
from nsa_cli.benchmark.report import Figures
from nsa_cli.benchmark.timing import Timing, measure
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.model import Cache, Transformer, accounting, build_model
from nsa_cli.model.captured import CapturedStep
from nsa_cli.model.step import Step, can_step

VOCABULARY = 256
PREFILL_TOKENS = 1 << 17
"""That one pass reads. A larger batch's sequences are read some at a time, and repeat those of the first pass, so that decoding
can start from its cache."""
DECODED = 5
DECODE_RELATIVE_L2 = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Decoding beside prefill. In bf16 products of other shapes round otherwise, and one flipped selection moves a lot."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model to measure: its weights are in `dtype`, or in float32 under bf16 autocast while it trains."""

    config: ModelConfig
    kernel: str
    batch: int
    seed: int

    @property
    def label(self) -> str:
        """dense or sparse."""
        return "dense" if self.config.nsa is None else "sparse"

    def build(self, bench: Bench, dtype: torch.dtype) -> Transformer:
        """A fresh model, the same weights every time."""
        torch.manual_seed(self.seed)
        kernel = "auto" if self.config.nsa is None else self.kernel
        return build_model(self.config, device=bench.device, dtype=dtype, kernel=kernel)

    def ids(self, bench: Bench, extra: int = 0) -> Tensor:
        """Random tokens int64 [b, context + extra]."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.config.context + extra)
        return torch.randint(VOCABULARY, shape, generator=generator).to(bench.device)


def subjects(tokens: int, shape: Shape, nsa: NSAConfig, kernel: str, batch: int, seed: int) -> tuple[Subject, Subject]:
    """The dense and the sparse model of one length."""
    heads, kv_heads = shape.model_heads
    configs = [
        ModelConfig(
            vocab_size=VOCABULARY, dim=shape.model_dim, depth=shape.model_depth, heads=heads,
            kv_heads=kv_heads, dim_head=shape.dim_head, context=tokens, nsa=geometry,
        )
        for geometry in (None, nsa)
    ]  # fmt: skip
    dense, sparse = (Subject(config=config, kernel=kernel, batch=batch, seed=seed) for config in configs)
    return dense, sparse


def measure_training(bench: Bench, subject: Subject) -> Figures:
    """Forward, backward and AdamW's step on batch * context tokens; peak above the weights, optimizer state included.

    No parity of its own: attention's rows of the same length stand for it. RuntimeError when the loss is not finite.
    """
    mixed = bench.dtype == torch.bfloat16
    model = subject.build(bench, torch.float32 if mixed else bench.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = subject.ids(bench, extra=1)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16) if mixed else nullcontext():
            loss: Tensor = model(ids, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses: list[Tensor] = []
    peak, before = bench.peak_and_seconds(lambda: losses.append(step()))
    if not bool(torch.isfinite(losses[0])):
        raise RuntimeError(f"the {subject.label} model's loss is not finite at {subject.config.context} tokens")
    timing, kernel = _under_fastest(bench, subject, step, ("auto", *_fused(bench)), before=before)
    flops = accounting.model_flops_per_token(subject.config).training * ids.numel()
    # Weights are read forward and backward, gradients written and read, weights and both moments read and written.
    moved = 10 * sum(p.numel() * p.element_size() for p in model.parameters())
    return bench.figures(kernel, timing, peak, round(flops), moved, None)


def measure_prefill_and_decode(bench: Bench, subject: Subject) -> tuple[Figures, Figures]:
    """Prefill of context tokens into an empty cache, and one token on top of the others: (prefill, decode).

    Decoding is compared with prefill: the last DECODED tokens, one at a time, against the same rows of prefill's
    logits. The median of these tokens counts, since a near tie may select another block for one of them. It is timed
    over the last `compress_stride` lengths in turn, so that steps which complete a block have their share. Its peak
    includes the cache.
    """
    model = subject.build(bench, bench.dtype).eval()
    config = subject.config
    tokens, item = config.context, torch.empty(0, dtype=bench.dtype).element_size()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    at_once = _at_once(subject.batch, tokens)
    ids = subject.ids(bench)[torch.arange(subject.batch) % at_once]
    kept: list[tuple[Tensor, Cache]] = []

    def read(some: Tensor) -> tuple[Tensor, Cache]:
        cache = model.make_cache(len(some), tokens)
        return model(some, cache=cache), cache

    def prefill() -> list[tuple[Tensor, Cache]]:
        return [read(some) for some in ids.split(at_once)]

    with torch.inference_mode():
        peak, before = bench.peak_and_seconds(lambda: kept.extend(prefill()))
        logits = kept[0][0]
        kept.clear()
        timing, kernel = _under_fastest(bench, subject, prefill, ("auto", *_fused(bench)), before=before)
        flops = accounting.model_flops_per_token(config).forward * ids.numel()
        written = subject.batch * accounting.cache_bytes(config, tokens, item)
        prefilled = bench.figures(kernel, timing, peak, round(flops), weights + written, None)
        check = _decode_parity(bench, model, ids, logits)
        decoded = _measure_decode(bench, subject, model, ids, weights, check)
    return prefilled, decoded


def _measure_decode(
    bench: Bench, subject: Subject, model: Transformer, ids: Tensor, weights: int, check: Parity
) -> Figures:
    config, tokens = subject.config, subject.config.context
    first = max(0, tokens - (1 if config.nsa is None else config.nsa.compress_stride))
    cache = _filled(model, ids, first, tokens)
    mark = cache.mark()

    def back() -> None:
        if cache.host_lengths[0] == tokens:
            cache.back_to(mark)

    captured = CapturedStep(Step(model), cache) if can_step(model) and first > 0 else None

    def step() -> Tensor:
        place = cache.host_lengths[0]
        if captured is not None:
            return captured(ids[:, place])
        logits: Tensor = model(ids[:, place : place + 1], cache=cache)
        return logits

    for _ in range(2 * (tokens - first) if captured is not None else 0):  # kernels compiled, then graphs captured
        back()
        step()
    back()
    peak = bench.peak(step) + cache.nbytes
    timing, kernel = None, subject.kernel
    if check.ok and captured is not None:
        timing, kernel, captured = bench.time(step, back), "triton", None
    if check.ok and (timing is None or config.nsa is None):
        candidates = ("auto", "math", *_fused(bench))
        other, name = _under_fastest(bench, subject, step, candidates, back)
        if timing is None or other.median_s < timing.median_s:
            timing, kernel = other, name
    item = torch.empty(0, dtype=bench.dtype).element_size()
    moved = weights + subject.batch * accounting.decode_read_bytes(config, tokens, item)
    parameters = accounting.parameters_by_part(config)["total"]
    attention = 4 * config.depth * config.heads * config.dim_head * accounting.decode_read_tokens(tokens, config.nsa)
    flops = subject.batch * (2 * parameters + attention)
    return bench.figures(kernel, timing, peak, flops, moved, check, cache=cache.nbytes)


def _at_once(batch: int, tokens: int) -> int:
    """Sequences that one pass reads."""
    return max(1, min(batch, PREFILL_TOKENS // tokens))


def _filled(model: Transformer, ids: Tensor, tokens: int, capacity: int) -> Cache:
    """A cache with room for `capacity` tokens that holds the first `tokens`, of rows that repeat those of the first pass."""
    batch, at_once = len(ids), _at_once(len(ids), capacity)
    cache = model.make_cache(at_once, capacity)
    if tokens:
        model(ids[:at_once, :tokens], cache=cache, last=True)
    return cache if at_once == batch else cache.select(torch.arange(batch) % at_once)


def _decode_parity(bench: Bench, model: Transformer, ids: Tensor, logits: Tensor) -> Parity:
    first = max(0, ids.shape[1] - DECODED)
    cache = _filled(model, ids, first, ids.shape[1])
    captured = CapturedStep(Step(model), cache) if can_step(model) and first > 0 else None
    checks = []
    for place in range(first, ids.shape[1]):
        with parity.poisoned(bench.device):
            step = model(ids[:, place : place + 1], cache=cache)[:, 0] if captured is None else captured(ids[:, place])
        named = [("decoded logits", step[: len(logits)], logits[:, place])]
        checks.append(parity.compare(named, DECODE_RELATIVE_L2.get(bench.dtype, 1e-4)))
    checks.sort(key=lambda check: (not check.ok, check.relative_l2))
    return checks[len(checks) // 2]


def _fused(bench: Bench) -> tuple[str, ...]:
    """Backends to try for a dense model besides PyTorch's own choice; on a CPU that choice is the only fused one."""
    return tuple(backends(bench.device)) if bench.device.type == "cuda" else ()


def _under_fastest(
    bench: Bench,
    subject: Subject,
    work: Callable[[], object],
    candidates: Sequence[str],
    setup: Callable[[], None] | None = None,
    before: Sequence[float] = (),
) -> tuple[Timing, str]:
    """Timing of `work`, for a dense model under the attention backend that is fastest; and what ran.

    before: seconds of a run under PyTorch's own choice, which count if that is all there is to choose from.
    """
    if subject.config.nsa is not None:
        return bench.time(work, setup, before), subject.kernel
    if len(candidates) == 1:
        return bench.time(work, setup, before), f"sdpa {candidates[0]}"
    best = min(candidates, key=lambda backend: _trial(bench, backend, work, setup))
    with use_backend(bench.device, best):
        return bench.time(work, setup), f"sdpa {best}"


def _trial(bench: Bench, backend: str, work: Callable[[], object], setup: Callable[[], None] | None) -> float:
    """Median seconds under a backend; infinite where it cannot run."""
    try:
        with use_backend(bench.device, backend):
            if setup is not None:
                setup()
            work()
            trial = measure(work, clock=bench.clock, budget_s=bench.budget_s / 10, max_repeats=20, setup=setup)
    except RuntimeError:  # no kernel of this backend for these shapes
        return math.inf
    return trial.median_s
