"""What a run takes from other checkpoints: the shape and tokenizer of `nsa train --init-from`, the teacher of --distill-from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cli.cli.resolve import Resolved
from nsa_cli.config import ModelConfig
from nsa_cli.errors import ExitCode, NsaError

if TYPE_CHECKING:
    from nsa_cli.data import Tokenizer


def begins_from(settings: Resolved) -> Path | None:
    """--init-from, and None for one from environment or file where a run is resumed: they may serve new runs as well."""
    if settings["resume"] is not None and settings.origins["init_from"].kind != "flag":
        return None
    path: Path | None = settings["init_from"]
    return path


def refuse_weight_alone(settings: Resolved) -> None:
    """NsaError with exit 2 for --distill-weight on the command line of a new run without a teacher."""
    if settings.origins["distill_weight"].kind == "flag" and settings["distill_from"] is None and settings["resume"] is None:
        message = f"--distill-weight {settings['distill_weight']} weighs a teacher, and this run has none"
        raise NsaError(message, "add --distill-from, or leave --distill-weight out", ExitCode.USAGE)


def take_shape(settings: Resolved, path: Path) -> Tokenizer:
    """The checkpoint's shape in place of preset and defaults, and its tokenizer.

    Of a sparse checkpoint the geometry too, where the user chose none. NsaError with exit 2 for a setting that
    contradicts a weight's shape, 3 for an unusable checkpoint.
    """
    from nsa_cli.checkpoint import read_info
    from nsa_cli.training.convert import FREE, SPARSE_SHAPE, contradiction

    info = read_info(path)
    nsa = info.config.nsa
    shape = {field.name: getattr(info.config, field.name) for field in dataclasses.fields(ModelConfig) if field.name != "nsa"}
    fixed = {*shape} - FREE
    if nsa is not None:
        shape |= vars(nsa)
        fixed |= set(SPARSE_SHAPE)
        if settings.chosen("sparse") and not settings["sparse"]:
            raise contradiction(path, "nsa", None, nsa)
        settings.derive("sparse", True, f"from {path}")
    for name, value in shape.items():
        if name not in settings.flags:
            continue
        if not settings.chosen(name):
            settings.derive(name, value, f"from {path}")
        elif name in fixed and settings[name] != value:
            raise contradiction(path, name, settings[name], value)
    return info.tokenizer
