"""What a configuration's rules are made of: each raises `ValueError` that names key, value and rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def require(condition: bool, key: str, value: Any, rule: str) -> None:
    """Raise `ValueError` naming key, value and rule unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}={value} must {rule}")


def positive(key: str, value: float | None, allow_zero: bool = False) -> None:
    """Raise unless the value is positive, or null."""
    if value is not None:
        require(value >= 0 if allow_zero else value > 0, key, value, "be at least 0" if allow_zero else "be above 0")


def share(key: str, value: float, low_open: bool = False, high_open: bool = False) -> None:
    """Raise unless the value lies between 0 and 1."""
    inside = (value > 0 if low_open else value >= 0) and (value < 1 if high_open else value <= 1)
    require(inside, key, value, f"lie in {'(' if low_open else '['}0, 1{')' if high_open else ']'}")


def nearest(value: int, legal: Iterable[int]) -> str:
    """The legal values on both sides of an illegal one, in words."""
    options = sorted(legal)
    below, above = [n for n in options if n < value][-1:], [n for n in options if n > value][:1]
    return "nearest: " + " or ".join(str(n) for n in below + above)


def divides(key: str, value: int, what: str, total: int) -> None:
    """Raise unless the value divides the total; the error names the nearest values that do."""
    if total % value:
        options = [n for n in range(1, total + 1) if total % n == 0]
        require(False, key, value, f"divide {what}; {nearest(value, options)}")
