"""Learning from a teacher's whole distribution besides the text (`--distill-from`).

The loss of a batch is cross-entropy + distill_weight * KL(teacher || student), at temperature 1: teacher and student are
language models of one vocabulary, and what is wanted is the teacher's distribution itself. The teacher is a checkpoint that
stays as it is; a run remembers it by path and fingerprint, and goes on with no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.checkpoint import load_checkpoint
from nsa_cli.data import Tokenizer
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import Transformer
from nsa_cli.model.transformer import IGNORED_TARGET
from nsa_cli.training.distributed import Team
from nsa_cli.training.resume import SavedRun
from nsa_cli.training.run import RunPaths


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kl_nats(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    """KL(teacher || student) over the vocabulary in nats, the mean over the tokens that have a target; a scalar.

    teacher, student: logits float32 [b, t, vocab]. targets: int64 [b, t], -1 where nothing is to be predicted.
    """
    each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    predicted = targets != IGNORED_TARGET
    return (each * predicted).sum() / predicted.sum().clamp(min=1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the tokens that have a target: what the model makes of its own logits; a scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)


class DistillingLoss:
    """(inputs, targets, ...) -> [cross-entropy, weight * KL(teacher || student)] in nats a token, float32 [2].

    student: a model, or what compiles or distributes one. More arguments (cu_seqlens) go to both models.
    """

    def __init__(self, student: Callable[..., Tensor], teacher: Transformer, weight: float) -> None:
        self.student, self.teacher, self.weight = student, teacher, weight

    def __call__(self, inputs: Tensor, targets: Tensor, *more: Any) -> Tensor:
        with torch.no_grad():
            theirs = self.teacher(inputs, None, *more)
        ours = self.student(inputs, None, *more)
        return torch.stack((cross_entropy(ours, targets), self.weight * kl_nats(theirs, ours, targets)))


def refuse_shared_teacher(record: dict[str, str] | None, team: Team) -> None:
    """NsaError with exit 2 where processes share each sequence: a teacher reads whole ones."""
    if record is not None and team.context is not None:
        message = "--distill-from needs whole sequences, which --context-parallel shares out"
        raise NsaError(message, "leave one of them out", ExitCode.USAGE)


def find_teacher(given: Path | None, saved: SavedRun | None, paths: RunPaths) -> dict[str, str] | None:
    """path and fingerprint of the run's teacher, the one given or the resumed run's; None without one.

    NsaError with exit 3 for a file that cannot be read, or is not the teacher that the resumed run had; 2 for a file
    that the run will replace.
    """
    before = None if saved is None else saved.origins.get("distill_from")
    if given is None and before is None:
        return None
    path = Path(before["path"] if given is None and before is not None else str(given)).absolute()
    if path.resolve() in {own.resolve() for own in (paths.last, paths.best, paths.state, *paths.all_numbered().values())}:
        message = f"--distill-from {path} is a file that this run writes"
        raise NsaError(message, "choose another --out", ExitCode.USAGE)
    try:
        fingerprint = file_fingerprint(path)
    except OSError as error:
        hint = "give it with --distill-from" if given is None else "give a checkpoint that nsa train wrote"
        raise NsaError(f"cannot read the teacher {path}: {error.strerror}", hint, ExitCode.BAD_INPUT) from error
    if saved is not None and (before is None or before["fingerprint"] != fingerprint):
        was = "none" if before is None else f"{before['fingerprint'][:12]} ({before['path']})"
        raise NsaError(
            f"cannot resume {saved.paths.last} at step {saved.step}: the teacher was {was}, is {fingerprint[:12]} ({path})",
            "resume with the run's own teacher, or train anew with another --out",
            ExitCode.BAD_INPUT,
        )
    return {"path": str(path), "fingerprint": fingerprint}


def load_teacher(path: Path, tokenizer: Tokenizer, **where: Any) -> Transformer:
    """The teacher, in eval mode and without gradients; where: load_checkpoint's device, dtype and kernel.

    NsaError with exit 3 for an unusable file or another tokenizer: its distribution would be over other tokens.
    """
    teacher, info = load_checkpoint(path, **where)
    if info.tokenizer.to_dict() != tokenizer.to_dict():
        theirs, ours = (f"{each.name}, {each.vocab_size} tokens" for each in (info.tokenizer, tokenizer))
        message = f"--distill-from {path} has another tokenizer ({theirs}) than this run ({ours})"
        raise NsaError(message, "train with the teacher's tokenizer", ExitCode.BAD_INPUT)
    return teacher.requires_grad_(False)
