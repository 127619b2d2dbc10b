"""What surrounds a training run: where its files lie, who is told about it, what comes out. No torch here."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nsa_cli.errors import ExitCode, NsaError


@dataclass(frozen=True)
class RunPaths:
    """The four files of a run: last weights, best weights on validation, resume state, metrics."""

    last: Path
    best: Path
    state: Path
    metrics: Path

    @classmethod
    def beside(cls, out: Path) -> RunPaths:
        """Names made from `out` less its `.safetensors`: ckpt.safetensors gives ckpt.best.safetensors,
        ckpt.state.safetensors and ckpt.metrics.jsonl. Any other suffix is part of the name. NsaError with exit 2 for
        a folder."""
        if out.is_dir():
            hint = f"name a file in it: --out {out / 'ckpt.safetensors'}"
            raise NsaError(f"--out {out} is a folder, not a file", hint, ExitCode.USAGE)
        stem = out.name.removesuffix(".safetensors") or out.name
        return cls(
            last=out,
            best=out.with_name(f"{stem}.best.safetensors"),
            state=out.with_name(f"{stem}.state.safetensors"),
            metrics=out.with_name(f"{stem}.metrics.jsonl"),
        )

    @classmethod
    def of_run(cls, checkpoint: Path) -> RunPaths:
        """The files of the run that `checkpoint`, its last weights or its state file, belongs to (for `--resume`).
        NsaError with exit 3 for a folder."""
        if checkpoint.is_dir():
            hint = "name the .safetensors file in it"
            raise NsaError(f"--resume {checkpoint} is a folder, not a checkpoint", hint, ExitCode.BAD_INPUT)
        name = checkpoint.name.removesuffix(".state.safetensors")
        return cls.beside(checkpoint if name == checkpoint.name else checkpoint.with_name(f"{name}.safetensors"))

    def numbered(self, step: int) -> Path:
        """Where `--keep` puts the weights of a step: ckpt.step-00000500.safetensors."""
        return self.last.with_name(f"{self._stem}.step-{step:08}.safetensors")

    def all_numbered(self) -> dict[int, Path]:
        """The numbered weights that lie beside the checkpoint, by step."""
        found = {}
        for path in self.last.parent.glob(f"{glob.escape(self._stem)}.step-*.safetensors"):
            digits = path.name.removeprefix(f"{self._stem}.step-").removesuffix(".safetensors")
            if digits.isdecimal() and path == self.numbered(int(digits)):
                found[int(digits)] = path
        return found

    @property
    def _stem(self) -> str:
        return self.state.name.removesuffix(".state.safetensors")

    def refuse_existing(self) -> None:
        """NsaError with exit 2 if a checkpoint of an earlier run lies at one of these paths."""
        for path in (self.last, self.state, self.best, *self.all_numbered().values()):
            if path.exists():
                raise NsaError(
                    f"{path} exists",
                    f"go on from it with --resume {self.last}, replace it with --overwrite, or choose another --out",
                    ExitCode.USAGE,
                )


class Reporter(Protocol):
    """Who is told about a run while it lasts. The loop calls it from its own thread and never prints itself.

    A "line" is a record of the metrics file as a dict of JSON values (see nsa_cli.training.metrics).
    """

    def start(self, info: dict[str, Any]) -> None:
        """Once, before the first step: the header record (a resumed run: the resume record)."""

    def metrics(self, line: dict[str, Any]) -> None:
        """Every logged step, as written to the metrics file."""

    def progress(self, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """After every step; `line` is the last one logged, empty before the first."""

    def notice(self, text: str) -> None:
        """One line for the user: a fallback, a signal, a repaired file."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Once, when the files are written, finished and interrupted runs alike; not after an error."""


class SilentReporter:
    """A Reporter that tells nobody: the default of `train` for callers from Python."""

    def start(self, info: dict[str, Any]) -> None: ...
    def metrics(self, line: dict[str, Any]) -> None: ...
    def progress(self, step: int, steps: int, line: Mapping[str, Any]) -> None: ...
    def notice(self, text: str) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    step: optimizer steps done. status: "patience" where validations had stopped to improve. signal: the number of the
    signal that interrupted it, else None. val_loss: the last validation's, best_val_loss and best_step the best one's
    (nats per token), None if there was none.
    skipped: updates left out because the loss or gradient was not finite. checkpoint: the last weights.
    """

    step: int
    status: Literal["finished", "patience", "interrupted"]
    signal: int | None
    val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    skipped: int
    elapsed_s: float
    checkpoint: Path
