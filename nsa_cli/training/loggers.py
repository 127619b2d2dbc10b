"""TensorBoard and Weights & Biases (`--log`), fed with the records of the metrics file.

A logger only watches: whatever it raises ends its own work with one notice, and the run goes on. Both write beside the
checkpoint; a resumed run goes on in the same place.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training.run import Reporter, RunPaths

GATES = ("cmp", "slc", "win")


class Logger(Protocol):
    """One service. `start` comes once and first; `close` once at the end of a run that started, failed or not."""

    def start(self, info: dict[str, Any]) -> None: ...
    def metrics(self, line: Mapping[str, Any]) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `ckpt.tensorboard`. Steps that a resumed or replaced run does again take the place of the old ones."""

    def __init__(self, paths: RunPaths) -> None:
        self._make = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._folder = paths.metrics.with_name(f"{_stem(paths)}.tensorboard")
        self._writer: Any = None

    def start(self, info: dict[str, Any]) -> None:
        """The header as text, and the writer."""
        done = info.get("from_step")
        self._writer = self._make(log_dir=str(self._folder), purge_step=0 if done is None else done + 1)
        self._writer.add_text("run", f"```json\n{json.dumps(info, indent=2)}\n```", done or 0)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Every number of the line at its step, flushed as the metrics file is."""
        for name, value in numbers(line):
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """One run of project `nsa` (or WANDB_PROJECT), named after the checkpoint; its files and id in `.ckpt.wandb`.

    wandb's own variables (WANDB_MODE=offline, WANDB_API_KEY ...) hold. The folder is hidden from `nsa train FOLDER`, since
    wandb keeps texts there.
    """

    def __init__(self, paths: RunPaths, *, quiet: bool = False) -> None:
        # stdout is the product's: wandb is to leave it alone.
        self._settings: dict[str, Any] = {"console": "off", **({"silent": True} if quiet else {})}
        self._wandb = _package("wandb", "wandb")
        self._name = _stem(paths)
        self._folder = paths.metrics.with_name(f".{self._name}.wandb")
        self._run: Any = None

    def start(self, info: dict[str, Any]) -> None:
        """A new run, or the resumed run's own."""
        from nsa_cli.checkpoint import write_atomic

        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._folder / "run-id"
        run_id = known.read_text(encoding="utf-8").strip() if "from_step" in info and known.exists() else None
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nsa"),
            name=self._name,
            id=run_id,
            resume=None if run_id is None else "allow",
            config=info,
            dir=os.environ.get("WANDB_DIR", str(self._folder)),
            settings=self._wandb.Settings(**self._settings),
        )
        write_atomic(known, lambda path: _write(path, f"{self._run.id}\n"))
        # wandb's own step never goes back, which a run resumed from an earlier state does.
        self._run.define_metric("*", step_metric="step")

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Every number of the line, over `step`."""
        self._run.log({"step": line["step"], **dict(numbers(line))})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


LOGGERS = ("tensorboard", "wandb")


def make_loggers(names: Sequence[str], paths: RunPaths, *, quiet: bool = False) -> dict[str, Logger]:
    """The loggers of `--log`, by name; quiet ones print nothing either.

    NsaError with exit 2 for another name, 1 for a package that is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise NsaError(f"--log {name}: must be one of {', '.join(LOGGERS)}", "", ExitCode.USAGE)
    return {name: TensorBoard(paths) if name == "tensorboard" else WandB(paths, quiet=quiet) for name in dict.fromkeys(names)}


class LoggedReporter:
    """A Reporter that tells `inner` everything and each logger what the metrics file gets."""

    def __init__(self, inner: Reporter, loggers: Mapping[str, Logger]) -> None:
        self._inner = inner
        self._waiting, self._active = dict(loggers), dict[str, Logger]()

    def __enter__(self) -> LoggedReporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._close(failed=kind is not None)

    def start(self, info: dict[str, Any]) -> None:
        """The header."""
        self._inner.start(info)
        self._active, self._waiting = self._waiting, {}
        self._tell("start", info)

    def metrics(self, line: dict[str, Any]) -> None:
        """A logged step."""
        self._inner.metrics(line)
        self._tell("metrics", line)

    def progress(self, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """After every step."""
        self._inner.progress(step, steps, line)

    def notice(self, text: str) -> None:
        """One line for the user."""
        self._inner.notice(text)

    def finish(self, summary: dict[str, Any]) -> None:
        """How the run ended; an interrupted one may be gone on with, and has not failed."""
        self._close(failed=False)
        self._inner.finish(summary)

    def _close(self, *, failed: bool) -> None:
        self._tell("close", failed=failed)
        self._active = {}

    def _tell(self, what: str, *arguments: Any, **options: Any) -> None:
        for name, logger in list(self._active.items()):
            try:
                getattr(logger, what)(*arguments, **options)
            except Exception as error:
                del self._active[name]
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._inner.notice(f"--log {name} failed, and gets no more of this run: {reason}")


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a metrics line but its step, by name; nested ones by path, layers by number, gates by branch:
    "loss", "gates/0/cmp", "selection/changed/1"."""
    for key, value in line.items():
        if key == "gates":
            value = [dict(zip(GATES, means, strict=True)) for means in value]
        if key != "step":
            yield from _numbers(key, value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(f"{name}/{key}", each)
    elif isinstance(value, (list, tuple)):
        for place, each in enumerate(value):
            yield from _numbers(f"{name}/{place}", each)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield name, value


def _package(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"--log {extra} needs the {extra} package, which is not installed"
        raise NsaError(message, f"pip install 'nsa-cli[{extra}]'", ExitCode.FAILURE) from error


def _stem(paths: RunPaths) -> str:
    return paths.metrics.name.removesuffix(".metrics.jsonl")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
