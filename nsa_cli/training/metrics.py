"""The record of a run, `ckpt.metrics.jsonl`: one header, then one JSON object for every logged step.

Header ("event": "start"): model, train (the two configurations), parameters (by part), kernel (the one really used),
notices, device, dtype, compile, world_size (processes), parallel, context_parallel, data (fingerprint, sources, tokens,
bytes), tokenizer, versions; init_from, a start's report (nsa_cli.training.convert), and distill_from, a teacher's path and
fingerprint, where the run has them.
A resumed run adds {"event": "resume", "from_step", data, and the same description of the machine} where it goes on; one that
diverged {"event": "diverged", first_step, at_step, windows, not_finite} (nsa_cli.training.divergence).

A step's line: step, loss (nats per token, the mean over the step's batch, before its update), bits_per_byte, lr,
grad_norm (before clipping), skipped (updates left out so far because loss or gradient was not finite), tokens_per_s
(since the line before, of all processes together, validation and saving not counted), mfu (see `model_flops_utilisation`; null
where the device's peak is not known, as on a CPU), elapsed_s (of the run, resumed parts added up); with a teacher
distill_kl, KL(teacher || student) in nats per token: what is minimised is loss + distill_weight * distill_kl; for sparse
models gates, per layer the means of [cmp, slc, win]; after a validation val_loss and val_bits_per_byte, for data with weights
val_losses, by source, for synthetic tasks val_accuracy, the share of answers that are right (val_accuracies, by source), for
sparse models selection, a list a layer of entropy_nats, entropy_share, changed and never_selected (nsa_cli.training.health),
and "status": "patience" where it ended the run; with samples "sample", a text. A number that is not finite is null: JSON has
no NaN.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

import nsa_cli
from nsa_cli.checkpoint import write_atomic
from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import Transformer
from nsa_cli.model.accounting import model_flops_per_token, parameters_by_part
from nsa_cli.training.device import device_name


def bits_per_byte(nats_per_token: float, tokens: int, num_bytes: int) -> float:
    """Loss in bits for each byte of text: nats_per_token * (tokens / num_bytes) / ln 2; NaN for a text of no bytes."""
    return nats_per_token * tokens / num_bytes / math.log(2) if num_bytes else math.nan


def model_flops_utilisation(config: ModelConfig, tokens_per_s: float, peak: float | None) -> float | None:
    """MFU: tokens a second times the model's FLOPs of a token in training, as a share of `peak`; None without a peak.

    peak: FLOP/s of all processes' devices together (nsa_cli.model.peaks), for bfloat16 the dense tensor-core rate.
    FLOPs of a token are `accounting.model_flops_per_token(config).necessary`, in a whole window of config.context tokens. A
    sparse model's are those of the pairs that it looks at, not a dense one's. Documents packed into a window need less than
    is counted. Nothing that is computed again counts, in kernels or by --recompute, nor does a teacher's pass.
    """
    return None if peak is None else model_flops_per_token(config).necessary * tokens_per_s / peak


def finite(value: Any) -> Any:
    """The value with every non-finite float in it, at any depth of lists and dicts, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return value


def machine_record(
    model: Transformer,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    notices: Sequence[str],
    processes: Mapping[str, Any],
) -> dict[str, Any]:
    """What may differ between a run and its resumption: kernel, notices, device, dtype, processes, versions, training
    settings."""
    return {
        "train": config.to_dict(),
        "kernel": model.kernel,
        "notices": list(notices),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        **processes,
        "compile": config.compile,
        "cuda_graph": config.cuda_graph,
        "versions": {"nsa": nsa_cli.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def header_record(model: Transformer, corpus: Corpus, machine: dict[str, Any]) -> dict[str, Any]:
    """The first line of the metrics file."""
    return {
        "event": "start",
        "model": model.config.to_dict(),
        "parameters": parameters_by_part(model),
        "tokenizer": corpus.tokenizer.name,
        "data": {
            "fingerprint": corpus.fingerprint,
            "sources": list(corpus.sources),
            "train_tokens": corpus.train_tokens,
            "train_bytes": corpus.train_bytes,
            "val_tokens": corpus.val_tokens,
            "val_bytes": corpus.val_bytes,
        },
        **machine,
    }


class Clock:
    """Wall time of a run and its speed; time inside `paused` counts for the first and not for the second."""

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self._origin = time.perf_counter() - elapsed_s
        self._mark = time.perf_counter()
        self._tokens = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run, those of the parts before a resumption included."""
        return time.perf_counter() - self._origin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count for `tokens_per_s`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - begin

    def count(self, tokens: int) -> None:
        """Adds tokens that were trained on."""
        self._tokens += tokens

    def tokens_per_s(self) -> float:
        """Tokens a second since the last call."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._mark, 1e-9)
        self._mark, self._tokens = now, 0
        return rate


class MetricsLog:
    """Appends records to one JSONL file, each flushed, so that `tail -f` and a killed run see whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def start(self, header: dict[str, Any]) -> None:
        """A new file with this first line, in place of any old one."""
        self._open("w")
        self.write(header)

    def resume(self, source: Path, step: int, header: dict[str, Any], record: dict[str, Any]) -> None:
        """Goes on from the lines of `source` up to `step`, then `record`; where source is lost or step 0, from `header`.

        Lines beyond `step` (logged, then lost with the process) are dropped, as is a half-written last one: each step
        stands in the file once. At step 0 the lines may be an earlier run's, which the killed one was to replace.
        """
        if step == 0 or not source.exists():
            self.start(header)
            return self.write(record)
        with write_errors(self.path):
            kept = [line for line in source.read_text(encoding="utf-8").splitlines() if _belongs(line, step)]
        write_atomic(self.path, lambda target: _write_lines(target, kept))
        self._open("a")
        return self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """One line; NsaError with exit 1 when the file cannot be written."""
        assert self._file is not None, "start or resume first"
        with write_errors(self.path):
            self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Idempotent, and silent: every line has been flushed, and one that failed has been told."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _open(self, mode: Literal["w", "a"]) -> None:
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open(mode, encoding="utf-8")


def _belongs(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict):
        return False
    resumed = record.get("event") == "resume"
    return bool(record["from_step"] < step if resumed else record.get("step", 0) <= step)


def _write_lines(target: Path, lines: Sequence[str]) -> None:
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """An OSError inside becomes NsaError with exit 1 that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise NsaError(f"{path}: {reason}", "choose another --out, or make room", ExitCode.FAILURE) from error


def copy_file(source: Path, target: Path) -> None:
    """`source` at `target`, whole or not at all."""
    write_atomic(target, lambda temporary: _copy(source, temporary))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
