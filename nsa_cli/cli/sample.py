"""`nsa sample`: prompts on stdin, continuations on stdout, as bytes."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import typer

from nsa_cli.cli import options
from nsa_cli.cli.resolve import Resolved, load
from nsa_cli.cli.units import size
from nsa_cli.errors import ExitCode, NsaError


def sample(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    filter_thres: options.FilterThres = None,
    max_tokens: options.MaxTokens = 256,
    stop: options.Stop = None,
    continuations: options.Continuations = 1,
    whole: options.Whole = False,
    null: options.Null = False,
    echo: options.Echo = False,
    jsonl: options.Jsonl = False,
    logprobs: options.Logprobs = False,
    timings: options.Timings = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kernel: options.KernelName = "auto",
    cache: options.Cache = True,
    seed: options.Seed = 1337,
    config: options.Config = None,
) -> int:
    """Continue the prompts on stdin with a trained model.

    One prompt a line: a single one is answered as it comes, newlines kept; of several, line i answers prompt i. What a
    prompt gets depends on --seed and its place, never on its neighbours. --json is --jsonl.
    """
    return run(checkpoint, load(ctx))


def run(checkpoint: Path, settings: Resolved) -> int:
    """Answer stdin's prompts with the model in `checkpoint`; 0, or 130 and 143 where a signal ended it early."""
    from nsa_cli.checkpoint import load_checkpoint
    from nsa_cli.cli import output
    from nsa_cli.cli.machine import find_machine
    from nsa_cli.generation import SamplingConfig, TextOptions
    from nsa_cli.generation import run as generate_text
    from nsa_cli.training.signals import catch_signals

    messages = output.Messages(quiet=settings["quiet"])
    if settings["verbose"]:
        messages.list_settings(settings.report())
    if settings["whole"] and settings["null"]:
        raise NsaError("--whole and --null exclude each other", "choose one way to frame prompts", ExitCode.USAGE)
    sampling = settings.make(SamplingConfig)
    text_options = settings.make(
        TextOptions,
        {"use_cache": "cache"},
        sampling=sampling,
        framing="whole" if settings["whole"] else "null" if settings["null"] else "lines",
        stops=tuple(text.encode("utf-8", "surrogateescape") for text in settings["stop"] or ()),
        jsonl=settings["jsonl"] or settings["json"],
    )
    machine = find_machine(settings, allow_fallback=True)
    if machine.notice:
        messages.notice(machine.notice)
    model, info = load_checkpoint(checkpoint, device=machine.device, dtype=machine.weights_dtype, kernel=machine.kernel)
    facts = {"kernel": model.kernel} | ({"notice": machine.notice} if machine.notice else {})
    text_options = dataclasses.replace(text_options, facts=facts)
    if sys.stdin.isatty():
        messages.notice("reading prompts from the terminal, one a line; Ctrl-D ends them")
    # Read here: a signal that comes while the terminal waits for prompts shall end the program at once.
    prompts = io.BytesIO(sys.stdin.buffer.read())
    with catch_signals() as interruption:
        result = generate_text(
            model, info.tokenizer, prompts, _write, text_options, should_stop=lambda: interruption.signum is not None
        )
    if settings["verbose"]:
        count, tokens, rate = result["prompts"], result["tokens"], result["tokens_per_s"]
        held, read = (size(result[name]) for name in ("cache_bytes", "read_bytes"))
        messages.notice(f"{count:,} prompts, {tokens:,} tokens, {rate:,.0f} tokens/s; cache: {held} held, {read} read by a step")
    return 128 + interruption.signum if result["interrupted"] and interruption.signum is not None else 0


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
