"""What a model and a training run are made of: frozen dataclasses that refuse wrong values.

Every field is named as the flag that sets it (`compress_block` is `--compress-block`). A wrong value raises `ValueError`
with the field, the value and the rule. Standard library only, so that `nsa --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Compression = Literal["mean", "attention-pool", "conv", "linear", "mlp", "gated", "grouped-mlp"]
BranchKV = Literal["independent", "shared"]
CompressRope = Literal["none", "block"]
FeedForward = Literal["gelu", "swiglu"]
Schedule = Literal["cosine", "wsd", "linear", "constant"]
Kernel = Literal["auto", "torch", "flex", "triton"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
Parallel = Literal["ddp", "fsdp"]

KERNELS: tuple[str, ...] = get_args(Kernel)
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {value!r}: {rule}")


def _require_int(config: Any, field: str, low: int) -> None:
    value = getattr(config, field)
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    _require(ok, field, value, f"must be an integer of at least {low}")


def _require_number(config: Any, field: str, low: float, high: float = math.inf) -> None:
    value = getattr(config, field)
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    rule = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
    _require(ok, field, value, f"must be a finite number, {rule}")
    _require(math.isfinite(value), field, value, "must be finite")


def _require_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, field)
    _require(value in choices, field, value, "must be one of " + ", ".join(choices))


def _known_fields(cls: type, values: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        _require(key in known, key, values[key], f"is not a field of {cls.__name__}")


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Geometry of Native Sparse Attention (arXiv 2502.11089); the defaults are the paper's.

    compress_block (l): tokens in one compressed block.
    compress_stride (d): tokens between the starts of two; divides l and l'.
    select_block (l'): tokens in one selection block; at least l.
    num_selected (n): selection blocks a query attends to, forced ones included.
    num_init, num_local: forced blocks: the first ones; the newest ones, the query's own included.
    window (w): tokens the window branch sees, the query's own included.
    compress: the network that turns l tokens into one (nsa_cli.model.compress).
    branch_kv: "independent" gives every branch its own key and value projections, "shared" one pair to all three.
    compress_rope: "none" leaves the compressed branch without rotary positions, "block" uses each block's first token's.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_init: int = 1
    num_local: int = 2
    window: int = 512
    compress: Compression = "mlp"
    branch_kv: BranchKV = "independent"
    compress_rope: CompressRope = "none"

    def __post_init__(self) -> None:
        for field in ("compress_block", "compress_stride", "select_block", "num_selected", "window"):
            _require_int(self, field, 1)
        for field in ("num_init", "num_local"):
            _require_int(self, field, 0)
        length, stride, block = self.compress_block, self.compress_stride, self.select_block
        _require(length % stride == 0, "compress_stride", stride, f"must divide compress_block = {length}")
        _require(block % stride == 0, "compress_stride", stride, f"must divide select_block = {block}")
        _require(length <= block, "compress_block", length, f"must be at most select_block = {block}")
        forced = self.num_init + self.num_local
        rule = f"must be at least num_init + num_local = {self.num_init} + {self.num_local}: forced blocks count"
        _require(self.num_selected >= forced, "num_selected", self.num_selected, rule)
        _require_choice(self, "compress", COMPRESSIONS)
        _require_choice(self, "branch_kv", get_args(BranchKV))
        _require_choice(self, "compress_rope", get_args(CompressRope))

    def num_compressed(self, tokens: int) -> int:
        """M, the number of compressed blocks of a document: 0 if N < l, else (N - l) // d + 1."""
        return 0 if tokens < self.compress_block else (tokens - self.compress_block) // self.compress_stride + 1

    def num_select_blocks(self, tokens: int) -> int:
        """Selection blocks that `tokens` tokens touch, the last one perhaps partly."""
        return -(-tokens // self.select_block)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One transformer. `nsa is None` means dense attention; everything else is common to both.

    context: tokens of one training window (sampling may go beyond it: positions are rotary).
    heads, kv_heads: query heads, and key/value heads that each serve heads / kv_heads of them.
    ff_mult: hidden width of the feed-forward over dim. dropout: after the embedding, attention
    and feed-forward, and on attention's probabilities (dense) or gates (sparse).
    """

    vocab_size: int = 256
    dim: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    dim_head: int = 32
    context: int = 128
    ff: FeedForward = "gelu"
    ff_mult: float = 4.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    nsa: NSAConfig | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "dim", "depth", "heads", "kv_heads", "context"):
            _require_int(self, field, 1)
        _require_int(self, "dim_head", 2)
        _require(self.dim_head % 2 == 0, "dim_head", self.dim_head, "must be even: rotary turns pairs of channels")
        _require(self.dim_head <= 256, "dim_head", self.dim_head, "must be at most 256")
        _require(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"must divide heads = {self.heads}")
        _require_choice(self, "ff", get_args(FeedForward))
        _require_number(self, "ff_mult", 0.25)
        _require(round(self.ff_mult * self.dim) >= 1, "ff_mult", self.ff_mult, f"leaves no hidden unit at dim = {self.dim}")
        _require_number(self, "dropout", 0.0, 0.99)
        _require_number(self, "rope_theta", 1.0)
        _require(isinstance(self.tie_embeddings, bool), "tie_embeddings", self.tie_embeddings, "must be true or false")
        _require(self.nsa is None or isinstance(self.nsa, NSAConfig), "nsa", self.nsa, "must be an NSAConfig or None")

    @property
    def group(self) -> int:
        """G: query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON values; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Unknown keys and wrong values raise ValueError."""
        _known_fields(cls, values)
        nsa = values.get("nsa")
        if nsa is not None:
            _require(isinstance(nsa, Mapping), "nsa", nsa, "must be a table of NSAConfig's fields")
            _known_fields(NSAConfig, nsa)
            nsa = NSAConfig(**nsa)
        return cls(**{**values, "nsa": nsa})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: everything that decides the numbers, besides the model and the data.

    steps: optimizer steps. batch_tokens: tokens a step, a multiple of the context; gradients are accumulated over
    micro-batches of at most micro_batch_tokens (None: the whole step at once). lr is the peak; min_lr_ratio * lr the end of
    the decay; warmup and (for wsd) decay_ratio * steps shape the schedule. weight_decay acts on matrices only.
    distill_weight multiplies a teacher's KL divergence.
    max_skipped: updates skipped in a row, for a loss or gradient that is not finite, that end the run: one bad batch is met
    by the next good one, weights untouched, but different batches that all fail put the weights themselves at fault.
    eval_every 0 never validates; eval_tokens bounds a validation pass; val_fraction is the held-out tail of the data;
    pack keeps its documents apart, in attention and in positions.
    patience: validations without a new best that end the run. keep: numbered copies of the last saves. sample_every: steps
    between samples. 0 is never, or none, for each.
    """

    steps: int = 2000
    batch_tokens: int = 2048
    micro_batch_tokens: int | None = None
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    schedule: Schedule = "cosine"
    warmup: int = 100
    decay_ratio: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    max_skipped: int = 10
    seed: int = 1337
    log_every: int = 10
    eval_every: int = 250
    eval_tokens: int = 131072
    val_fraction: float = 0.1
    pack: bool = True
    save_every: int = 500
    patience: int = 0
    keep: int = 0
    sample_every: int = 0
    compile: bool = False
    cuda_graph: bool = False
    distill_weight: float = 1.0
    recompute: bool = False

    def __post_init__(self) -> None:
        for field in ("steps", "batch_tokens", "log_every", "eval_tokens", "max_skipped"):
            _require_int(self, field, 1)
        for field in ("warmup", "seed", "eval_every", "save_every", "patience", "keep", "sample_every"):
            _require_int(self, field, 0)
        if self.micro_batch_tokens is not None:
            _require_int(self, "micro_batch_tokens", 1)
        _require_choice(self, "schedule", SCHEDULES)
        for field in ("lr", "weight_decay", "grad_clip", "distill_weight"):
            _require_number(self, field, 0.0)
        rule = "must be above 0: without --distill-from there is no teacher"
        _require(self.distill_weight > 0, "distill_weight", self.distill_weight, rule)
        for field in ("min_lr_ratio", "decay_ratio"):
            _require_number(self, field, 0.0, 1.0)
        for field in ("beta1", "beta2"):
            _require_number(self, field, 0.0, 0.99999)
        _require_number(self, "val_fraction", 0.0, 0.9)
        validates = self.eval_every > 0 and self.val_fraction > 0
        rule = f"needs validations, and eval_every = {self.eval_every} with val_fraction = {self.val_fraction} makes none"
        _require(self.patience == 0 or validates, "patience", self.patience, rule)
        _require(isinstance(self.pack, bool), "pack", self.pack, "must be true or false")
        _require(isinstance(self.compile, bool), "compile", self.compile, "must be true or false")
        _require(isinstance(self.cuda_graph, bool), "cuda_graph", self.cuda_graph, "must be true or false")
        _require(isinstance(self.recompute, bool), "recompute", self.recompute, "must be true or false")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON values."""
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "model": {"dim": 128, "depth": 4, "heads": 4, "kv_heads": 2, "dim_head": 32, "context": 128},
        "nsa": {
            "compress_block": 8, "compress_stride": 4, "select_block": 16,
            "num_selected": 4, "num_init": 1, "num_local": 2, "window": 32,
        },
        "train": {"steps": 1000, "batch_tokens": 2048, "lr": 2e-3, "warmup": 100, "eval_every": 250},
    },
    "small": {
        "model": {"dim": 384, "depth": 6, "heads": 6, "kv_heads": 6, "dim_head": 64, "context": 256, "dropout": 0.2},
        "nsa": {
            "compress_block": 16, "compress_stride": 8, "select_block": 16,
            "num_selected": 6, "num_init": 1, "num_local": 2, "window": 64,
        },
        "train": {
            "steps": 5000, "batch_tokens": 64 * 256, "lr": 1e-3, "weight_decay": 1.0, "warmup": 100, "eval_every": 250,
        },
    },
    "base": {
        "model": {"dim": 1024, "depth": 12, "heads": 16, "kv_heads": 2, "dim_head": 64, "context": 8192},
        "nsa": {},
        "train": {
            "steps": 20000, "batch_tokens": 64 * 8192, "micro_batch_tokens": 4 * 8192, "lr": 6e-4, "warmup": 1000,
            "beta2": 0.95, "eval_every": 500,
        },
    },
}
"""Model, attention geometry and training recipe of each `--preset`; what a preset leaves out has the dataclass's default."""
