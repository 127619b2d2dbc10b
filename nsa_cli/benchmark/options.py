"""What a benchmark measures, and the shapes it takes on each kind of device when nothing is asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_cli.config import KERNELS, NSAConfig

GROUPS = ("attention", "branches", "training", "decode")
LADDER_SHORTEST = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Attention's sizes, and those of the small model of the training, prefill and decode rows."""

    heads: int
    kv_heads: int
    dim_head: int
    model_dim: int
    model_depth: int

    @property
    def model_heads(self) -> tuple[int, int]:
        """Query and key/value heads of the small model: as many as fill its width, in groups like attention's."""
        heads = max(1, self.model_dim // self.dim_head)
        return heads, _divisor_near(heads, heads * self.kv_heads // self.heads)


CPU_SHAPE = Shape(heads=8, kv_heads=2, dim_head=64, model_dim=256, model_depth=1)
CUDA_SHAPE = Shape(heads=64, kv_heads=4, dim_head=128, model_dim=1024, model_depth=2)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """One benchmark; wrong values raise ValueError with the field, the value and the rule.

    seq_lens: lengths to measure. ladder: shorter powers of two too, each a quarter of the next, so that the length from
    which sparse wins can be named; None does so when one length is given. heads, kv_heads, dim_head, model_dim,
    model_depth: None takes the device's default (CPU 8, 2, 64, 256, 1; CUDA 64, 4, 128, 1024, 2; kv_heads keeps the
    group size where it divides).
    dtype: auto (float32 on a CPU, bfloat16 on CUDA), float32 or bfloat16. groups: which rows, of GROUPS.
    limit_s: seconds the whole report may take; rows that would not fit are left out and named. budget_s: timed
    seconds of one measurement, beyond its least number of repeats. compare: an earlier JSON report; a row slower by
    more than the share `tolerance` fails the regression gate.
    """

    seq_lens: tuple[int, ...] = (16384,)
    ladder: bool | None = None
    batch: int = 1
    heads: int | None = None
    kv_heads: int | None = None
    dim_head: int | None = None
    model_dim: int | None = None
    model_depth: int | None = None
    nsa: NSAConfig = field(default_factory=NSAConfig)
    dtype: str = "auto"
    kernel: str = "auto"
    seed: int = 0
    groups: tuple[str, ...] = GROUPS
    limit_s: float = 120.0
    budget_s: float = 1.0
    compare: Path | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "seq_lens", tuple(self.seq_lens))
        object.__setattr__(self, "groups", tuple(self.groups))
        self._require(len(self.seq_lens) > 0, "seq_lens", "must hold at least one length")
        for length in self.seq_lens:
            self._require(length >= 1, "seq_lens", "every length must be at least 1", length)
        for name in ("batch", "heads", "kv_heads", "dim_head", "model_dim", "model_depth"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "must be an integer of at least 1")
        self._require(self.dtype in ("auto", "float32", "bfloat16"), "dtype", "must be auto, float32 or bfloat16")
        self._require(self.kernel in KERNELS, "kernel", "must be one of " + ", ".join(KERNELS))
        for group in self.groups:
            self._require(group in GROUPS, "groups", "must be of " + ", ".join(GROUPS), group)
        for name in ("limit_s", "budget_s", "tolerance"):
            self._require(getattr(self, name) > 0, name, "must be above 0")
        self.shape("cpu"), self.shape("cuda")

    def _require(self, ok: bool, name: str, rule: str, value: object = None) -> None:
        if not ok:
            raise ValueError(f"{name} = {getattr(self, name) if value is None else value!r}: {rule}")

    def shape(self, device_type: str) -> Shape:
        """The sizes on that kind of device; ValueError if they do not fit together."""
        default = CUDA_SHAPE if device_type == "cuda" else CPU_SHAPE
        heads = self.heads or default.heads
        kv_heads = self.kv_heads or _divisor_near(heads, heads * default.kv_heads // default.heads)
        dim_head = self.dim_head or default.dim_head
        self._require(heads % kv_heads == 0, "kv_heads", f"must divide heads = {heads}", kv_heads)
        self._require(dim_head % 2 == 0 and dim_head <= 256, "dim_head", "must be even and at most 256", dim_head)
        return Shape(
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            model_dim=self.model_dim or default.model_dim,
            model_depth=self.model_depth or default.model_depth,
        )

    def lengths(self) -> tuple[int, ...]:
        """Every length that is measured, ascending: those asked for and the ladder's."""
        asked = set(self.seq_lens)
        if self.ladder or (self.ladder is None and len(asked) == 1):
            length = 1 << max((max(asked) - 1).bit_length() - 2, 0)
            while length >= LADDER_SHORTEST:
                asked.add(length)
                length //= 4
        return tuple(sorted(asked))

    def to_dict(self) -> dict[str, Any]:
        """JSON values of everything asked for."""
        values = dataclasses.asdict(self)
        return {**values, "seq_lens": list(self.seq_lens), "groups": list(self.groups), "compare": self._compare_text()}

    def _compare_text(self) -> str | None:
        return None if self.compare is None else str(self.compare)


def _divisor_near(heads: int, wanted: int) -> int:
    return next(count for count in range(max(1, min(wanted, heads)), 0, -1) if heads % count == 0)
