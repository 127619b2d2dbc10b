"""Starting a run from the weights of another (`--init-from`): the same kind of model as it is, or a dense one made sparse.

A sparse model begins as close to the dense one as its shape allows. Projections are copied, to all three branches where
these have their own. Compressed values are zero, and g_slc + g_win = 1 for every token, so that a query whose window and
selected blocks hold all that it may see gets dense attention's o. The two share 1 in proportion to the tokens that each
branch reads: 1/2 each where both hold the whole context. (Against 1/2 everywhere, on a small model of the sample stories with
a context of 256: KL 0.008 in place of 0.012 nats with a window of twice the selection, 0.011 in place of 0.018 with one of a
quarter.) Compressed keys begin as block means, so that the first selection follows what the dense model looks at.

Nothing that must learn begins where its gradient is lost. The value network's last layer begins at zero and gets a gradient
through what is below it. Networks without such a layer (mean, attention-pool, gated) map zeros to zeros: there the compressed
branch's own value projection begins at zero instead. With shared keys and values there is none of its own; the compressed
gate then begins at sigmoid(-6) = 0.0025, small and not saturated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from nsa_cli.checkpoint import load_checkpoint
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.data import Corpus, Tokenizer
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import Transformer
from nsa_cli.model.compress import Compression
from nsa_cli.model.nsa import SparseAttention
from nsa_cli.model.transformer import IGNORED_TARGET
from nsa_cli.training.batches import Batch, BatchPlan, validation_batches
from nsa_cli.training.device import explained_errors
from nsa_cli.training.distill import cross_entropy, file_fingerprint, kl_nats
from nsa_cli.training.resume import flag, shown
from nsa_cli.training.validation import evaluating

Autocast = Callable[[], AbstractContextManager[Any]]

FREE = frozenset({"context", "dropout", "rope_theta", "nsa"})
"""Fields of the model that may differ from the checkpoint's: no weight's shape depends on them."""
SPARSE_SHAPE = ("compress_block", "compress", "branch_kv")
"""Fields of the sparse geometry that weights depend on: a sparse checkpoint fixes these, and a dense one nothing."""

LAST_LAYER = {"conv": "w", "linear": "w", "mlp": "w2", "grouped-mlp": "w2"}
"""Compression networks whose output is zero when this parameter is."""
CLOSED_GATE = -6.0
LINEAR_RANGE = 0.25
"""Scale of block means inside an MLP that computes them: gelu(z) is z / 2 up to z^2 / sqrt(2 pi)."""


@dataclass(frozen=True)
class Start:
    """What became of every parameter. Names of the compressed branch's part of a matrix end with [cmp].

    copied: has the source's values. new: initialised here. unused: the source's, without a place in the model.
    """

    kind: str
    copied: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Distance:
    """How far a start is from its source on the validation windows, in nats a token.

    kl_nats: mean of KL(source || start) over the vocabulary. source_val_loss, val_loss: cross-entropy of each.
    """

    kl_nats: float
    source_val_loss: float
    val_loss: float


def contradictions(source: ModelConfig, target: ModelConfig) -> list[str]:
    """Fields of `target` that weights of `source` cannot be given to; "nsa" for a dense model of sparse weights."""
    wrong = [f.name for f in fields(ModelConfig) if f.name not in FREE and getattr(source, f.name) != getattr(target, f.name)]
    if source.nsa is None:
        return wrong
    if target.nsa is None:
        return [*wrong, "nsa"]
    return wrong + [name for name in SPARSE_SHAPE if getattr(source.nsa, name) != getattr(target.nsa, name)]


def contradiction(path: Path, name: str, value: Any, theirs: Any) -> NsaError:
    """The refusal (exit 2) of a setting that differs from the checkpoint's."""
    if name == "nsa":
        return NsaError(f"--dense contradicts {path}, a sparse model", "leave --dense out", ExitCode.USAGE)
    hint = f"leave {flag(name)} out: --init-from takes the model's shape from the checkpoint"
    return NsaError(f"{flag(name)} {shown(value)} contradicts {path}, where it is {shown(theirs)}", hint, ExitCode.USAGE)


def begin_from(
    path: Path, model: Transformer, corpus: Corpus, plan: BatchPlan, *, eval_tokens: int, autocast: Autocast
) -> dict[str, Any]:
    """`load_start`, `start_from` and, where there is held-out text, `measure_distance`: the record for the header.

    eval_tokens: of held-out text, at most; 0 measures nothing.
    path, fingerprint (SHA-256 of the file), step, kind, copied, new, unused, and a Distance's three numbers or nulls.
    """
    weights, context = model.token_emb.weight.dtype, model.config.context
    source, step = load_start(path, model.config, corpus.tokenizer, device=model.device, dtype=weights)
    start, distance = start_from(model, source), None
    if corpus.val_tokens != 0 and eval_tokens:
        batches = validation_batches(corpus.validation, plan, context=context, max_tokens=eval_tokens, device=model.device)
        with explained_errors(plan.micro, context):
            distance = measure_distance(source, model, batches, autocast=autocast)
    numbers = dict.fromkeys(f.name for f in fields(Distance)) if distance is None else vars(distance)
    return {"path": str(path.absolute()), "fingerprint": file_fingerprint(path), "step": step, **vars(start), **numbers}


def told(record: Mapping[str, Any]) -> str:
    """`begin_from`'s record in a line."""
    copied, new, unused = (len(record[part]) for part in ("copied", "new", "unused"))
    text = f"begins from {record['path']} ({record['kind']}): {copied} parameters copied, {new} new, {unused} unused"
    if record["kl_nats"] is None:
        return f"{text}; the start was not measured on held-out text"
    losses = f"loss {record['source_val_loss']:.4f} there, {record['val_loss']:.4f} here"
    return f"{text}; KL(source || start) {record['kl_nats']:.4g} nats a token on the held-out text ({losses})"


def refuse_other_tokenizer(path: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    """NsaError with exit 2 unless the checkpoint's tokenizer is the run's."""
    if theirs.to_dict() != ours.to_dict():
        message = f"--init-from {path} has another tokenizer ({theirs.name}) than this run ({ours.name})"
        raise NsaError(message, "leave --tokenizer out: the checkpoint's is taken", ExitCode.USAGE)


def load_start(path: Path, config: ModelConfig, tokenizer: Tokenizer, **where: Any) -> tuple[Transformer, int]:
    """The model of `path`, in eval mode, and its step, once it is known that `config` can be given its weights.

    where: load_checkpoint's device, dtype and kernel. NsaError with exit 3 for an unusable file, 2 for another shape or
    tokenizer.
    """
    source, info = load_checkpoint(path, **where)
    refuse_other_tokenizer(path, info.tokenizer, tokenizer)
    for name in contradictions(info.config, config):
        ours, theirs = ({**vars(c.nsa or config), **vars(c)}[name] for c in (config, info.config))
        raise contradiction(path, name, ours, theirs)
    return source, info.step


@torch.no_grad()
def start_from(model: Transformer, source: Transformer) -> Start:
    """Gives `model`, freshly made, the weights of `source`, whose shape fits (`contradictions`)."""
    ours, theirs = model.state_dict(), source.state_dict()
    copied = [name for name in ours if name in theirs]
    widened = model.config.nsa is not None and source.config.nsa is None
    for name in copied:
        copies = ours[name].shape[0] // theirs[name].shape[0]  # 3 for the keys and values of three branches
        ours[name].copy_(theirs[name].repeat(copies, *[1] * (theirs[name].ndim - 1)))
    new = [name for name in ours if name not in theirs]
    if widened:
        for i, block in enumerate(model.layers):
            assert isinstance(block.attn, SparseAttention)
            new += [f"layers.{i}.attn.{part}" for part in _start_sparse(block.attn, model.config.context)]
    names = ["dense" if each.config.nsa is None else "sparse" for each in (source, model)]
    unused = [name for name in theirs if name not in ours]
    return Start(" to ".join(names), tuple(copied), tuple(new), tuple(unused))


def _start_sparse(attention: SparseAttention, context: int) -> list[str]:
    """New parameters of one layer whose projections are copied; names the parts of copied ones that it changed."""
    nsa = attention.nsa
    attention.to_gates.weight.zero_()
    biases = rearrange(attention.to_gates.bias, "(h r) -> r h", r=3)
    selected, window = (min(tokens, context) for tokens in (nsa.num_selected * nsa.select_block, nsa.window))
    for bias, value in zip(biases, (0.0, math.log(selected / window), math.log(window / selected)), strict=True):
        bias.fill_(value)
    start_as_mean(attention.compress_k, nsa)
    for name, parameter in attention.compress_v.named_parameters():
        if name in ("pos", LAST_LAYER.get(nsa.compress)):
            parameter.zero_()
    if nsa.compress in LAST_LAYER:
        return []
    if nsa.branch_kv == "independent":
        rearrange(attention.to_v.weight, "(r x) dim -> r x dim", r=3)[0].zero_()
        return ["to_v.weight[cmp]"]
    biases[0].fill_(CLOSED_GATE)
    return []


def start_as_mean(network: Compression, nsa: NSAConfig) -> None:
    """Sets the network to the mean of a block's tokens, as nearly as it can.

    Exactly for attention-pool, conv and linear; up to gelu's curvature for the MLPs; half of it for gated, whose
    sigmoid begins at 1/2.
    """
    parts = dict(network.named_parameters())
    for name in ("pos", "a"):
        if name in parts:
            parts[name].zero_()
    if nsa.compress == "gated":
        parts["w"].zero_()
    elif nsa.compress == "conv":
        parts["w"].fill_(1 / nsa.compress_block)
    elif nsa.compress in LAST_LAYER:
        first = parts["w" if nsa.compress == "linear" else "w1"]
        scale = 1.0 if nsa.compress == "linear" else LINEAR_RANGE
        identity = torch.eye(first.shape[-2], device=first.device, dtype=first.dtype)
        first.copy_(scale / nsa.compress_block * identity.repeat(1, nsa.compress_block))
        if "w2" in parts:
            parts["w2"].copy_(2 / scale * identity)


def measure_distance(
    source: Transformer, model: Transformer, batches: Iterable[Batch], *, autocast: Autocast
) -> Distance:
    """Both models on the same batches, in eval mode; random states are as before afterwards."""
    total = torch.zeros(3, dtype=torch.float64, device=model.device)
    count = torch.zeros((), dtype=torch.int64, device=model.device)
    with evaluating(model), evaluating(source):
        for inputs, targets, _, cu_seqlens, *_ in batches:
            with autocast():
                theirs, ours = (each(inputs, None, cu_seqlens) for each in (source, model))
            losses = [cross_entropy(logits, targets) for logits in (theirs, ours)]
            predicted = (targets != IGNORED_TARGET).sum()
            total += torch.stack([kl_nats(theirs, ours, targets), *losses]).double() * predicted
            count += predicted
    kl, source_loss, loss = (total / count).tolist()
    return Distance(max(kl, 0.0), source_loss, loss)
