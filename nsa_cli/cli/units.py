"""Numbers as people read them."""

from __future__ import annotations

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def duration_text(seconds: float) -> str:
    """Three digits with a unit: 1.23 s, 45.6 ms, 789 us."""
    unit, scale = next((pair for pair in _UNITS if seconds >= pair[1]), _UNITS[-1])
    value = seconds / scale
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def span_text(low_s: float, high_s: float) -> str:
    """Two durations, the unit once where it is the same: 3.11 to 4.02 ms."""
    low, high = duration_text(low_s), duration_text(high_s)
    unit = f" {high.split()[1]}"
    return f"{low.removesuffix(unit)} to {high}" if low.endswith(unit) else f"{low} to {high}"


def seconds_text(seconds: float) -> str:
    """5 s, 2:05, 1:02:05."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}" if minutes else f"{whole} s"


def size(count: int) -> str:
    """Bytes for a reader: "1.5 MiB"."""
    power = min(max(count, 1).bit_length() - 1, 40) // 10
    return f"{count / 1024**power:,.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
