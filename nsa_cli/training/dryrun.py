"""A run that is only tried: all of its set-up, one step, and what it costs; no file is written."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.model import Transformer, build_model
from nsa_cli.model.accounting import model_flops_per_token
from nsa_cli.ops.dispatch import resolve_kernel
from nsa_cli.training.batches import plan_batches, refuse_packing, training_batches
from nsa_cli.training.convert import begin_from, told
from nsa_cli.training.device import arithmetic, deterministic_on_cpu, explained_errors
from nsa_cli.training.distill import find_teacher, load_teacher, refuse_shared_teacher
from nsa_cli.training.distributed import Team
from nsa_cli.training.graphs import refuse_cuda_graph
from nsa_cli.training.loop import _Run
from nsa_cli.training.metrics import Clock, MetricsLog, finite, header_record, machine_record
from nsa_cli.training.optim import FiniteGuard, make_optimizer
from nsa_cli.training.resume import check_continues, read_run, refuse_start
from nsa_cli.training.run import RunPaths, SilentReporter
from nsa_cli.training.saving import Progress, RunFiles
from nsa_cli.training.signals import Interruption


def dry_run(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    *,
    paths: RunPaths,
    device: str | torch.device = "cpu",
    kernel: str = "auto",
    dtype: torch.dtype | None = None,
    resume: Path | None = None,
    init_from: Path | None = None,
    distill_from: Path | None = None,
    force_data: bool = False,
    team: Team | None = None,
) -> dict[str, Any]:
    """What `train` with the same arguments would begin with, as JSON values; refusals and errors are its own.

    The metrics' header (model, parameters, data, device ...) without its event, and
    flops: of a token, forward and in training, and of a step;
    memory: bytes of weights, gradients, moments and the activations that a micro-batch keeps for its backward pass
    (counted on this device, without --compile), and their total; measured_peak, the allocator's own, on CUDA only;
    step: the run's next one as its metrics line would have it, and its seconds (on CUDA those of a second one, once
    kernels are compiled); None for a run that is done;
    epochs: how often the steps still to do would read the training text.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    plan = plan_batches(model_config, config)
    team = team or Team()
    refuse_start(init_from, resume)
    refuse_packing(corpus, config, shared=team.context is not None)
    team.require_context(model_config.context)
    saved = None if resume is None else read_run(resume)
    notices = []
    if saved is not None:
        other_data = check_continues(saved, model_config, config, corpus, force_data=force_data)
        notices += [f"going on with other data: {other_data}"] if other_data else []
    left = saved is None or saved.step < config.steps
    teacher_record = find_teacher(distill_from, saved, paths) if left else None
    refuse_shared_teacher(teacher_record, team)
    sparse = model_config.nsa is not None
    name, fallback = resolve_kernel(kernel, device, allow_fallback=True) if sparse else ("torch", None)
    notices += [fallback] if fallback else []
    with deterministic_on_cpu(device), explained_errors(plan.micro, model_config.context):
        torch.manual_seed(config.seed)
        weights = torch.float64 if dtype is torch.float64 else torch.float32
        model = build_model(model_config, device=device, dtype=weights, kernel="auto" if kernel == "auto" else name)
        if config.cuda_graph:
            refuse_cuda_graph(device, model.kernel if sparse else "dense", processes=team.world, recompute=config.recompute)
        model.recompute = config.recompute
        if init_from is not None:
            autocast = partial(arithmetic, device, dtype)
            notices.append(told(begin_from(init_from, model, corpus, plan, eval_tokens=config.eval_tokens, autocast=autocast)))
        teacher = None
        if teacher_record is not None:
            teacher = load_teacher(Path(teacher_record["path"]), corpus.tokenizer, device=device, dtype=weights)
        files = RunFiles(
            paths, model, make_optimizer(model, config), FiniteGuard(device, config.max_skipped), config, corpus, device
        )
        progress = Progress() if saved is None else files.restore(saved)
        run = _Run(files, progress, plan, dtype, Clock(), MetricsLog(paths.metrics), SilentReporter(), None, Team(), teacher)
        model.train()
        machine = machine_record(model, config, device=device, dtype=dtype, notices=notices, processes=Team().record())
        report = {key: value for key, value in header_record(model, corpus, machine).items() if key != "event"}
        steps = max(0, config.steps - progress.step)
        step = _one_step(run) if steps else None
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        memory = _memory(model, _saved_for_backward(run), 0 if teacher is None else _weights(teacher))
    flops = model_flops_per_token(model_config)
    return finite(
        {
            **report,
            "flops": {**vars(flops), "step": flops.training * config.batch_tokens},
            "memory": {**memory, "measured_peak": peak},
            "epochs": None if corpus.train_tokens is None else steps * config.batch_tokens / corpus.train_tokens,
            "step": step,
        }
    )


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
