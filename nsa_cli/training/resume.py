"""Whether a saved run may go on with these settings: the same data, tokenizer, model and numbers, or exit 3.

A resumed run must be what one uninterrupted run with the new settings would have been. So these may change:

* paths, log_every, eval_every, save_every, sample_every, keep, patience, max_skipped, compile, cuda_graph, recompute, device,
  kernel, dtype: how the run is done and watched, and when it ends;
* micro_batch_tokens: the same gradient added up in other parts (its last bits may change);
* steps, schedule, lr, min_lr_ratio, warmup, decay_ratio: as far as every update already made would have had the same
  learning rate. That extends a constant run at any time, a wsd run before its decay has begun, and neither a cosine nor
  a linear one.

All else (data, tokenizer, model, batch_tokens, seed, weight_decay, betas, grad_clip, eval_tokens, val_fraction) may
not; the data alone may where the user insists (`--force-data`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nsa_cli.checkpoint import load_state, read_state_meta
from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus, Mixture, Synthetic, Tokenizer, tokenizer_from_dict
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training.run import RunPaths
from nsa_cli.training.schedule import learning_rate

FREE = frozenset({"micro_batch_tokens", "log_every", "eval_every", "save_every", "compile", "cuda_graph", "recompute"})
FREE |= {"max_skipped", "patience", "keep", "sample_every"}
RATE = ("steps", "schedule", "lr", "min_lr_ratio", "warmup", "decay_ratio")


@dataclass(frozen=True)
class SavedRun:
    """A state file's content, its meta checked by `_settings`, and the files of the run that it belongs to."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    paths: RunPaths
    model: ModelConfig
    config: TrainConfig

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.meta["step"])

    @property
    def origins(self) -> dict[str, Any]:
        """What the run was made of besides text and seed: the records of --init-from and of its like."""
        return dict(self.meta.get("origins", {}))

    def moves_to(self, paths: RunPaths) -> bool:
        """Whether going on at `paths` leaves this run's own files alone."""
        return self.paths.state.resolve() != paths.state.resolve()


def refuse_start(init_from: Path | None, resume: Path | None) -> None:
    """NsaError with exit 2 for both: a resumed run has weights of its own."""
    if init_from is not None and resume is not None:
        message = f"--init-from {init_from} begins a run, and --resume {resume} goes on with one"
        raise NsaError(message, "leave --init-from out: the resumed run has its weights already", ExitCode.USAGE)


def read_run(checkpoint: Path) -> SavedRun:
    """The run of `checkpoint`, its last weights or its state file; NsaError with exit 3 if its state cannot be read."""
    paths = _paths(checkpoint)
    tensors, meta = load_state(paths.state)
    model, config = _settings(paths.state, meta)
    return SavedRun(tensors, meta, paths, model, config)


def run_settings(checkpoint: Path) -> tuple[ModelConfig, TrainConfig]:
    """The configurations of the run to resume: the defaults of a `--resume` whose command line leaves settings out.

    From the header of its state. The weights beside it may still be those of a run that this one was to replace.
    """
    state = _paths(checkpoint).state
    return _settings(state, read_state_meta(state))


def run_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of the run to resume, from the header of its state."""
    state = _paths(checkpoint).state
    meta = read_state_meta(state)
    _settings(state, meta)
    try:
        return tokenizer_from_dict(meta["tokenizer"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(state, error) from error


def _paths(checkpoint: Path) -> RunPaths:
    paths = RunPaths.of_run(checkpoint)
    if not paths.state.exists():
        hint = "the state file holds the optimizer; keep it with the checkpoint, or train anew"
        copy = re.fullmatch(r"(.+)\.(?:best|step-\d+)\.safetensors", checkpoint.name)
        if copy is not None and (last := checkpoint.with_name(f"{copy[1]}.safetensors")).exists():
            hint = f"it holds weights alone; its run goes on with --resume {last}"
        raise NsaError(f"cannot resume from {checkpoint}: no {paths.state.name} beside it", hint, ExitCode.BAD_INPUT)
    return paths


def _settings(state: Path, meta: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """Both configurations of a state, once all of its meta is known to have the right types; else NsaError, exit 3."""
    missing = [key for key in (*_META, "model", "train") if key not in meta and key not in _ADDED]
    if missing:
        hint = "resume with the version of nsa that wrote it"
        raise NsaError(f"{state}: a training state without {missing[0]!r}", hint, ExitCode.BAD_INPUT)
    try:
        for key, (right, rule) in _META.items():
            if key in meta and not right(meta[key]):
                raise ValueError(f"{key} = {meta[key]!r}: must be {rule}")
        if not _are_origins(meta.get("origins", {})):
            raise ValueError(f"origins = {meta['origins']!r}: must be a table of records")
        return ModelConfig.from_dict(meta["model"]), TrainConfig(**meta["train"])
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise _unreadable(state, error) from error


def _unreadable(state: Path, error: Exception) -> NsaError:
    reason = " ".join(str(error).split())
    return NsaError(f"{state} is damaged: {reason}", "use another copy of it, or train anew", ExitCode.BAD_INPUT)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_line(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("step")):
        return False
    return all(number is None or type(number) in (int, float) for key, number in value.items() if key != "gates")


def _are_origins(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    teacher = value.get("distill_from", {"path": "", "fingerprint": ""})
    return isinstance(teacher, dict) and all(isinstance(teacher.get(key), str) for key in ("path", "fingerprint"))


_META: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "an integer of at least 0"),
    "elapsed_s": (_is_number, "a number of seconds"),
    "val_loss": (lambda value: value is None or _is_number(value), "a number or null"),
    "best_val_loss": (lambda value: value is None or _is_number(value), "a number or null"),
    "best_step": (lambda value: value is None or _is_count(value), "an integer of at least 0 or null"),
    "stale": (_is_count, "an integer of at least 0"),
    "pending": (lambda value: value is None or _is_line(value), "a metrics line or null"),
    "tokenizer": (lambda value: isinstance(value, dict), "a table"),
    "fingerprint": (lambda value: isinstance(value, str), "a string"),
}
"""What a state's meta holds besides the two configurations: the test of each value, and its rule in words."""

_ADDED = ("stale",)
"""Of these, what states of earlier versions do not have."""


def flag(field: str) -> str:
    """`batch_tokens` as the user writes it: `--batch-tokens`."""
    return "--" + field.replace("_", "-")


_NAMED = 20
"""Sources that a state names; a folder may have a million."""


def data_facts(corpus: Corpus) -> dict[str, Any]:
    """What a state says of the data besides the fingerprint, for the message when it has changed.

    sources: files as they are found, tasks with all of their parameters, both with the weights that the user gave.
    tokens: of text; null where there is no end to them.
    """
    sources, tokens = _sources(corpus), None if corpus.train_tokens is None else len(corpus.train) + len(corpus.val)
    return {"sources": sources[:_NAMED], "files": len(sources), "tokens": tokens}


def _sources(corpus: Corpus) -> list[str]:
    train = corpus.train
    if isinstance(train, Synthetic):
        return [train.spelled_out]
    if "" in corpus.weights:
        return list(corpus.sources)
    parts = zip(train.names, train.parts, strict=True) if isinstance(train, Mixture) else ()
    tasks = {name: part.spelled_out for name, part in parts if isinstance(part, Synthetic)}
    return [f"{tasks.get(name, name)}@{weight:g}" for name, weight in corpus.weights.items()]


def changed_data(saved: SavedRun, corpus: Corpus) -> str | None:
    """How the data differs from the saved run's: "the data was A, is B"; None if it does not."""
    if saved.meta["fingerprint"] == corpus.fingerprint:
        return None
    was, now = (_described(facts) for facts in (saved.meta.get("data"), data_facts(corpus)))
    marks = f"{saved.meta['fingerprint'][:12]} and {corpus.fingerprint[:12]}"
    return f"the data was {was}, is {now} (fingerprints {marks})"


def _described(facts: Any) -> str:
    try:
        sources, files, tokens = list(facts["sources"]), int(facts["files"]), int(facts["tokens"] or 0)
    except (TypeError, KeyError, ValueError):  # a state from before they were kept
        return "another"
    named = " ".join(map(str, sources[:3])) + (f" and {files - 3:,} more" if files > 3 else "")
    return f"{tokens:,} tokens of {named}" if tokens else named


def changed_settings(saved: SavedRun, model_config: ModelConfig, config: TrainConfig, corpus: Corpus) -> list[str]:
    """What keeps the saved run from going on besides the data, each as "--flag was A, is B"; empty if nothing does."""
    meta = saved.meta
    changes = _differences(saved.model.to_dict(), model_config.to_dict())
    if meta["tokenizer"] != corpus.tokenizer.to_dict():
        changes.append(f"the tokenizer was {meta['tokenizer'].get('name', 'another')}, is {corpus.tokenizer.name}")
    old, new = saved.config.to_dict(), config.to_dict()
    if _same_rates(saved.config, config, saved.step):
        old = {key: value for key, value in old.items() if key not in RATE}
    old = {key: value for key, value in old.items() if key not in FREE}
    return changes + _differences(old, {key: new[key] for key in old})


def check_continues(
    saved: SavedRun, model_config: ModelConfig, config: TrainConfig, corpus: Corpus, *, force_data: bool = False
) -> str | None:
    """NsaError with exit 3 that names everything that `changed_settings` and `changed_data` find.

    With force_data other data is let pass, and the change returned for the user to see.
    """
    changes = changed_settings(saved, model_config, config, corpus)
    data = changed_data(saved, corpus)
    other_tokenizer = saved.meta["tokenizer"] != corpus.tokenizer.to_dict()  # it changes the fingerprint by itself
    if data is not None and not other_tokenizer and not force_data:
        changes.append(data)
    if not changes:
        return data
    hint = "resume with the run's own data and settings, or train anew with another --out"
    if changes == [data]:
        hint = "resume with the run's own data, or add --force-data to go on with this"
    raise NsaError(f"cannot resume {saved.paths.last} at step {saved.step}: " + "; ".join(changes), hint, ExitCode.BAD_INPUT)


def _same_rates(old: TrainConfig, new: TrainConfig, done: int) -> bool:
    """Whether the updates made so far would have had the same learning rates."""
    if done > new.steps:
        return False
    return all(learning_rate(step, old) == learning_rate(step, new) for step in range(1, done + 1))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields that differ, a nested table's (the sparse geometry) one by one."""
    changes = []
    for key in [*old, *(key for key in new if key not in old)]:
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            changes += _differences(was, now)
        elif key == "nsa":
            changes.append("the model was sparse, is dense" if now is None else "the model was dense, is sparse")
        else:
            changes.append(f"{flag(key)} was {shown(was)}, is {shown(now)}")
    return changes


def shown(value: Any) -> str:
    """A setting's value as the user writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
