"""The container's recipe: linted; what it installs is tried in tests/cluster, in a clean environment."""

from __future__ import annotations

import subprocess

from tests.config.commands import ROOT

RECIPE = ROOT / "launch" / "Dockerfile"


def test_the_recipe_is_sound() -> None:
    linted = subprocess.run(["hadolint", str(RECIPE)], capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout) == (0, "")
    checked = subprocess.run(["shellcheck", str(ROOT / "launch" / "install.sh")], capture_output=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, b"")


def test_it_copies_what_is_there_and_installs_it() -> None:
    lines = RECIPE.read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert {"constraints.txt", "setup.cfg", "pyproject.toml", "launch", "configs", "megakor"} <= set(copied)
    assert any(line.startswith("RUN launch/install.sh") for line in lines)
