"""Numbers as people read them: counts, bytes, durations, figures of a few digits."""

from __future__ import annotations

import math
from typing import Any

DASH = "–"


def number(value: Any, digits: int = 4) -> str:
    """A value as text: numbers with so many significant digits, truth values as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value == 0:
            return "0"
        if not 1e-3 <= abs(value) < 1e6:
            return f"{value:.{max(digits - 2, 0)}e}".replace("e-0", "e-").replace("e+0", "e+")
        value = float(f"{value:.{digits - 1}e}")
        decimals = digits - 1 - math.floor(math.log10(abs(value)))
        return f"{value:,.{max(decimals, 0)}f}"
    return DASH if value is None else str(value)


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    text = f"{value:,.0f}" if power == 0 else number(float(value), 3)
    return f"{text} {units[power]}".strip()


def count(value: float) -> str:
    """`2.96 M`."""
    return _scaled(value, 1000, ("", "k", "M", "B", "T"))


def size(value: float) -> str:
    """`411 kB`."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def duration(seconds: float) -> str:
    """`1 min 23 s`."""
    if seconds < 60:
        return f"{number(float(seconds), 2 if seconds < 10 else 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def percent(share: float) -> str:
    """`35.2 %`."""
    return f"{100 * share:.1f} %"
