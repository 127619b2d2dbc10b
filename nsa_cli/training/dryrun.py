"""A run that is only tried: all of its set-up, one step, and what it costs; no file is written."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.model import Transformer
from nsa_cli.model.accounting import model_flops_per_token
from nsa_cli.training.batches import training_batches
from nsa_cli.training.device import deterministic_on_cpu, explained_errors
from nsa_cli.training.loop import _Run
from nsa_cli.training.metrics import MetricsLog, finite
from nsa_cli.training.prepare import Prepared, prepare
from nsa_cli.training.run import RunPaths, SilentReporter
from nsa_cli.training.signals import Interruption


class _Notices(SilentReporter):
    """Keeps what the user would be told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


def dry_run(model_config: ModelConfig, config: TrainConfig, corpus: Corpus, *, paths: RunPaths, **options: Any) -> dict[str, Any]:
    """What `train` with the same arguments would begin with, as JSON values; refusals and errors are its own. options: of
    `nsa_cli.training.prepare`; of a team the first process alone calls.

    The metrics' header (model, parameters, data, device ...) without its event, and
    flops: of a token, forward and in training, and of a step;
    memory: bytes of weights, gradients, moments and the activations that a micro-batch keeps for its backward pass
    (counted on this device, without --compile), and their total; measured_peak, the allocator's own, on CUDA only;
    step: the run's next one as its metrics line would have it, and its seconds (on CUDA those of a second one, once
    kernels are compiled); None for a run that is done;
    epochs: how often the steps still to do would read the training text.
    """
    told = _Notices()
    with deterministic_on_cpu(torch.device(options.get("device", "cpu"))):
        ready = prepare(model_config, config, corpus, paths=paths, reporter=told, trial=True, **options)
        with explained_errors(ready.plan.micro, model_config.context):
            return finite(_report(ready, paths, told.texts))


def _report(ready: Prepared, paths: RunPaths, notices: list[str]) -> dict[str, Any]:
    run = _Run(ready, MetricsLog(paths.metrics), SilentReporter())
    model, config, corpus, device = run.model, run.config, run.corpus, run.device
    model.train()
    steps = max(0, config.steps - run.progress.step)
    step = _one_step(run) if steps else None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    memory = _memory(model, _saved_for_backward(run), 0 if ready.teacher is None else _weights(ready.teacher))
    flops = model_flops_per_token(model.config)
    return {
        **{key: value for key, value in ready.header.items() if key != "event"},
        "notices": notices,
        "flops": {**vars(flops), "step": flops.training * config.batch_tokens},
        "memory": {**memory, "measured_peak": peak},
        "epochs": None if corpus.train_tokens is None else steps * config.batch_tokens / corpus.train_tokens,
        "step": step,
    }


def _one_step(run: _Run) -> dict[str, Any]:
    step, seconds = run.progress.step + 1, 0.0
    line: dict[str, Any] = {}
    for _ in range(2 if run.device.type == "cuda" else 1):
        begin = time.perf_counter()
        made = run.update(step, Interruption())
        assert made is not None, "nothing interrupts it"
        line = line or run.measured(step, *made)  # waits for the device
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds = time.perf_counter() - begin
    return {**line, **run.speed(run.config.batch_tokens / seconds), "elapsed_s": round(seconds, 4)}


def _weights(model: Transformer) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _memory(model: Transformer, activations: int, teacher: int) -> dict[str, int]:
    weights = _weights(model)
    parts = {"weights": weights, "gradients": weights, "moments": 2 * weights, "activations": activations}
    parts |= {"teacher": teacher} if teacher else {}
    return {**parts, "total": sum(parts.values())}


def _saved_for_backward(run: _Run) -> int:
    """Bytes that the graph of a micro-batch's forward pass holds besides the weights, each storage counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    batches = training_batches(
        run.corpus.training, run.plan, seed=run.config.seed, step=1, context=run.context, device=run.device
    )
    batch = next(batches)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), run.autocast():
        loss = run.model(batch.inputs, batch.targets, batch.cu_seqlens)
    del loss
    return sum(held.values())
