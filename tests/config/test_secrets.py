"""Secrets travel in a file that its owner alone reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from megakor.config.secrets import FILE, read_secrets, take_secrets, write_secrets


def test_from_one_environment_to_another(tmp_path: Path) -> None:
    here = {"API_KEY": "열려라=참깨 # $x 'y'", "OTHER": "o", "REST": "r"}
    write_secrets(tmp_path, ["API_KEY", "OTHER"], here)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    there = {"OTHER": "set there"}
    take_secrets(tmp_path, ["API_KEY", "OTHER"], there)
    assert there == {"API_KEY": here["API_KEY"], "OTHER": "set there"}


def test_a_file_that_others_could_read_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.parent.mkdir()
    path.write_text("OLD=1\n")
    path.chmod(0o644)
    umask = os.umask(0)
    try:
        write_secrets(tmp_path, ["API_KEY"], {"API_KEY": "k"})
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secrets(tmp_path) == {"API_KEY": "k"}
    write_secrets(tmp_path, [], {})
    assert not path.exists()


@pytest.mark.parametrize(("environment", "message"), [
    ({}, r"^cluster\.secrets=API_KEY must be a variable of the environment here$"),
    ({"API_KEY": "a\nb"}, r"^cluster\.secrets=API_KEY must have a value of one line$"),
])  # fmt: skip
def test_refused(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_secrets(tmp_path, ["API_KEY"], environment)
    assert read_secrets(tmp_path) == {}


def test_missing_on_a_rank(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^cluster\.secrets=API_KEY must be in .*launch/secrets or in the environment"
    ):
        take_secrets(tmp_path, ["API_KEY"], {})
