"""The Python part of the container's recipe, by the same step in a clean virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.config.commands import ROOT

COPIED = ("pyproject.toml", "setup.cfg", "constraints.txt", "README.md", "LICENSE", "configs", "launch", "megakor")
NAMESPACES = False


@pytest.mark.timeout(1800)
def test_what_the_recipe_installs_launches(tmp_path: Path) -> None:
    """Nothing of the checkout is left to lean on: templates, configurations and programs come with the package."""
    source = tmp_path / "source"
    source.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(tmp_path / "clean", with_pip=True)
    path = f"{tmp_path / 'clean' / 'bin'}:/usr/bin:/bin"
    environment = {**{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}, "PATH": path}
    subprocess.run([source / "launch" / "install.sh"], env=environment, check=True, stdout=sys.stderr)
    shutil.rmtree(source)
    work = tmp_path / "work"
    work.mkdir()

    def megakor(*words: str) -> str:
        done = subprocess.run(
            ["megakor", *words], env=environment, cwd=work, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "train.num_steps" in megakor("pretrain", "--help")
    for kind, beginning in {"local": str(tmp_path / "clean"), "slurm": "sbatch ", "kubernetes": "kubectl "}.items():
        assert megakor("launch", "experiment=demo", f"cluster={kind}", "--dry-run").startswith(beginning)
