"""`nsa train`: settings in, a checkpoint out."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nsa_cli.cli import options
from nsa_cli.cli.resolve import Resolved, load
from nsa_cli.cli.start import begins_from, refuse_weight_alone, take_shape
from nsa_cli.config import PRESETS, ModelConfig, NSAConfig, TrainConfig
from nsa_cli.errors import ExitCode, NsaError, tells_errors

if TYPE_CHECKING:
    from nsa_cli.cli.machine import Machine
    from nsa_cli.data import Tokenizer
    from nsa_cli.model import Transformer
    from nsa_cli.training import RunPaths, TrainResult
    from nsa_cli.training.distributed import Team
    from nsa_cli.training.loop import SamplerHook

SAMPLE_TOKENS = 128
"""Length of a sample of --sample-every."""


def train(
    ctx: typer.Context,
    data: options.Data,
    preset: options.PresetName = "tiny",
    sparse: options.Sparse = False,
    dim: options.Dim = None,
    depth: options.Depth = None,
    heads: options.Heads = None,
    kv_heads: options.KvHeads = None,
    dim_head: options.DimHead = None,
    context: options.Context = None,
    ff: options.Ff = None,
    ff_mult: options.FfMult = None,
    dropout: options.Dropout = None,
    tie_embeddings: options.TieEmbeddings = None,
    rope_theta: options.RopeTheta = None,
    compress_block: options.CompressBlock = None,
    compress_stride: options.CompressStride = None,
    select_block: options.SelectBlock = None,
    num_selected: options.NumSelected = None,
    num_init: options.NumInit = None,
    num_local: options.NumLocal = None,
    window: options.Window = None,
    compress: options.Compress = None,
    branch_kv: options.BranchKv = None,
    compress_rope: options.CompressRopeName = None,
    steps: options.Steps = None,
    batch_tokens: options.BatchTokens = None,
    micro_batch_tokens: options.MicroBatchTokens = None,
    lr: options.Lr = None,
    min_lr_ratio: options.MinLrRatio = None,
    schedule: options.ScheduleName = None,
    warmup: options.Warmup = None,
    decay_ratio: options.DecayRatio = None,
    weight_decay: options.WeightDecay = None,
    beta1: options.Beta1 = None,
    beta2: options.Beta2 = None,
    grad_clip: options.GradClip = None,
    max_skipped: options.MaxSkipped = None,
    tokenizer: options.TokenizerFile = None,
    text_key: options.TextKey = "text",
    val_fraction: options.ValFraction = None,
    pack: options.Pack = None,
    strict: options.Strict = False,
    shards: options.Shards = None,
    out: options.Out = Path("ckpt.safetensors"),
    resume: options.Resume = None,
    init_from: options.InitFrom = None,
    distill_from: options.DistillFrom = None,
    distill_weight: options.DistillWeight = None,
    overwrite: options.Overwrite = False,
    force_data: options.ForceData = False,
    dry_run: options.DryRun = False,
    save_every: options.SaveEvery = None,
    log_every: options.LogEvery = None,
    log: options.Log = None,
    eval_every: options.EvalEvery = None,
    eval_tokens: options.EvalTokens = None,
    patience: options.Patience = None,
    keep: options.Keep = None,
    sample_every: options.SampleEvery = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kernel: options.KernelName = "auto",
    compile: options.Compile = None,
    cuda_graph: options.CudaGraph = None,
    recompute: options.Recompute = None,
    parallel: options.ParallelName = "ddp",
    context_parallel: options.ContextProcesses = 1,
    seed: options.Seed = 1337,
    config: options.Config = None,
) -> int:
    """Train a model on DATA and print its checkpoint's path.

    Beside ckpt.safetensors stand ckpt.best.safetensors (best on the held-out tail), ckpt.state.safetensors (all that
    --resume needs) and ckpt.metrics.jsonl. Ctrl-C saves the state and ends with 130.
    """
    try:
        settings = load(ctx)
    except NsaError as error:
        if tells_errors():
            raise
        raise typer.Exit(error.exit_code) from error
    return run(data, settings)


def run(data: list[str], settings: Resolved) -> int:
    """Train as the settings say; 0, or 130 and 143 for a run that a signal ended with its state saved."""
    from nsa_cli.training.distributed import ToldElsewhere, open_team

    try:
        with open_team(settings["device"], settings["parallel"], settings["context_parallel"]) as team:
            return _run(data, settings, team)
    except ToldElsewhere as error:
        raise typer.Exit(error.exit_code) from error


def _run(data: list[str], settings: Resolved, team: Team) -> int:
    from nsa_cli.training.run import RunPaths

    if not team.alone:
        _fit_team(data, settings, team)
    resume: Path | None = settings["resume"]
    moves = settings.chosen("out")
    paths = RunPaths.beside(settings["out"]) if resume is None or moves else RunPaths.of_run(resume)
    if resume is None and settings.origins["force_data"].kind == "flag":
        raise NsaError("--force-data goes on with a run", "name the run with --resume", ExitCode.USAGE)
    if resume is not None:
        _refuse_preset(settings)
    elif not settings["overwrite"] and not settings["dry_run"]:
        paths.refuse_existing()
    result = _train(data, settings, paths, team)
    if result is None:
        return 0
    return 128 + result.signal if result.signal is not None else 0


def _reads_stdin(data: list[str]) -> bool:
    """Whether DATA names stdin, alone or with a weight."""
    return any(name == "-" or name.startswith("-@") for name in data)


def _fit_team(data: list[str], settings: Resolved, team: Team) -> None:
    """One of many processes: on its own device, and the first alone speaks."""
    if _reads_stdin(data):
        message = f"DATA - is stdin, and its text would be torn between {team.world} processes"
        raise NsaError(message, "write it to a file first", ExitCode.USAGE)
    settings.derive("device", str(team.device), "a process each")
    if not team.first:
        settings.derive("quiet", True, "the first process speaks")
        settings.derive("verbose", False, "the first process speaks")


def _refuse_preset(settings: Resolved) -> None:
    # Only on the command line: one config file or environment may serve new and resumed runs.
    if settings.origins["preset"].kind == "flag":
        message = f"--preset {settings['preset']} cannot change a run that --resume goes on with"
        raise NsaError(message, "leave --preset out, or start a new run without --resume", ExitCode.USAGE)


def _train(data: list[str], settings: Resolved, paths: RunPaths, team: Team) -> TrainResult | None:
    from nsa_cli.cli import output
    from nsa_cli.cli.machine import find_machine
    from nsa_cli.data import load_corpus
    from nsa_cli.training import dry_run
    from nsa_cli.training import train as train_model
    from nsa_cli.training.convert import refuse_other_tokenizer
    from nsa_cli.training.loggers import LoggedReporter, make_loggers
    from nsa_cli.training.resume import refuse_start

    messages = output.Messages(quiet=settings["quiet"])
    resume: Path | None = settings["resume"]
    init_from = begins_from(settings)
    refuse_start(init_from, resume)
    refuse_weight_alone(settings)
    told_too = settings["log"] or [] if team.first and not settings["dry_run"] else []
    loggers = make_loggers(told_too, paths, quiet=settings["quiet"])
    if resume is not None:
        _continue(settings, resume)
    tokenizer = _tokenizer(settings, data)
    if init_from is not None and resume is None:
        theirs = take_shape(settings, init_from)
        if settings["tokenizer"] is not None:
            refuse_other_tokenizer(init_from, theirs, tokenizer)
        tokenizer = theirs
    model_config, train_config = configurations(settings, tokenizer.vocab_size)
    if settings["verbose"]:
        messages.list_settings(settings.report())
    machine = find_machine(settings, allow_fallback=True)
    if team.alone and settings["parallel"] == "fsdp":
        messages.notice("--parallel fsdp has nothing to share out: this is one process, not several under torchrun")
    if machine.notice:
        messages.notice(machine.notice)
    if _reads_stdin(data) and sys.stdin.isatty():
        messages.notice("reading the training text from the terminal; Ctrl-D ends it")
    corpus = load_corpus(
        data,
        tokenizer,
        val_fraction=train_config.val_fraction,
        context=model_config.context,
        text_key=settings["text_key"],
        stdin=sys.stdin.buffer,
        pack=train_config.pack,
        strict=settings["strict"],
        shards=settings["shards"],
        notify=messages.notice,
    )
    # Of a run and of one that is only tried.
    options: dict[str, Any] = {
        "paths": paths,
        "device": machine.device,
        "kernel": machine.kernel,
        "dtype": machine.dtype,
        "resume": resume,
        "init_from": init_from,
        "distill_from": settings["distill_from"],
        "force_data": settings["force_data"],
        "team": team,
    }
    if settings["dry_run"]:
        if team.first:
            _show_trial(dry_run(model_config, train_config, corpus, **options), paths, machine, settings)
        return None
    with (
        output.TrainingReporter(messages, json_lines=settings["json"], verbose=settings["verbose"]) as told,
        LoggedReporter(told, loggers) as reporter,
    ):
        result = train_model(
            model_config,
            train_config,
            corpus,
            **options,
            overwrite=settings["overwrite"],
            reporter=reporter,
            notices=[*([machine.notice] if machine.notice else []), *corpus.notices],
            sampler_hook=_sampler(tokenizer, train_config.seed) if train_config.sample_every else None,
        )
    if not team.first:
        return result
    if settings["json"]:
        output.write_json({"checkpoint": str(paths.last)})
    else:
        output.write_line(str(paths.last))
    return result


def _sampler(tokenizer: Tokenizer, seed: int) -> SamplerHook:
    """What --sample-every calls: a continuation of a blank line, the same noise every time."""
    from nsa_cli.generation import SamplingConfig, TextOptions
    from nsa_cli.generation import run as generate_text

    text_options = TextOptions(sampling=SamplingConfig(max_tokens=SAMPLE_TOKENS, seed=seed), framing="whole")

    def sample(model: Transformer, step: int, should_stop: Callable[[], bool]) -> str:
        parts: list[bytes] = []
        generate_text(model, tokenizer, io.BytesIO(b"\n"), parts.append, text_options, should_stop=should_stop)
        return b"".join(parts).removesuffix(b"\n").decode("utf-8", "replace")

    return sample


def _show_trial(report: dict[str, Any], paths: RunPaths, machine: Machine, settings: Resolved) -> None:
    from nsa_cli.cli import output
    from nsa_cli.cli.dry_run import report_lines, settings_record

    messages = output.Messages(quiet=settings["quiet"])
    for notice in report["notices"]:
        messages.notice(notice)
    if settings["resume"] is None and not settings["overwrite"]:
        try:
            paths.refuse_existing()
        except NsaError as error:
            messages.notice(f"{error.message}: {error.hint}")
    report = {"settings": settings_record(settings), **report}
    report["notices"] = [*([machine.notice] if machine.notice else []), *report["notices"]]
    if settings["json"]:
        output.write_json(report)
    else:
        output.write_line("\n".join(report_lines(report)))


def _continue(settings: Resolved, resume: Path) -> None:
    """The resumed run's own configurations in place of preset and defaults: --resume needs no other flag repeated."""
    from nsa_cli.training import run_settings

    model, recipe = run_settings(resume)
    saved = {
        **vars(model),
        **(vars(model.nsa) if model.nsa is not None else {}),
        **vars(recipe),
        "sparse": model.nsa is not None,
    }
    for name, value in saved.items():
        if name in settings.flags and not settings.chosen(name):
            settings.derive(name, value, f"from {resume}")


def _tokenizer(settings: Resolved, data: list[str]) -> Tokenizer:
    """--tokenizer's, else the resumed run's, else that of the first token shard in DATA, else bytes."""
    from nsa_cli.data import load_tokenizer, shard_tokenizer
    from nsa_cli.training import run_tokenizer

    resume: Path | None = settings["resume"]
    if settings["tokenizer"] is None and resume is not None:
        return run_tokenizer(resume)
    if settings["tokenizer"] is None and (found := shard_tokenizer(data)) is not None:
        return found
    return load_tokenizer(None if settings["tokenizer"] is None else str(settings["tokenizer"]))


def configurations(settings: Resolved, vocab_size: int) -> tuple[ModelConfig, TrainConfig]:
    """The two configurations of a run. NsaError (exit 2, or 3 for the config file's) names a wrong value's flag."""
    _refuse_sparse_flags(settings)
    _fit_heads(settings)
    _fit_batch(settings)
    nsa = settings.make(NSAConfig) if settings["sparse"] else None
    return settings.make(ModelConfig, vocab_size=vocab_size, nsa=nsa), settings.make(TrainConfig)


def _refuse_sparse_flags(settings: Resolved) -> None:
    if settings["sparse"]:
        return
    for field in dataclasses.fields(NSAConfig):
        # Only on the command line: one config file or environment may serve dense and sparse runs.
        if settings.origins[field.name].kind == "flag":
            flag = settings.flags[field.name]
            message = f"{flag} {settings[field.name]} shapes sparse attention, and this run is dense"
            raise NsaError(message, f"add --sparse, or leave {flag} out", ExitCode.USAGE)


def _fit_heads(settings: Resolved) -> None:
    """--heads alone keeps the preset's group size where it divides, else gives every head its own keys and values."""
    if settings.chosen("heads") and settings.origins["kv_heads"].kind == "preset":
        preset = PRESETS[settings["preset"]]["model"]
        group = preset["heads"] // preset["kv_heads"]
        heads = settings["heads"]
        settings.derive("kv_heads", heads // group if heads % group == 0 else heads, "from --heads")


def _fit_batch(settings: Resolved) -> None:
    """The preset's tokens a step, rounded down to whole windows of a context that is not the preset's, at least one."""
    if settings.origins["context"].kind in ("preset", "default"):
        return
    context = settings["context"]
    for name in ("batch_tokens", "micro_batch_tokens"):
        tokens = settings[name]
        if context > 0 and tokens is not None and settings.origins[name].kind in ("preset", "default"):
            settings.derive(name, max(1, tokens // context) * context, "from --seq-len")
