"""The files of a run: what a state holds, the order of writing, and what a resumption finds missing.

Order: state, last weights, best weights, each atomically. Killed between two of them, a run is whole in its state file,
and `restore_files` writes what had not been written. A new run begins with its state of step 0: from then on the files
belong to it, whatever weights of an earlier run still lie beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_cli.checkpoint import read_info, remove_leftovers, save_checkpoint, save_state
from nsa_cli.config import TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import Transformer
from nsa_cli.training.metrics import copy_file, write_errors
from nsa_cli.training.optim import FiniteGuard, load_moments, moments
from nsa_cli.training.resume import SavedRun, data_facts
from nsa_cli.training.run import RunPaths


@dataclass
class Progress:
    """How far a run is: all that its next step depends on besides tensors.

    val_loss, best_val_loss, best_step: of validations in nats per token; None before the first (finite) one. After the
    data was changed by force the losses are None, and best_step alone says that there are best weights.
    stale: validations since the best one.
    pending: the metrics line of `step` if an interruption kept its validation or sample from ending; the resumed run makes
    them up.
    """

    step: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    pending: dict[str, Any] | None = None

    def forget_losses(self) -> None:
        """The held-out text is another one: its losses do not compare with those so far."""
        self.val_loss = self.best_val_loss = None
        self.stale = 0

    def judge(self, loss: float) -> None:
        """A validation of this step's weights; one that is not finite is nobody's best."""
        self.val_loss = loss if math.isfinite(loss) else None
        if self.val_loss is not None and (self.best_val_loss is None or loss < self.best_val_loss):
            self.best_val_loss, self.best_step, self.stale = loss, self.step, 0
        else:
            self.stale += 1


def whole(model: Transformer, optimizer: torch.optim.AdamW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments of a process that has all of them."""
    return model.state_dict(), moments(model, optimizer)


@dataclass(frozen=True)
class RunFiles:
    """Writes and restores a run's files; everything in them but tensors and progress is fixed for the run."""

    paths: RunPaths
    model: Transformer
    optimizer: torch.optim.AdamW
    guard: FiniteGuard
    config: TrainConfig
    corpus: Corpus
    device: torch.device
    origins: Mapping[str, Any] = field(default_factory=dict)
    """What the run was made of besides text and seed, by setting; kept in the state for its resumptions."""
    first: bool = True
    """Whether this process writes: of several that train together one does, and all call `save` and `save_state`."""
    gather: Callable[[Transformer, torch.optim.AdamW], tuple[dict[str, Tensor], dict[str, Tensor]]] = whole
    """Weights and moments in full, from wherever they are."""

    def save(self, progress: Progress, *, elapsed_s: float) -> None:
        """State, last and, if this step is the best one, best weights. An earlier run's best weights are removed."""
        weights = self.save_state(progress, elapsed_s=elapsed_s)
        if not self.first:
            return
        self._save_weights(self.paths.last, progress, weights)
        if progress.best_step == progress.step:
            self._save_weights(self.paths.best, progress, weights)
        elif progress.best_step is None:
            self.paths.best.unlink(missing_ok=True)
        self._keep(progress)

    def _keep(self, progress: Progress) -> None:
        """The numbered copy of a save that save_every made, and only then the end of the oldest that are too many."""
        if not self.is_kept(progress.step):
            return
        copy_file(self.paths.last, self.paths.numbered(progress.step))
        kept = self.paths.all_numbered()
        for step in sorted(step for step in kept if step <= progress.step)[: -self.config.keep]:
            kept[step].unlink(missing_ok=True)

    def is_kept(self, step: int) -> bool:
        """Whether the weights of this step get a file of their own."""
        every = self.config.save_every
        return self.config.keep > 0 and step > 0 and (step == self.config.steps or (every > 0 and step % every == 0))

    def take_over(self) -> None:
        """Removes the numbered weights of an earlier run, which this one replaces."""
        for path in self.paths.all_numbered().values():
            path.unlink(missing_ok=True)

    def save_state(self, progress: Progress, *, elapsed_s: float) -> dict[str, Tensor]:
        """The state alone: all that resuming needs. Returns the weights in it."""
        weights, moved = self.gather(self.model, self.optimizer)
        if not self.first:
            return weights
        meta = {
            **vars(progress),
            "elapsed_s": elapsed_s,
            "model": self.model.config.to_dict(),
            "train": self.config.to_dict(),
            "tokenizer": self.corpus.tokenizer.to_dict(),
            "fingerprint": self.corpus.fingerprint,
            "origins": dict(self.origins),
            "data": data_facts(self.corpus),
        }
        with write_errors(self.paths.last):
            self.paths.last.parent.mkdir(parents=True, exist_ok=True)
        save_state(self.paths.state, self._tensors(weights, moved), meta)
        return weights

    def remove_leftovers(self) -> None:
        """What killed processes left half-written of this run's files."""
        for path in vars(self.paths).values():
            remove_leftovers(path)

    def restore(self, saved: SavedRun) -> Progress:
        """Weights, moments, counts and random states from a state file; NsaError with exit 3 if they do not fit."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "guard": {}, "rng": {}}
        try:
            for name, tensor in saved.tensors.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            self.model.load_state_dict(parts["model"])
            load_moments(self.model, self.optimizer, parts["optimizer"])
            self.guard.load_tensors(parts["guard"])
            torch.set_rng_state(parts["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in parts["rng"]:
                torch.cuda.set_rng_state(parts["rng"]["cuda"], self.device)
            return Progress(**{name: saved.meta[name] for name in Progress.__dataclass_fields__ if name in saved.meta})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            hint = "it is damaged or another version's: train anew"
            message = f"{saved.paths.state} does not fit the model: {reason}"
            raise NsaError(message, hint, ExitCode.BAD_INPUT) from error

    def restore_files(self, saved: SavedRun, progress: Progress) -> list[str]:
        """Writes the last and best weights that `paths` lacks, from the state or from the run resumed; names them.

        A run that moves to other paths writes all of its files there, whatever lay there before. Best weights that are
        nowhere to be found are forgotten, so that the next validation makes new ones.
        """
        restored, moves = [], saved.moves_to(self.paths)
        if moves:
            self.take_over()
            self.save(progress, elapsed_s=saved.meta["elapsed_s"])
        elif not self._holds(saved, self.paths.last, saved.step, saved.meta["val_loss"], saved.meta["train"]):
            self._save_weights(self.paths.last, progress)
            restored.append(str(self.paths.last))
        if not moves and self.is_kept(progress.step) and not self.paths.numbered(progress.step).exists():
            self._keep(progress)
            restored.append(str(self.paths.numbered(progress.step)))
        best = (progress.best_step, progress.best_val_loss)
        if progress.best_step is not None and progress.best_val_loss is None:  # judged on other data, and kept
            if moves and saved.paths.best.exists():
                copy_file(saved.paths.best, self.paths.best)
            return restored
        if progress.best_step is None or (not moves and self._holds(saved, self.paths.best, *best)):
            return restored
        if progress.best_step == progress.step:
            self._save_weights(self.paths.best, progress)
        elif self._holds(saved, saved.paths.best, *best):
            copy_file(saved.paths.best, self.paths.best)
        else:
            progress.best_step = progress.best_val_loss = None
            return restored
        return [*restored, str(self.paths.best)]

    def _holds(self, saved: SavedRun, path: Path, step: int | None, val_loss: float | None, train: Any = None) -> bool:
        """Whether a checkpoint has this step of the saved run, and not of one that had these files before.

        Equal validation losses, in all of their digits, tell apart runs of one model on the same data; where there may
        be none, `train`, the settings it was written with, does.
        """
        try:
            info = read_info(path) if path.exists() else None
        except NsaError:
            return False
        if info is None or (info.step, info.config) != (step, self.model.config):
            return False
        said = info.metadata
        same = said.get("fingerprint") == saved.meta["fingerprint"] and said.get("val_loss") == val_loss
        return same and (train is None or said.get("train") == train)

    def _tensors(self, weights: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moved.items()}
        tensors |= {f"guard.{name}": tensor for name, tensor in self.guard.to_tensors().items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def _save_weights(self, path: Path, progress: Progress, weights: Mapping[str, Tensor] | None = None) -> None:
        save_checkpoint(
            path,
            self.model if weights is None else weights,
            config=self.model.config,
            tokenizer=self.corpus.tokenizer,
            step=progress.step,
            extra={
                "fingerprint": self.corpus.fingerprint,
                "val_loss": progress.val_loss,
                "train": self.config.to_dict(),
            },
        )
