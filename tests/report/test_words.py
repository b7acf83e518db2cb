"""Numbers as text."""

from __future__ import annotations

import pytest

from megakor.report.words import count, duration, number, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(2.22091), "2.221"),
        (number(0), "0"),
        (number(0.0), "0"),
        (number(12_345), "12,345"),
        (number(8123.4), "8,123"),
        (number(2.1e-6), "2.10e-6"),
        (number(float("nan")), "nan"),
        (number(True), "yes"),
        (number(None), "–"),
        (count(2_959_488), "2.96 M"),
        (count(999_600), "1.00 M"),
        (count(12), "12"),
        (size(410_636), "411 kB"),
        (size(12), "12 B"),
        (duration(0.25), "0.25 s"),
        (duration(43.31), "43.3 s"),
        (duration(119.7), "2 min 00 s"),
        (duration(3600 * 5 + 240), "5 h 04 min"),
        (duration(86400 * 3), "3.0 days"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert text == expected
