"""`nsa inspect`: what a sparse model looked at while it read a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nsa_cli.cli import options
from nsa_cli.cli.resolve import Resolved, load

if TYPE_CHECKING:
    from nsa_cli.cli.output import Messages
    from nsa_cli.data import Tokenizer
    from nsa_cli.inspection import Inspection


def inspect(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    layer: options.Layers = None,
    head: options.QueryHeads = None,
    query: options.Queries = [-1],  # noqa: B006
    npz: options.Npz = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kernel: options.KernelName = "auto",
    seed: options.Seed = 1337,
    config: options.Config = None,
) -> int:
    """Show where a sparse model's attention went for the prompt on stdin.

    All of stdin is one prompt, its final newline stripped; of a longer one the last context tokens. Per layer and
    query: compressed-block scores and gates of each head, selected blocks of each group with the reason (init, local,
    top).
    """
    return run(checkpoint, load(ctx))


def run(checkpoint: Path, settings: Resolved) -> int:
    """Inspect stdin's prompt with the model in `checkpoint` and show it; 0."""
    from nsa_cli.checkpoint import load_checkpoint
    from nsa_cli.cli import output
    from nsa_cli.cli.machine import find_machine
    from nsa_cli.inspection import inspect_prompt

    messages = output.Messages(quiet=settings["quiet"])
    if settings["verbose"]:
        messages.list_settings(settings.report())
    machine = find_machine(settings, allow_fallback=True)
    notices = []
    if machine.notice:
        messages.notice(machine.notice)
        notices.append(machine.notice)
    model, info = load_checkpoint(checkpoint, device=machine.device, dtype=machine.weights_dtype, kernel=machine.kernel)
    ids = _read_prompt(info.tokenizer, info.config.context, messages, notices)
    found = inspect_prompt(model, ids, layers=settings["layer"], heads=settings["head"], queries=settings["query"])
    if settings["npz"] is not None:
        _write_npz(settings["npz"], found)
    if settings["json"]:
        facts: dict[str, Any] = {"checkpoint": str(checkpoint), "step": info.step, "device": str(machine.device)}
        output.write_json(
            {**facts, "dtype": str(machine.weights_dtype).removeprefix("torch."), "notices": notices, **found.to_dict()}
        )
    else:
        output.show_inspection(found, info.tokenizer)
    return 0


def _read_prompt(tokenizer: Tokenizer, context: int, messages: Messages, notices: list[str]) -> list[int]:
    from nsa_cli.inspection import clip_prompt

    if sys.stdin.isatty():
        messages.notice("reading the prompt from the terminal; Ctrl-D ends it")
    data = sys.stdin.buffer.read().removesuffix(b"\n")
    ids, notice = clip_prompt(tokenizer.encode(data).tolist(), context)
    if notice:
        messages.notice(notice)
        notices.append(notice)
    return ids


def _write_npz(path: Path, found: Inspection) -> None:
    import numpy as np

    from nsa_cli.checkpoint import write_atomic

    def write(target: Path) -> None:
        # An open file: for a name, numpy would add .npz to it.
        with target.open("wb") as file:
            np.savez(file, allow_pickle=False, **found.arrays())

    write_atomic(path, write)
