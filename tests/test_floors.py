"""The house plan's floors: an import points down, or sideways on its own floor, and never up."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    0: {"config", "logs", "files"},
    1: {"model", "data", "tokenizer", "corpus"},
    2: {"parallel"},
    3: {"train", "checkpoint"},
    4: {
        "instruct",
        "evaluate",
        "generate",
        "interop",
        "plan",
        "launch",
        "preflight",
        "report",
        "simulate",
        "trace",
        "tune",
        "demo",
        "drill",
    },
    5: {"cli"},  # and every main, which `floor_of` tells by its name
}
STRANGERS = {("model", "data"), ("data", "model")}
"""Parts of one floor that must not know each other."""


@dataclass(frozen=True)
class Import:
    """One import statement: where it stands and what it names."""

    path: Path
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


MAINS = {"export", "import_config", "import_model", "pretrain", "shard", "train_tokenizer", "__main__"}


def sources() -> list[Path]:
    return sorted((ROOT / "megakor").rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the floor"
            assert node.module is not None
            for alias in node.names:
                yield Import(path, node.lineno, f"{node.module}.{alias.name}")


def part_of(dotted: str) -> str:
    """The package or module directly under megakor; empty for megakor itself."""
    words = dotted.split(".")
    name = words[1] if len(words) > 1 else ""
    return name if name in {path.stem for path in (ROOT / "megakor").iterdir()} else ""


def part(path: Path) -> str:
    inside = path.relative_to(ROOT / "megakor").parts
    return inside[0].removesuffix(".py")


def floor_of(name: str, main: bool = False) -> int:
    if main or name in MAINS:
        return 5
    found = [floor for floor, names in FLOORS.items() if name in names]
    assert len(found) == 1, f"megakor/{name} stands on no floor of the house plan"
    return found[0]


def all_imports() -> list[Import]:
    return [found for path in sources() for found in imports(path)]


def outside(found: Import) -> bool:
    return found.target.split(".")[0] != "megakor"


def test_there_is_something_to_check() -> None:
    assert len(sources()) > 50
    assert sum(not outside(found) for found in all_imports()) > 150
    assert {part(path) for path in sources()} >= set().union(*(FLOORS[floor] for floor in range(4)))


def test_every_part_stands_on_a_floor() -> None:
    for path in sources():
        if part(path) != "__init__":
            floor_of(part(path), main=path.name == "__main__.py")


def test_imports_point_down() -> None:
    upward = []
    for found in all_imports():
        target = part_of(found.target)
        if outside(found) or not target or part(found.path) == "__init__":
            continue
        here = floor_of(part(found.path), main=found.path.name == "__main__.py")
        if floor_of(target, main=".__main__" in found.target) > here:
            upward.append(str(found))
    assert upward == []


def test_model_and_data_never_import_each_other() -> None:
    assert [str(f) for f in all_imports() if not outside(f) and (part(f.path), part_of(f.target)) in STRANGERS] == []


def uses(floors: set[int], *modules: str) -> list[str]:
    """Imports of outside modules by the parts of some floors, mains left out."""
    bad = []
    for found in all_imports():
        if (
            part(found.path) == "__init__"
            or floor_of(part(found.path), main=found.path.name == "__main__.py") not in floors
        ):
            continue
        if any(found.target == name or found.target.startswith(name + ".") for name in modules):
            bad.append(str(found))
    return bad


def test_floor_0_has_no_torch() -> None:
    assert uses({0}, "torch", "deepspeed", "transformers") == []


def test_floor_1_has_no_engine_and_no_process_groups() -> None:
    assert uses({1}, "deepspeed", "torch.distributed") == []


def test_only_the_upper_floors_know_the_engine() -> None:
    """`parallel` builds DeepSpeed's pipeline modules, `train` and `checkpoint` drive its engines."""
    assert uses({4, 5}, "deepspeed") == []


def calls(path: Path, name: str) -> list[int]:
    """Lines that call `deepspeed.<name>`, under whatever name it was imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases = {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for a in n.names
        if a.name == "deepspeed"
    }
    direct = {
        a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "deepspeed"
        for a in n.names if a.name == name
    }  # fmt: skip
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == name:
            if isinstance(node.value, ast.Name) and node.value.id in aliases:
                lines.append(node.lineno)
        elif isinstance(node, ast.Name) and node.id in direct:
            lines.append(node.lineno)
    return lines


def test_only_train_and_checkpoint_start_the_engine() -> None:
    callers = {part(path) for path in sources() if calls(path, "initialize")}
    assert "train" in callers  # the search finds it
    assert callers <= {"train", "checkpoint"}


DEVICES = ("cuda", "cpu", "hpu", "xpu", "npu", "mps")


def device_strings(path: Path) -> list[str]:
    """String literals that name a device, `cuda:0` and the like among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} names {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in DEVICES
    ]


def test_only_one_file_names_devices() -> None:
    assert device_strings(ROOT / "megakor/train/device.py")  # the search finds them
    # The demo tells DeepSpeed by its environment variable to stay off GPUs, before any process has imported it.
    # GPT-NeoX's configuration says by DeepSpeed's word whether state is offloaded.
    names = ("train/device.py", "demo/commands.py", "interop/neox_values.py")
    places = {ROOT / "megakor" / name for name in names}
    found = [line for path in sources() if path not in places for line in device_strings(path)]
    assert len(device_strings(ROOT / "megakor/demo/commands.py")) == 1
    assert found == []


def test_no_device_is_asked_for_by_attribute() -> None:
    """`torch.cuda.…`, `.cuda()` and `.is_cuda` pass by the accelerator abstraction."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda")
    ]
    assert found == []


@pytest.mark.parametrize("name", ["config", "logs", "files"])
def test_floor_0_loads_no_torch(name: str) -> None:
    """Nor by way of another module: `megakor --help` answers at once."""
    import subprocess
    import sys

    modules = {
        "config": "megakor.config.compose, megakor.config.help",
        "logs": "megakor.logs",
        "files": "megakor.files",
    }
    code = f"import sys, {modules[name]}; print(sorted({{'torch', 'deepspeed', 'transformers'}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.strip() == "[]"


def test_files_can_be_read_in_a_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines for path in sources() if (lines := len(path.read_text().splitlines())) > 350
    }
    assert long == {}


@pytest.mark.parametrize(
    "module",
    [
        "checkpoint.__main__",
        "demo.__main__",
        "evaluate.__main__",
        "export",
        "generate.__main__",
        "import_config",
        "import_model",
        "preflight.__main__",
        "simulate.__main__",
        "tune.__main__",
    ],
)
def test_verbs_that_answer_on_standard_output_start_without_deepspeed(module: str) -> None:
    """DeepSpeed logs to standard output from its import on. Nor with torch's compiler, which takes a second."""
    code = f"import sys, megakor.{module}; print({{'deepspeed', 'torch._dynamo', 'pandas'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
