"""What a benchmark found: rows of dense beside sparse, from which length sparse wins, and the gates.

Plain data: a report becomes a JSON document and back without loss, and CSV. Who shows it, and how, is not known here.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_cli.benchmark.parity import Parity
from nsa_cli.benchmark.timing import Timing
from nsa_cli.errors import ExitCode, NsaError

FORMAT, FORMAT_VERSION = "nsa-bench", 1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One implementation in one row.

    kernel: what ran. timing: None when its parity is red, so that no speed is reported for a wrong result.
    peak_bytes: above the inputs. flops, moved_bytes: the least the work needs. roofline: share of the measured
    ceilings that was reached. parity: None where no reference is taken (a training step, whose attention has a row of
    its own).
    """

    kernel: str
    timing: Timing | None
    peak_bytes: int | None
    flops: int
    moved_bytes: int
    roofline: float | None
    parity: Parity | None
    cache_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case at one length; a branch of sparse attention has no dense side. note: why something is missing."""

    case: str
    seq_len: int
    dense: Figures | None
    sparse: Figures | None
    note: str = ""

    @property
    def name(self) -> str:
        """What the same row is called in another report."""
        return f"{self.case} @ {self.seq_len}"

    @property
    def is_branch(self) -> bool:
        """Whether this is a part of sparse attention, with nothing dense to stand beside."""
        return self.case.startswith("branch ")

    @property
    def speedup(self) -> float | None:
        """Dense median over sparse median; above 1 sparse is faster. None unless both were measured."""
        if self.dense is None or self.sparse is None or self.dense.timing is None or self.sparse.timing is None:
            return None
        return self.dense.timing.median_s / self.sparse.timing.median_s


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """From which measured length sparse wins a case, there and at every longer one; wins_from None if at none."""

    case: str
    wins_from: int | None
    measured: tuple[int, ...]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Something that must hold; a failed one ends `nsa bench` with exit code 6."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """A whole benchmark. config: what was asked for, and the shape; methods: how time and memory were taken."""

    environment: Mapping[str, Any]
    config: Mapping[str, Any]
    ceilings: Mapping[str, float]
    methods: Mapping[str, str]
    rows: tuple[Row, ...]
    crossovers: tuple[Crossover, ...]
    gates: tuple[Gate, ...]
    notices: tuple[str, ...] = ()
    comparison: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)
    elapsed_s: float = 0.0

    @property
    def crossover(self) -> list[str]:
        """A sentence a case: the length from which sparse wins, or that it wins at none that was measured."""
        return [crossover.sentence for crossover in self.crossovers]

    @property
    def ok(self) -> bool:
        """Whether every gate passed."""
        return all(gate.ok for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document; `report_from_dict` reads it back. Numbers that are not finite become null."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        rows = [{"name": row.name, **dataclasses.asdict(row), "speedup": row.speedup} for row in self.rows]
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, "ok": self.ok, **values, "rows": rows}
        return {key: _plain(value) for key, value in document.items()}

    def csv(self) -> str:
        """One line a row, seconds and bytes unrounded, after a header line; empty cells where there is nothing."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        columns = ["case", "seq_len", "speedup"]
        columns += [f"{side}_{name}" for side in ("dense", "sparse") for name in _SIDE_COLUMNS]
        writer.writerow([*columns, "note"])
        for row in self.rows:
            sides = [cell for side in (row.dense, row.sparse) for cell in _side_cells(side)]
            writer.writerow([row.case, row.seq_len, _cell(row.speedup), *sides, row.note])
        return out.getvalue()


_SIDE_COLUMNS = (
    "kernel", "median_s", "p10_s", "p90_s", "repeats", "peak_bytes", "flops", "moved_bytes", "roofline", "max_error",
    "ok", "cache_bytes",
)  # fmt: skip


def _side_cells(side: Figures | None) -> list[str]:
    if side is None:
        return [""] * len(_SIDE_COLUMNS)
    timing, parity = side.timing, side.parity
    times = [None] * 4 if timing is None else [timing.median_s, timing.p10_s, timing.p90_s, timing.repeats]
    checks = [None, None] if parity is None else [parity.max_error, parity.ok]
    values = [side.kernel, *times, side.peak_bytes, side.flops, side.moved_bytes, side.roofline, *checks, side.cache_bytes]
    return [_cell(value) for value in values]


def _cell(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """JSON values: dataclasses and tuples taken apart, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_crossovers(rows: Sequence[Row]) -> tuple[Crossover, ...]:
    """For every case measured dense and sparse: the smallest length from which sparse won, there and at all longer."""
    cases = dict.fromkeys(row.case for row in rows if row.speedup is not None)
    return tuple(_crossover(case, [row for row in rows if row.case == case]) for case in cases)


def _crossover(case: str, rows: Sequence[Row]) -> Crossover:
    pairs = sorted((row.seq_len, row.speedup) for row in rows if row.speedup is not None)
    wins_from: int | None = None
    for length, speedup in reversed(pairs):
        if speedup <= 1:
            break
        wins_from = length
    (longest, last), measured = pairs[-1], tuple(length for length, _ in pairs)
    if wins_from is None:
        lengths = ", ".join(f"{length:,}" for length in measured)
        best = max(pairs, key=lambda pair: pair[1])
        sentence = f"{case}: sparse wins at none of the lengths measured ({lengths}), {best[1]:.2f}x at {best[0]:,}"
        if last <= 1 < best[1]:
            sentence = f"{case}: sparse does not win at the longest length measured ({last:.2f}x at {longest:,})"
    else:
        below = [length for length in measured if length < wins_from]
        before = f", not at {below[-1]:,}" if below else ", the shortest length measured"
        sentence = f"{case}: sparse wins from {wins_from:,} tokens{before} ({last:.2f}x at {longest:,})"
    return Crossover(case=case, wins_from=wins_from, measured=measured, sentence=sentence)


def parity_gate(rows: Sequence[Row]) -> Gate:
    """Every compared result within its tolerance of the reference."""
    failures, checked = [], 0
    for row in rows:
        for side, figures in (("dense", row.dense), ("sparse", row.sparse)):
            if figures is None or figures.parity is None:
                continue
            checked += 1
            if not figures.parity.ok:
                failures.append(f"{row.name}, {side} ({figures.kernel}): {figures.parity.detail}")
    detail = "; ".join(failures) or f"{checked} results agree with the float32 reference"
    return Gate(name="parity", ok=not failures, detail=detail)


def load_report(path: Path) -> BenchReport:
    """Read an earlier report's JSON. Missing, unreadable or foreign: NsaError, exit code 3."""
    hint = "give a file that `nsa bench --json` wrote"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"not a JSON document ({error})"
        raise NsaError(f"{path}: {reason}", hint, ExitCode.BAD_INPUT) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise NsaError(f"{path}: not a benchmark report", hint, ExitCode.BAD_INPUT)
    if document.get("format_version") != FORMAT_VERSION:
        version = document.get("format_version")
        raise NsaError(f"{path}: report of format version {version}, not {FORMAT_VERSION}", hint, ExitCode.BAD_INPUT)
    try:
        return report_from_dict(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise NsaError(f"{path}: a damaged benchmark report ({error!r})", hint, ExitCode.BAD_INPUT) from error


def report_from_dict(document: Mapping[str, Any]) -> BenchReport:
    """Inverse of `BenchReport.to_dict` (null errors read back as NaN)."""
    return BenchReport(
        environment=document["environment"],
        config=document["config"],
        ceilings=document["ceilings"],
        methods=document["methods"],
        rows=tuple(_row(values) for values in document["rows"]),
        crossovers=tuple(Crossover(**{**item, "measured": tuple(item["measured"])}) for item in document["crossovers"]),
        gates=tuple(Gate(**item) for item in document["gates"]),
        notices=tuple(document["notices"]),
        comparison=tuple(document["comparison"]),
        elapsed_s=document["elapsed_s"],
    )


def _row(values: Mapping[str, Any]) -> Row:
    sides = {name: None if values[name] is None else _figures(values[name]) for name in ("dense", "sparse")}
    return Row(case=values["case"], seq_len=values["seq_len"], note=values["note"], **sides)


def _figures(values: Mapping[str, Any]) -> Figures:
    timing, parity = values["timing"], values["parity"]
    if parity is not None:
        errors = {name: math.nan if parity[name] is None else parity[name] for name in ("max_error", "relative_l2")}
        parity = Parity(**{**parity, **errors})
    return Figures(**{**values, "timing": None if timing is None else Timing(**timing), "parity": parity})
