"""All that comes before a run's first step, the same for a run and for one that is only tried (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.model import Transformer, build_model
from nsa_cli.ops.dispatch import resolve_kernel
from nsa_cli.training.batches import BatchPlan, plan_batches, refuse_packing
from nsa_cli.training.convert import begin_from, told
from nsa_cli.training.device import arithmetic
from nsa_cli.training.distill import find_teacher, load_teacher, refuse_shared_teacher
from nsa_cli.training.distributed import Team
from nsa_cli.training.graphs import refuse_cuda_graph
from nsa_cli.training.metrics import header_record, machine_record
from nsa_cli.training.optim import FiniteGuard, make_optimizer
from nsa_cli.training.resume import SavedRun, check_continues, read_run, refuse_start
from nsa_cli.training.run import Reporter, RunPaths
from nsa_cli.training.saving import Progress, RunFiles
from nsa_cli.training.schedule import warmup_steps


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step.

    team: the processes that make its steps. saved: the run that it goes on with; moves: whether it leaves that run's files
    alone. header, machine: of its metrics.
    """

    files: RunFiles
    progress: Progress
    plan: BatchPlan
    dtype: torch.dtype
    team: Team
    teacher: Transformer | None
    saved: SavedRun | None
    moves: bool
    header: dict[str, Any]
    machine: dict[str, Any]


def prepare(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    *,
    paths: RunPaths,
    reporter: Reporter,
    device: str | torch.device = "cpu",
    kernel: str = "auto",
    dtype: torch.dtype | None = None,
    resume: Path | None = None,
    init_from: Path | None = None,
    distill_from: Path | None = None,
    overwrite: bool = False,
    force_data: bool = False,
    notices: Sequence[str] = (),
    team: Team | None = None,
    trial: bool = False,
) -> Prepared:
    """What `nsa_cli.training.train`, with the same arguments and errors, does before its first step; call it inside
    `deterministic_on_cpu`. Of the files of a resumed run those that are missing are written, else nothing.

    trial: nothing at all is written, paths may exist, and of a team only the first process calls: what all of them are
    refused is, and the step is that of one process alone.
    """
    device, team = torch.device(device), team or Team()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype = {dtype}: must be bfloat16, float32 or float64 (float16 would need loss scaling)")
    if model_config.vocab_size != corpus.tokenizer.vocab_size:
        size = corpus.tokenizer.vocab_size
        raise ValueError(f"vocab_size = {model_config.vocab_size}: must be the tokenizer's {size}")
    plan = plan_batches(model_config, config)
    refuse_start(init_from, resume)
    refuse_packing(corpus, config, shared=team.context is not None)
    team.require_context(model_config.context)
    saved = None if resume is None else read_run(resume)
    moves = saved is None or saved.moves_to(paths)
    if moves and not overwrite and not trial:
        paths.refuse_existing()
    if saved is not None:
        other_data = check_continues(saved, model_config, config, corpus, force_data=force_data)
        if other_data is not None:
            notices = [*notices, f"going on with other data: {other_data}"]
            reporter.notice(notices[-1])
    left = saved is None or saved.step < config.steps
    teacher_record = find_teacher(distill_from, saved, paths) if left else None
    refuse_shared_teacher(teacher_record, team)
    world, team = team.world, Team() if trial else team
    settings = {"model": model_config.to_dict(), "train": config.to_dict()}
    team.require_same({"data": corpus.fingerprint, **settings, "step": 0 if saved is None else saved.step})
    sparse = model_config.nsa is not None  # dense attention is SDPA whatever the kernel
    name, fallback = resolve_kernel(kernel, device, allow_fallback=True) if sparse else ("torch", None)
    if fallback is not None:
        notices = [*notices, fallback]
        reporter.notice(fallback)
    if saved is None and (warmup := warmup_steps(config)) < config.warmup:
        reporter.notice(f"warm-up shortened from {config.warmup} to {warmup} steps, half of --steps {config.steps}")
    torch.manual_seed(config.seed)
    weights = torch.float64 if dtype is torch.float64 else torch.float32
    model = build_model(
        model_config, device=device, dtype=weights, kernel="auto" if kernel == "auto" else name,
        weights_device=team.weights_device(device),
    )  # fmt: skip
    if config.cuda_graph:
        refuse_cuda_graph(device, model.kernel if sparse else "dense", processes=world, recompute=config.recompute)
    origins = {} if saved is None else saved.origins
    if init_from is not None:
        autocast = partial(arithmetic, device, dtype)
        # Weights that wait on the host for their shards are not measured there: too slow, and Triton is for the GPU.
        eval_tokens = config.eval_tokens if model.device.type == device.type else 0
        start = begin_from(init_from, model, corpus, plan, eval_tokens=eval_tokens, autocast=autocast)
        reporter.notice(told(start))
        origins = {"init_from": start}
    model.context_parallel, model.recompute = team.context, config.recompute
    teacher = None
    if teacher_record is not None:
        teacher = load_teacher(Path(teacher_record["path"]), corpus.tokenizer, device=device, dtype=weights)
        if config.cuda_graph:
            refuse_cuda_graph(device, teacher.kernel if teacher.config.nsa is not None else "dense")
        origins = {**origins, "distill_from": teacher_record}
    machine = machine_record(model, config, device=device, dtype=dtype, notices=notices, processes=team.record())
    header = {**header_record(model, corpus, machine), **origins}
    optimizer, guard = make_optimizer(model, config), FiniteGuard(device, config.max_skipped)
    files = RunFiles(paths, model, optimizer, guard, config, corpus, device, origins=origins, first=team.first)
    progress = Progress()
    if saved is not None:
        progress = files.restore(saved)
        if other_data is not None:
            progress.forget_losses()
        for path in files.restore_files(saved, progress) if team.first and not trial else []:
            reporter.notice(f"restored {path}")
        progress = Progress(**team.from_first(vars(progress)))
    if team.sharded:
        from nsa_cli.training.sharding import gather, shard

        optimizer = shard(model, optimizer, config, device=device, world=team.world, dtype=dtype)
        files = replace(files, optimizer=optimizer, gather=gather)
    return Prepared(files, progress, plan, dtype, team, teacher, saved, moves, header, machine)
