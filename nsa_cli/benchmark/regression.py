"""A report beside an earlier one: which rows became slower, and the gate that fails if any did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsa_cli.benchmark.report import BenchReport, Gate, Row
from nsa_cli.errors import ExitCode, NsaError

SHAPE_FIELDS = ("batch", "heads", "kv_heads", "dim_head", "model_dim", "model_depth", "dtype", "nsa")


def check_comparable(old: BenchReport, shape: dict[str, Any], path: str) -> None:
    """NsaError, exit code 3, if the earlier report measured other sizes. Its kernel may differ."""
    for name in SHAPE_FIELDS:
        before, now = old.config.get("shape", {}).get(name), shape[name]
        if before != now:
            message = f"{path}: measured with {name} = {before}, this one with {now}"
            raise NsaError(message, "compare reports of one shape", ExitCode.BAD_INPUT)


def compare_reports(
    old: BenchReport, rows: tuple[Row, ...], environment: Mapping[str, Any], tolerance: float
) -> tuple[tuple[dict[str, Any], ...], Gate]:
    """Same-named rows of two reports: one dict a row, and the regression gate.

    A row is a regression when its sparse median grew by more than the share `tolerance` and, where both reports have
    the dense median, its speed-up fell by more as well: a machine that has become slower at everything is no
    regression. On another device or number of threads only speed-ups are compared. A row that was timed then and is
    red now is one too. NsaError, exit code 3, when no row is in both.
    """
    earlier = {row.name: row for row in old.rows}
    same_device = all(old.environment.get(name) == environment[name] for name in ("device_name", "threads"))
    compared = [_compare_row(earlier[row.name], row, same_device, tolerance) for row in rows if row.name in earlier]
    found = tuple(item for item in compared if item is not None)
    if not found:
        message = "no row of this report can be compared with the earlier one"
        raise NsaError(message, "compare reports of the same lengths", ExitCode.BAD_INPUT)
    slower = [item for item in found if item["regression"]]
    detail = "; ".join(f"{item['name']}: {item['reason']}" for item in slower)
    summary = f"{len(found)} rows within {tolerance:.0%} of the earlier report"
    return found, Gate(name="regression", ok=not slower, detail=detail or summary)


def _compare_row(old: Row, new: Row, same_device: bool, tolerance: float) -> dict[str, Any] | None:
    before = old.sparse.timing if old.sparse is not None else None
    now = new.sparse.timing if new.sparse is not None else None
    if before is None:
        return None
    values: dict[str, Any] = {
        "name": new.name, "old_median_s": before.median_s, "new_median_s": None, "ratio": None,
        "old_speedup": old.speedup, "new_speedup": new.speedup, "regression": False, "reason": "",
    }  # fmt: skip
    if now is None:
        red = new.sparse is not None and new.sparse.parity is not None and not new.sparse.parity.ok
        return {**values, "regression": True, "reason": "its parity gate is red now"} if red else None
    ratio = now.median_s / before.median_s
    slower = ratio > 1 + tolerance
    reason = f"{ratio:.2f} times the earlier {before.median_s * 1e3:.3g} ms" if same_device else ""
    if old.speedup is not None and new.speedup is not None:
        fell = new.speedup < old.speedup / (1 + tolerance)
        slower = fell and (slower or not same_device)
        reason = f"{reason}{', ' if reason else ''}speed-up {new.speedup:.2f}x after {old.speedup:.2f}x"
    elif not same_device:
        return None
    return {**values, "new_median_s": now.median_s, "ratio": ratio, "regression": slower, "reason": reason}
