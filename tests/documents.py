"""Reads the documentation: fenced blocks, the commands in them, links; and checks a command without running it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.launcher.runner import parse_args

from megakor.config.verbs import VERBS, find_verb
from tests.config.commands import ROOT, composed

FENCE = re.compile(r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PRINTING = ("--help", "-h")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what follows it on the fence, and its text."""

    language: str
    options: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The shell commands, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(path: Path) -> list[Block]:
    """Every fenced block of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{path.name}: a fence is left open"
    return [Block(found["language"], found["options"].strip(), found["text"]) for found in FENCE.finditer(text)]


def commands(path: Path, options: str = "") -> list[str]:
    """The commands of a file's bash blocks with these words on the fence."""
    found = [block for block in blocks(path) if block.language == "bash" and block.options == options]
    return [command for block in found for command in block.commands]


def prose(path: Path) -> str:
    """A Markdown file without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown file's headings have."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert found
    return set(found[1].split())


def checked(command: str) -> Any:
    """The configuration that a command leads to, every rule applied; None where it has none.

    AssertionError or SystemExit where the command could not start.
    """
    words = shlex.split(command)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= make_targets(), command
        return None
    if words[0] == "source":
        assert words[1:] == [".venv/bin/activate"], command
        return None
    if words[0] == "deepspeed":
        launcher = parse_args(words[1:])
        assert launcher.module, command
        assert launcher.no_local_rank, command
        verb, arguments = launcher.user_script.removeprefix("megakor.").replace("_", "-"), launcher.user_args
        assert verb in ("pretrain", "instruct", "preflight"), command
    else:
        assert words[0] == "megakor", f"{command}: an unknown command"
        found, arguments = find_verb(words[1:])
        verb = found.name
    assert verb in VERBS, command
    if set(PRINTING) & set(arguments):
        return None
    if "--cfg" in arguments:
        position = arguments.index("--cfg")
        arguments = arguments[:position] + arguments[position + 2 :]
    return composed(verb, *arguments)
