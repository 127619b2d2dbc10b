"""Everything the commands say: the only place that knows rich.

The product goes to stdout and nothing else does; progress, notices and errors go to stderr. rich respects NO_COLOR.
What of rich is needed here and there only is imported there: `nsa --help` loads this file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nsa_cli.cli.units import duration_text, seconds_text, size, span_text

if TYPE_CHECKING:
    from rich.progress import Progress

    from nsa_cli.benchmark import BenchReport, Figures
    from nsa_cli.benchmark.tune import TuneReport
    from nsa_cli.data import Tokenizer
    from nsa_cli.inspection import Inspection, QueryView

PLAIN_INTERVAL_S = 5.0
_WIDEST = 100_000


class _Console(Console):
    @property
    def is_live(self) -> bool:
        """Whether a person watches: rich's is_terminal is also true for a pipe under FORCE_COLOR, which asks for
        colour and not for a terminal's width and moving parts."""
        return self.is_terminal and self.file.isatty()

    def on_broken_pipe(self) -> None:
        """rich would leave with exit code 1; the boundary in app.py knows better."""
        raise


def show_error(message: str, hint: str, error: BaseException | None) -> None:
    """`nsa: error: ...` and `hint: ...` on stderr, a line each, under the traceback of `error` if there is one."""
    console = _Console(stderr=True, highlight=False)
    if error is not None:
        from rich.traceback import Traceback

        console.print(Traceback.from_exception(type(error), error, error.__traceback__))
    console.print(Text.assemble(("nsa: error:", "bold red"), " ", one_line(message)), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint:", "bold"), " ", one_line(hint)), soft_wrap=True)


def show_front_page(usage: str, text: str, sections: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """The help of `nsa` itself: its usage, what it is, and a panel of (name, meaning) for each section."""
    console = _Console(highlight=False)
    console.print(Text(f"{usage}\n", style="bold"))
    console.print(Text(f"{text}\n"))
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for title, rows in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", width=width)
        for name, meaning in rows:
            table.add_row(Text(name), Text(meaning))
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def one_line(text: str) -> str:
    """The text with line breaks and runs of blanks made one blank, and control characters made visible."""
    joined = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in joined)


class Messages:
    """Lines for the user on stderr; with --quiet there are none."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.console = _Console(stderr=True, highlight=False)

    def notice(self, text: str) -> None:
        """`nsa: ...`, one line."""
        self.say(f"nsa: {one_line(text)}")

    def say(self, text: str) -> None:
        """One line as it is."""
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=True)

    def list_settings(self, lines: list[str]) -> None:
        """A setting a line."""
        for line in lines:
            self.notice(line)


class TrainingReporter:
    """What a training run says while it lasts: the Reporter of nsa_cli.training.

    On a terminal a bar with loss, tokens/s and time left, and a line for each validation above it; elsewhere a plain
    line every few seconds and for each validation. With json_lines the records go to stdout besides.
    """

    def __init__(self, messages: Messages, *, json_lines: bool, verbose: bool = False) -> None:
        self._messages, self._json, self._verbose = messages, json_lines, verbose
        self._live = messages.console.is_live and not messages.quiet
        self._steps = 0
        self._bar: Progress | None = None
        self._task: Any = None
        self._spoken_s = time.monotonic()
        self._begun: tuple[int, float] | None = None

    def __enter__(self) -> TrainingReporter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def start(self, info: dict[str, Any]) -> None:
        """Say what is trained, on what."""
        if self._json:
            write_json(info)
        parameters, data = info["parameters"], info["data"]
        kind = "dense" if info["model"]["nsa"] is None else "sparse"
        share = parameters.get("compression", 0) / max(parameters["total"], 1)
        compression = f" (compression networks {share:.1%})" if kind == "sparse" else ""
        kernel = f", kernel {info['kernel']}" if kind == "sparse" else ""
        processes = f"{info['world_size']} processes ({info['parallel']}), " if info["world_size"] > 1 else ""
        if info["context_parallel"] > 1:
            processes += f"{info['context_parallel']} of them a sequence, "
        where = f"{processes}{info['device']}, {info['dtype']}{kernel}"
        self._messages.notice(f"{kind} model of {parameters['total']:,} parameters{compression} on {where}")
        begun = info.get("init_from")
        if begun is not None and self._verbose and "from_step" not in info:
            self._messages.list_settings([f"{part}: {name}" for part in ("copied", "new", "unused") for name in begun[part]])
        tokens = "training data that is made as it is needed"
        if data["train_tokens"] is not None:
            tokens = f"{data['train_tokens']:,} tokens to train on, {data['val_tokens'] or 0:,} held out"
        resumed = f"; going on from step {info['from_step']}" if "from_step" in info else ""
        self._messages.notice(tokens + resumed)

    def metrics(self, line: dict[str, Any]) -> None:
        """A logged step."""
        if self._json:
            write_json(line)
        late = time.monotonic() - self._spoken_s >= PLAIN_INTERVAL_S
        if "val_loss" in line or (late and not self._live):
            self._messages.say(self._line(line))
            self._spoken_s = time.monotonic()
        if line.get("sample") is not None:
            self._messages.notice(f"sample at step {line['step']}")
            for row in line["sample"].splitlines():
                self._messages.say(f"  | {_shown(row.encode('utf-8', 'replace'))}")

    def progress(self, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """After every step."""
        self._steps = steps
        self._begun = self._begun or (step, time.monotonic())
        if not self._live:
            return
        if self._bar is None:
            self._bar = _training_bar(self._messages.console)
            self._task = self._bar.add_task("", total=steps, loss="", speed="", completed=step)
            self._bar.start()
        loss = line.get("loss")
        self._bar.update(
            self._task,
            completed=step,
            loss="" if loss is None else f"loss {loss:.4f}",
            speed=_speed(line),
        )

    def notice(self, text: str) -> None:
        """One line for the user."""
        self._messages.notice(text)

    def finish(self, summary: dict[str, Any]) -> None:
        """How the run ended."""
        self._stop()
        best = summary.get("best_val_loss")
        quality = "" if best is None else f"; best validation loss {best:.4f} at step {summary['best_step']}"
        status = {"patience": "no better validation for --patience: ended"}.get(summary["status"], summary["status"])
        self._messages.notice(
            f"{status} at step {summary['step']} after {seconds_text(summary['elapsed_s'])}{quality}"
        )

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, line: Mapping[str, Any]) -> str:
        step = line["step"]
        parts = [f"step {step}" + (f"/{self._steps}" if self._steps else "")]
        for name, key, form in _LINE_PARTS:
            if line.get(key) is not None:
                parts.append(f"{name} {line[key]:{form}}")
        if speed := _speed(line):
            parts.append(speed)
        if self._begun and self._steps and step > self._begun[0]:
            each_s = (time.monotonic() - self._begun[1]) / (step - self._begun[0])
            parts.append(f"ETA {seconds_text(each_s * (self._steps - step))}")
        return "  ".join(parts)


def _speed(line: Mapping[str, Any]) -> str:
    """12,345 tok/s, and the MFU where the device's peak is known; "" before the first logged step."""
    rate, mfu = line.get("tokens_per_s"), line.get("mfu")
    return "" if not rate else f"{rate:,.0f} tok/s" + ("" if mfu is None else f"  MFU {mfu:.1%}")


_LINE_PARTS = (
    ("loss", "loss", ".4f"),
    ("bits/byte", "bits_per_byte", ".3f"),
    ("distill", "distill_kl", ".4f"),
    ("val", "val_loss", ".4f"),
    ("val accuracy", "val_accuracy", ".1%"),
    ("val bits/byte", "val_bits_per_byte", ".3f"),
    ("lr", "lr", ".2e"),
    ("grad", "grad_norm", ".2f"),
)


def _training_bar(console: Console) -> Progress:
    from rich import progress

    # Without redirection: rich would send what is printed to stdout, the product, to this stderr console.
    return progress.Progress(
        progress.TextColumn("train"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )


class Status:
    """What a long measurement is at: a spinner on a terminal, elsewhere a line every few seconds."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        live = messages.console.is_live and not messages.quiet
        self._spinner = messages.console.status("starting") if live else None
        self._spoken_s = time.monotonic()

    def __enter__(self) -> Status:
        if self._spinner is not None:
            self._spinner.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._spinner is not None:
            self._spinner.stop()

    def __call__(self, text: str) -> None:
        """`text` is what runs now."""
        if self._spinner is not None:
            self._spinner.update(Text(text))
        elif time.monotonic() - self._spoken_s >= PLAIN_INTERVAL_S:
            self._messages.notice(text)
            self._spoken_s = time.monotonic()


def write_line(text: str) -> None:
    """One line of the product, on its way at once: what reads the pipe may be waiting for it.

    A path comes out as the bytes it is, UTF-8 or not, whatever stdout's own encoding would refuse.
    """
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")
    sys.stdout.flush()
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.buffer.flush()


def write_json(value: Any, *, indent: int | None = None) -> None:
    """One JSON document as a line (or indented) of the product. A path's bytes that are no UTF-8, which Python holds as
    lone surrogates, are escaped as JSON does."""
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    write_line(re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def write_tables(*parts: RenderableType) -> None:
    """Tables and text on stdout. On a terminal cells fold; in a pipe the width is what the widest table needs."""
    console = _Console(highlight=False)
    if not console.is_live:
        options = console.options.update(width=_WIDEST, max_width=_WIDEST)
        widest = max((Measurement.get(console, options, part).maximum for part in parts), default=1)
        console = _Console(highlight=False, width=max(widest, 1))
    with console.capture() as printed:
        for part in parts:
            console.print(part)
    # rich fills every line of a table with blanks to its end.
    write_line("\n".join(line.rstrip() for line in printed.get().splitlines()))


def show_bench(report: BenchReport) -> None:
    """A benchmark's report: the machine, two lines a row (dense over sparse), where sparse wins, the gates."""
    facts, shape = report.environment, report.config["shape"]
    threads = f", {facts['threads']} thread{'' if facts['threads'] == 1 else 's'}" if facts["device"] == "cpu" else ""
    head = Text(
        f"{facts['device_name']}, torch {facts['torch']}{threads}; "
        f"{shape['dtype']}, batch {shape['batch']}, {shape['heads']} query heads, "
        f"{shape['kv_heads']} key/value heads of {shape['dim_head']}"
    )
    table = _table(*_BENCH_COLUMNS, narrow=True)
    notes, left_out = [], dict[int, list[str]]()
    for row in report.rows:
        first = True
        sparse = "branch" if row.is_branch else "sparse"
        for side, figures in (("dense", row.dense), (sparse, row.sparse)):
            if figures is None:
                continue
            speedup = "" if row.speedup is None or side == "dense" else f"{row.speedup:.2f}x"
            case = row.case.removeprefix("branch ")
            table.add_row(*([case, f"{row.seq_len:,}"] if first else ["", ""]), side, *_figure_cells(figures, speedup))
            first = False
        if row.note and not (first and "time limit" in row.note):
            notes.append(Text(f"{row.name}: {row.note}"))
        elif row.note:
            left_out.setdefault(row.seq_len, []).append(row.case)
    decoding = _decode_table(report)
    gates = [
        Text.assemble(("ok  " if gate.ok else "FAILED", "green" if gate.ok else "bold red"), f"  {gate.name}: {gate.detail}")
        for gate in report.gates
    ]
    notes += [Text(f"not measured at {n:,}, for time: {', '.join(cases)}") for n, cases in left_out.items()]
    notices = [Text(notice) for notice in report.notices]
    tables = [each for each in (table, decoding) if each.rows]
    write_tables(head, *tables, *notes, *notices, *map(Text, report.crossover), *gates)


def _decode_table(report: BenchReport) -> Table:
    """What a decoding step costs: one layer's attention, and the whole model."""
    table = _table("decoding", ">tokens", "attention", ">step", ">tokens/s", ">speed-up", ">cache", ">read a step", narrow=True)
    for row in report.rows:
        sides = [(side, figures) for side, figures in (("dense", row.dense), ("sparse", row.sparse)) if figures is not None]
        for i, (side, figures) in enumerate(sides):
            if figures.cache_bytes is None:
                continue
            seconds = None if figures.timing is None else figures.timing.median_s
            step, rate = "not shown", ""
            if seconds is not None:
                step = duration_text(seconds)
                rate = "" if "attention" in row.case else f"{report.config['shape']['batch'] / seconds:,.0f}"
            speedup = "" if row.speedup is None or side == "dense" else f"{row.speedup:.2f}x"
            name = [row.case, f"{row.seq_len:,}"] if i == 0 else ["", ""]
            table.add_row(*name, side, step, rate, speedup, size(figures.cache_bytes), size(figures.moved_bytes))
    return table


def show_tuning(report: TuneReport) -> None:
    """A tuning's report: the machine and the shape, and a line a kernel."""
    sizes = report.sizes
    head = Text(
        f"{report.device}; {sizes['dtype']}, batch {sizes['batch']}, {sizes['seq_len']:,} tokens, {sizes['heads']} query heads, "
        f"{sizes['kv_heads']} key/value heads of {sizes['dim_head']}"
    )
    table = _table("kernel", "before", "after", ">attention before", ">after", ">tried", ">refused", narrow=True)
    for row in report.kernels:
        after = "the same" if row.after == row.before else str(row.after)
        times = (f"{row.way} {duration_text(row.before_s)}", duration_text(row.after_s))
        table.add_row(row.kernel, str(row.before), after, *times, str(row.tried), str(len(row.refused)))
    write_tables(head, table, Text(f"written to {_shown(os.fsencode(report.path))}"))


_BENCH_COLUMNS = (
    "case",
    ">tokens",
    "attention",
    "kernel",
    ">median",
    ">p10 to p90",
    ">speed-up",
    ">peak",
    ">roofline",
    ">max error",
)


def _figure_cells(figures: Figures, speedup: str) -> list[str]:
    timing, parity = figures.timing, figures.parity
    times = ["not shown", ""]
    if timing is not None:
        times = [duration_text(timing.median_s), span_text(timing.p10_s, timing.p90_s)]
    peak = "" if figures.peak_bytes is None else f"{figures.peak_bytes / 2**20:,.1f} MiB"
    roofline = "" if figures.roofline is None else f"{figures.roofline:.0%}"
    error = "" if parity is None else f"{parity.max_error:.1e}"
    return [
        figures.kernel,
        *times,
        speedup,
        peak,
        roofline,
        error if parity is None or parity.ok else f"{error} FAILED",
    ]


def _table(*columns: str, narrow: bool = False) -> Table:
    """A table whose cells fold and are never cut; a column's name begins with > when its cells stand on the right.
    narrow: two blanks between columns instead of three."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=narrow)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def show_inspection(found: Inspection, tokenizer: Tokenizer) -> None:
    """For each layer and query: scores of the compressed blocks and gates by head, selected blocks by group."""
    geometry = "  ".join(f"{name} {value}" for name, value in found.geometry.items())
    parts: list[RenderableType] = [Text(f"{len(found.ids)} tokens, kernel {found.kernel}"), Text(geometry)]
    for view in found.views:
        parts.append(Text(f"\nlayer {view.layer}, query {view.query}", style="bold"))
        parts += _score_tables(view, found, tokenizer)
        parts += [_selection_table(view), _gate_table(view)]
    write_tables(*parts)


def _score_tables(view: QueryView, found: Inspection, tokenizer: Tokenizer) -> list[RenderableType]:
    """One table, or several side by side heads where a terminal is too narrow for all."""
    if not view.blocks:
        return [Text("no compressed block ends at or before this query")]
    console = _Console()
    ranges = [f"{block.first} to {block.last}" for block in view.blocks]
    texts = [_shown(tokenizer.decode(found.ids[block.first : block.last + 1])) for block in view.blocks]
    width = len(view.heads)
    if console.is_live:
        # A column takes its widest cell and three more; a score's is as wide as its header.
        left = 5 + max(6, *map(len, ranges)) + max(4, *map(len, texts)) + 3 * 3 + 1
        width = max(1, (console.width - left) // (len("head ") + len(str(view.heads[-1].head)) + 3))
    tables: list[RenderableType] = []
    for first in range(0, len(view.heads), width):
        heads = view.heads[first : first + width]
        table = _table(">block", "tokens", "text", *(f">head {head.head}" for head in heads))
        for row, block in enumerate(view.blocks):
            table.add_row(str(block.block), ranges[row], Text(texts[row]), *(f"{head.scores[row]:.4f}" for head in heads))
        tables.append(table)
    return tables


def _selection_table(view: QueryView) -> Table:
    table = _table(">group", "selected blocks", "importance", ">share selected", ">entropy", ">changed", "tokens back to top")
    for group in view.groups:
        facts = group.statistics
        table.add_row(
            str(group.group),
            "  ".join(f"{block.block} {block.tag}" for block in group.selected),
            "  ".join(f"{block.importance:.3f}" for block in group.selected),
            _number(facts.selected_share, ".3f"),
            _number(facts.entropy_nats, ".3f"),
            _number(facts.changed, "d"),
            "  ".join(map(str, facts.top_distances)),
        )
    return table


def _gate_table(view: QueryView) -> Table:
    table = _table(">head", ">group", ">gate cmp", ">gate slc", ">gate win")
    for head in view.heads:
        gates = (f"{gate:.3f}" for gate in (head.gate_cmp, head.gate_slc, head.gate_win))
        table.add_row(str(head.head), str(head.group), *gates)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shown(data: bytes) -> str:
    """Text on one line: what cannot be printed is escaped."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
