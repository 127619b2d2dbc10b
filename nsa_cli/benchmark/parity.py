"""Right before fast: what was timed, compared with the definition in float32 on some of its queries.

The definition is `nsa_cli.ops.reference`, whose memory grows with the square of the tokens; here its equations are
applied to a few rows of the score matrix, for which any length fits. Gradients are compared exactly as well: with an
output gradient that is zero but for the sampled queries, those of all keys and values follow from these rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops import reference

SAMPLED_QUERIES = 32
RELATIVE_L2 = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative L2 distance to the float32 reference, given the same selection."""
NEAR_TIE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Selections may differ where two importances are this close, relatively (or as close as `near_tie_absolute` says)."""
NEAR_TIE_ABSOLUTE = 1e-10
HALF_ERROR = 2**-36
"""In bfloat16 and float16 two importances may come this close for every head of a group, which may sum them in float16."""
NEGLIGIBLE = 1e-4
POISON_BYTES = 2**33


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Largest error against the reference over the sampled queries, and whether it passes.

    max_error: largest absolute difference (not finite if the output is not). relative_l2: the worst tensor's
    ||x - ref|| / ||ref||, to be at most `tolerance`. detail: what failed, empty when ok.
    """

    max_error: float
    relative_l2: float
    tolerance: float
    ok: bool
    detail: str = ""

    def worse(self, other: Parity) -> Parity:
        """Both in one: the larger errors, and ok only if both are."""
        detail = "; ".join(part for part in (self.detail, other.detail) if part)
        return Parity(
            max_error=_largest(self.max_error, other.max_error),
            relative_l2=_largest(self.relative_l2, other.relative_l2),
            tolerance=max(self.tolerance, other.tolerance),
            ok=self.ok and other.ok,
            detail=detail,
        )


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def compare(named: Sequence[tuple[str, Tensor, Tensor]], tolerance: float) -> Parity:
    """The largest errors of (name, measured, reference) tensors of equal shapes; anything not finite fails.

    Each tensor's error is relative to its own norm, or, where that is all but zero (the gradient of a query that sees a
    single key), to the largest of the tensors' norms: rounding cannot be compared with nothing.
    """
    max_error = relative = 0.0
    failures = []
    largest = max((float(expected.detach().float().norm()) for _, _, expected in named), default=0.0)
    for name, measured, expected in named:
        difference = measured.detach().float() - expected.detach().float()
        error = float(difference.abs().max()) if difference.numel() else 0.0
        distance, size = float(difference.norm()), float(expected.detach().float().norm())
        size = size if size > NEGLIGIBLE * largest else largest
        share = 0.0 if distance == 0 else distance / size if size > 0 else math.inf
        max_error, relative = _largest(max_error, error), _largest(relative, share)
        if not share <= tolerance:
            failures.append(f"{name}: relative L2 error {share:.2g} is above {tolerance:.2g}")
    return Parity(max_error=max_error, relative_l2=relative, tolerance=tolerance, ok=not failures, detail="; ".join(failures))


def sample_queries(tokens: int, config: NSAConfig, seed: int, count: int = SAMPLED_QUERIES) -> Tensor:
    """int64 [min(count, tokens)], ascending: the edges (first, last, where blocks and window begin) and others."""
    edges = [0, config.compress_block - 2, config.compress_block - 1, config.select_block, config.window, tokens - 1]
    chosen = {t for t in edges if 0 <= t < tokens}
    generator = torch.Generator().manual_seed(seed)
    for t in torch.randperm(tokens, generator=generator).tolist():
        if len(chosen) >= min(count, tokens):
            break
        chosen.add(t)
    return torch.tensor(sorted(chosen))


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Dense causal attention of the sampled rows: q [b, h, m, d] at tokens `rows` [m] -> float32 [b, h, m, d]."""
    s = torch.arange(k.shape[2], device=k.device)
    return _attend(q, k, v, s <= rows[:, None])


def window_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, config: NSAConfig) -> Tensor:
    """Branch `win` of the sampled rows."""
    s, t = torch.arange(k.shape[2], device=k.device), rows[:, None]
    return _attend(q, k, v, (s <= t) & (s > t - config.window))


def selected_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, block_indices: Tensor, config: NSAConfig) -> Tensor:
    """Branch `slc` of the sampled rows, given their block_indices [b, g, m, n]."""
    s = torch.arange(k.shape[2], device=k.device)
    chosen = torch.zeros(*block_indices.shape[:3], k.shape[2], dtype=torch.bool, device=k.device)
    for slot in block_indices.unbind(-1):
        chosen |= slot[..., None] == s // config.select_block
    return _attend(q, k, v, (chosen & (s <= rows[:, None]))[:, :, None])


def compressed_rows(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, rows: Tensor, tokens: int, config: NSAConfig
) -> tuple[Tensor, Tensor]:
    """Branch `cmp` of the sampled rows and the importance of every selection block: [b, h, m, d], [b, g, m, j]."""
    c = torch.arange(k_cmp.shape[2], device=k_cmp.device)
    visible = c * config.compress_stride + config.compress_block - 1 <= rows[:, None]
    p_cmp = reference.masked_softmax(reference.scores(q.float(), k_cmp.float()), visible)
    blocks = config.num_select_blocks(tokens)
    weights = reference.overlap(k_cmp.shape[2], blocks, config).to(p_cmp)
    return reference.attend(p_cmp, v_cmp.float()), torch.einsum("bgrtc,cj->bgtj", p_cmp.detach(), weights)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return reference.attend(reference.masked_softmax(reference.scores(q.float(), k.float()), visible), v.float())


def near_tie_absolute(dtype: torch.dtype, group: int) -> float:
    """How close two importances, sums over a group's heads, may be for either block to be selected."""
    return NEAR_TIE_ABSOLUTE if dtype in (torch.float32, torch.float64) else max(NEAR_TIE_ABSOLUTE, group * HALF_ERROR)


def check_selection(
    block_indices: Tensor, importance: Tensor, rows: Tensor, config: NSAConfig, near_tie: float,
    absolute: float = NEAR_TIE_ABSOLUTE,
) -> str:  # fmt: skip
    """What is wrong with the sampled rows' selection, or "" if nothing is.

    block_indices int32 [b, g, m, n]; importance [b, g, m, j] from the reference. Right are: min(n, cur + 1) different
    candidates, ascending, padded with -1, all forced blocks, and no block left out that is more important than one
    taken, near ties excepted.
    """
    j = torch.arange(importance.shape[-1], device=importance.device)
    current = (rows // config.select_block)[:, None]
    candidate = j <= current
    forced = candidate & ((j < config.num_init) | (j > current - config.num_local))
    taken = (block_indices[..., None] == j).any(-2)
    count = (block_indices >= 0).sum(-1)
    expected = (current[:, 0] + 1).clamp(max=config.num_selected)
    places = torch.arange(config.num_selected, device=rows.device)
    filled = torch.where(block_indices >= 0, block_indices, importance.shape[-1] + places)
    if not bool((count == expected).all() and (taken.sum(-1) == expected).all() and (filled.diff(dim=-1) > 0).all()):
        return "selection: not min(n, blocks so far) different blocks, ascending"
    if bool((taken & ~candidate).any()):
        return "selection: a block of the future was selected"
    if bool((forced & ~taken).any()):
        return "selection: a forced block was left out"
    least = importance.masked_fill(~taken | forced, math.inf).amin(-1)
    most = importance.masked_fill(taken | ~candidate, -math.inf).amax(-1)
    gap = most - least
    if bool((gap > torch.maximum(most.abs() * near_tie, torch.full_like(most, absolute))).any()):
        return "selection: a more important block was left out"
    return ""


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Uninitialised memory is NaN inside: a kernel that leaves a part of its output unwritten then fails its parity.

    CPU: PyTorch's own fill of uninitialised tensors. CUDA: a large buffer of NaN goes back to the caching allocator,
    which hands its parts out.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        torch.full((min(free // 2, POISON_BYTES) // 4,), math.nan, device=device)
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def reference_gradients(build: Callable[..., Tensor], tensors: Sequence[Tensor], grad_rows: Tensor) -> list[Tensor]:
    """Gradients of build(*float32 copies of tensors), whose output's gradient is grad_rows, for each of the tensors."""
    leaves = [x.detach().float().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(build(*leaves), leaves, grad_rows.float(), allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
