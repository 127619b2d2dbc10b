"""Learning from a teacher's whole distribution besides the text (`--distill-from`)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from nsa_cli.model.transformer import IGNORED_TARGET


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
