"""What `nsa train --dry-run` shows: the settings and where each came from, and what a run with them costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsa_cli.cli.resolve import Resolved

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def settings_record(settings: Resolved) -> dict[str, Any]:
    """Every setting by its flag: its value and where that came from, as JSON values."""
    return {
        settings.flags[name]: {"value": str(value) if isinstance(value, Path) else value, "from": str(settings.origins[name])}
        for name, value in sorted(settings.values.items(), key=lambda item: settings.flags[item[0]])
    }


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report of nsa_cli.training.dry_run, with `settings` as `settings_record` gives them, for a reader."""
    rows = [(flag, _shown(each["value"]), each["from"]) for flag, each in report["settings"].items() if each["value"] is not None]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    yield "settings"
    for flag, value, origin in rows:
        yield f"  {flag:<{widths[0]}}  {value:<{widths[1]}}  {origin}"
    parts = dict(report["parameters"])
    total = parts.pop("total")
    yield from _block("parameters", total, {name: number for name, number in parts.items() if number}, "{:,}".format)
    flops = report["flops"]
    forward, training, step = (_scaled(flops[key]) for key in ("forward", "training", "step"))
    yield f"FLOPs  {forward} a token forward, {training} in training, {step} a step"
    memory = dict(report["memory"])
    total, peak = memory.pop("total"), memory.pop("measured_peak")
    yield from _block("memory, estimated", total, memory, bytes_text)
    if peak is not None:
        yield f"  measured peak  {bytes_text(peak)}"
    yield from _data_lines(report)
    yield f"machine  {report['device']}, {report['dtype']}, kernel {report['kernel']}"
    yield _step_line(report["step"])


def _block(title: str, total: int, parts: Mapping[str, int], text: Any) -> Iterator[str]:
    yield f"{title}  {text(total)}"
    width = max(map(len, parts))
    digits = max(len(text(number)) for number in parts.values())
    for name, number in parts.items():
        yield f"  {name.replace('_', ' '):<{width}}  {text(number):>{digits}}"


def _data_lines(report: Mapping[str, Any]) -> Iterator[str]:
    data = report["data"]
    sources = data["sources"]
    named = ", ".join(sources[:3]) + (f" and {len(sources) - 3:,} more" if len(sources) > 3 else "")
    yield f"data  {named} ({report['tokenizer']}, fingerprint {data['fingerprint'][:12]})"
    if report["epochs"] is None:
        yield "  made as the run needs it, without end"
        return
    train = f"{data['train_tokens']:,} tokens, {data['train_bytes']:,} bytes"
    yield f"  to train on  {train}; the run reads them {report['epochs']:.2f} times"
    yield f"  held out     {data['val_tokens']:,} tokens, {data['val_bytes']:,} bytes"


def _step_line(step: Mapping[str, Any] | None) -> str:
    if step is None:
        return "step  none: the run is done"
    loss, norm = (_number(step[key], form) for key, form in (("loss", ".4f"), ("grad_norm", ".3f")))
    speed = f"{step['elapsed_s']:.3f} s, {step['tokens_per_s']:,.0f} tokens/s"
    return f"step {step['step']}  loss {loss}, gradient norm {norm}, learning rate {step['lr']:.3g}, {speed}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scaled(value: float) -> str:
    """Three digits and a unit: 6.59 MFLOP."""
    scale, unit = next((pair for pair in _UNITS if value >= pair[0]), (1.0, ""))
    return f"{value / scale:.3g} {unit}FLOP"


def bytes_text(count: int) -> str:
    """1.5 GiB, 3.7 MiB, 12 KiB."""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 2**10:,.0f} KiB"
