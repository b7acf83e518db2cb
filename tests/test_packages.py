"""What setup.cfg installs is what the package has: an editable install would not miss a part that is left out."""

from __future__ import annotations

import configparser
import itertools
from pathlib import Path

from tests.config.commands import ROOT


def options() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_is_installed() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "megakor").rglob("__init__.py")}
    configs = (ROOT / "configs").rglob("*.yaml")
    found |= {".".join(("megakor", *path.parent.relative_to(ROOT).parts)) for path in configs}
    found.add("megakor.launch.templates")  # the top-level launch/
    assert set(options()["options"]["packages"].split()) == found


def test_every_file_beside_the_code_is_installed() -> None:
    parser = options()
    data = {package: value.replace(",", " ").split() for package, value in parser["options.package_data"].items()}
    folders = dict(line.split(" = ") for line in parser["options"]["package_dir"].strip().splitlines())

    def folder_of(package: str) -> Path:
        for prefix, folder in folders.items():
            if package == prefix or package.startswith(f"{prefix}."):
                return ROOT / folder / Path(*package.removeprefix(prefix).strip(".").split("."))
        return ROOT / Path(*package.split("."))

    packages = parser["options"]["packages"].split()
    installed = set(
        itertools.chain.from_iterable(
            folder_of(package).glob(pattern) for package in packages for pattern in data.get(package, [])
        )
    )
    trees = [ROOT / "megakor", ROOT / "configs"]
    # launch/ has also what belongs to the checkout alone: the container's recipe, an example, a page
    assert set((ROOT / "launch").glob("*.jinja")) <= installed
    there = {path for tree in trees for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    missing = {str(path.relative_to(ROOT)) for path in there - installed if path.suffix not in (".py", ".pyc")}
    assert not missing
