"""Small training runs that several test files make: a learnable text, tiny models, and what of a run to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import nsa_cli.training.prepare as prepare
from nsa_cli.config import ModelConfig, NSAConfig, TrainConfig
from nsa_cli.data import ByteTokenizer, Corpus, load_corpus
from nsa_cli.training import RunPaths, TrainResult, train

CONTEXT = 32
GEOMETRY = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=8)


def model_config(sparse: bool = False, **fields: Any) -> ModelConfig:
    sizes = {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 8, "context": CONTEXT}
    return ModelConfig(**{**sizes, "nsa": GEOMETRY if sparse else None, **fields})


def train_config(**fields: Any) -> TrainConfig:
    small = {"steps": 12, "batch_tokens": 4 * CONTEXT, "lr": 3e-3, "warmup": 2, "log_every": 1, "eval_every": 5}
    return TrainConfig(**{**small, "eval_tokens": 8 * CONTEXT, "save_every": 4, **fields})


def text_corpus(folder: Path, text: str = "a fox, a dog, a cat and a hen. ", *, val_fraction: float = 0.1) -> Corpus:
    file = folder / "text.txt"
    file.write_text(text * 200)
    return load_corpus([str(file)], ByteTokenizer(), val_fraction=val_fraction, context=CONTEXT)


def documents_corpus(folder: Path, count: int = 60, *, pack: bool = True, val_fraction: float = 0.2) -> Corpus:
    """Lines of .jsonl, most of them shorter than a window."""
    words = ["the cat", "a dog ran", "one hen sat on the mat", "x"]
    file = folder / "text.jsonl"
    texts = [" ".join(words[(i * i + k) % 4] for k in range(1 + i % 5)) for i in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return load_corpus([str(file)], ByteTokenizer(), val_fraction=val_fraction, context=CONTEXT, pack=pack)


def random_corpus(seed: int, tokens: int) -> Corpus:
    """Independent uniform bytes: nothing to learn, ln 256 nats each."""
    ids = np.random.default_rng(seed).integers(0, 256, tokens + tokens // 10, dtype=np.uint8)
    return Corpus(ids[:tokens], ids[tokens:], tokens, tokens // 10, f"random {seed}", ["random"], ByteTokenizer())


def run(folder: Path, corpus: Corpus, name: str = "ckpt", *, sparse: bool = False, **options: Any) -> TrainResult:
    """`train` on a tiny model; `model` and `config` take fields, the rest are train's own options."""
    model, config = options.pop("model", {}), options.pop("config", {})
    paths = options.pop("paths", RunPaths.beside(folder / f"{name}.safetensors"))
    return train(model_config(sparse, **model), train_config(**config), corpus, paths=paths, **options)


def records(folder: Path, name: str = "ckpt") -> list[dict[str, Any]]:
    text = (folder / f"{name}.metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def steps(folder: Path, name: str = "ckpt") -> list[dict[str, Any]]:
    return [record for record in records(folder, name) if "step" in record]


def curve(folder: Path, name: str = "ckpt") -> list[dict[str, Any]]:
    """The step lines without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu", "elapsed_s")} for line in steps(folder, name)]


def weights(folder: Path, name: str = "ckpt") -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hook_losses(monkeypatch: Any, change: Callable[[int, bool, Tensor], Tensor | None]) -> None:
    """Every loss of models built from now on goes through change(call, training, loss); calls count from 1."""
    build = prepare.build_model
    calls = {True: 0, False: 0}

    def hooked(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)

        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if output.ndim > 0:  # logits
                return None
            calls[module.training] += 1
            return change(calls[module.training], module.training, output)

        model.register_forward_hook(hook)
        return model

    monkeypatch.setattr(prepare, "build_model", hooked)


class Told:
    """A Reporter that keeps what it is told, and can act on it."""

    def __init__(self, on_metrics: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.started: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.progressed: list[int] = []
        self.notices: list[str] = []
        self.finished: list[dict[str, Any]] = []
        self.on_metrics = on_metrics

    def start(self, info: dict[str, Any]) -> None:
        self.started.append(info)

    def metrics(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.on_metrics is not None:
            self.on_metrics(line)

    def progress(self, step: int, steps: int, line: Mapping[str, Any]) -> None:
        self.progressed.append(step)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def finish(self, summary: dict[str, Any]) -> None:
        self.finished.append(summary)
