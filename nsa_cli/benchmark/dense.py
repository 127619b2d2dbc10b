"""Dense attention to stand beside: PyTorch's scaled_dot_product_attention with the backend that is fastest here.

Every backend that can run is tried, with keys shared by the group (enable_gqa) and with keys expanded per query head;
forward and backward may choose differently. The quadratic `math` backend is no candidate: a length at which it fits
in memory is not a length at which anybody wants it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_cli.benchmark.timing import Clock, measure

_BACKENDS = {
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run dense attention: a backend, and whether keys are expanded per query head first."""

    backend: str
    expanded: bool

    @property
    def name(self) -> str:
        """As a report shows it."""
        return f"sdpa {self.backend}, {'expanded' if self.expanded else 'grouped'} keys"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: q [b, h, t, d], k and v [b, g, t, d] -> [b, h, t, d]. Expanding is part of the work."""
        group = q.shape[1] // k.shape[1]
        if self.expanded:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with use_backend(q.device, self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1 and not self.expanded)


@contextmanager
def use_backend(device: torch.device, backend: str) -> Iterator[None]:
    """Only this backend inside; `auto` leaves PyTorch's own choice, `math` its composed version."""
    if backend == "auto":
        yield
        return
    chosen = SDPBackend.MATH if backend == "math" else backends(device)[backend]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unavailable backend warns at length before it raises
        with sdpa_kernel([chosen]):
            yield


def backends(device: torch.device) -> dict[str, SDPBackend]:
    """The fused backends that a kind of device may have, by name."""
    return _BACKENDS.get(device.type, _BACKENDS["cpu"])


def variants(device: torch.device, group: int) -> list[Variant]:
    """Every way to try; without groups of heads nothing is to be expanded."""
    expanded = (False, True) if group > 1 else (False,)
    return [Variant(backend=name, expanded=choice) for name in backends(device) for choice in expanded]


def fastest(
    candidates: Sequence[Variant], prepare: Callable[[Variant], Callable[[], object]], clock: Clock, *, budget_s: float
) -> Variant | None:
    """The candidate whose prepared work is fastest, median of at least three; those that cannot run are passed over.

    prepare(variant) returns what to time (for a backward, after building its graph).
    """
    best, best_s = None, math.inf
    for variant in candidates:
        try:
            work = prepare(variant)
            work()
            median_s = measure(work, clock=clock, budget_s=budget_s, max_repeats=20).median_s
        except RuntimeError:  # no kernel for this shape, dtype or device (NotImplementedError is one)
            continue
        if median_s < best_s:
            best, best_s = variant, median_s
    return best
