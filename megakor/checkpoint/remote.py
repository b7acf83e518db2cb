"""A run's folder in object storage, or in any other folder: the run's own files there, by the same names.

    URL/config.yaml, tokenizer/, shards/, skips.json, …         small files of the run
    URL/checkpoints/step-00000100/rank-00000.safetensors, …     a checkpoint's files; manifest.json is written last,
                                                                and a folder without it is no checkpoint
    URL/checkpoints/latest                                      "step-00000100"

An object appears whole or not at all; a folder of objects does not, and has no rename. Hence the order.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenacity import Retrying
from tenacity.nap import sleep_using_event

from megakor.checkpoint.format import FOLDER, MANIFEST, PREFIX, CheckpointManifest
from megakor.data.remote import Damaged, RemoteFolder
from megakor.data.skips import FILE as SKIPS
from megakor.data.skips import Skip, parse_skips
from megakor.files import atomic_write

ATTEMPTS = 6
MAX_WAIT = 30.0  # seconds
BLOCK = 16 << 20
SET_ASIDE = f"{MANIFEST}.damaged"
"""What the manifest of a checkpoint that proved damaged is renamed to."""


RUN_FILES = ("config.yaml", "metrics.jsonl", SKIPS)
RUN_FOLDERS = ("tokenizer", "shards", "skipped")
"""What a run folder holds besides checkpoints that belongs to the run, and not to one start of it."""
GROWING = ("metrics.jsonl", SKIPS)
"""Those that only grow: the longer one is the later one."""


class Cancelled(Exception):
    """The upload is no longer wanted."""


def folder_name(step: int, file: str = "") -> str:
    """The name of a checkpoint's folder, or of a file of it, in the run's folder."""
    folder = f"{FOLDER}/{PREFIX}{step:08d}"
    return f"{folder}/{file}" if file else folder


@dataclass(frozen=True)
class Listing:
    """What is there.

    Attributes:
        sizes: in bytes, of every file by its name.
        steps: names of the files of each step's folder, whole or not.
    """

    sizes: dict[str, int]
    steps: dict[int, list[str]]

    @property
    def whole(self) -> list[int]:
        """Steps of the checkpoints, which have a manifest, oldest first."""
        return sorted(step for step in self.steps if folder_name(step, MANIFEST) in self.sizes)


@dataclass(frozen=True, repr=False)
class RemoteRun(RemoteFolder):
    """A run's folder that is written to as well.

    Attributes:
        cancelled: once set, nothing is tried again, and what is being sent ends with an error.
    """

    attempts: int = field(default_factory=lambda: ATTEMPTS)
    max_wait: float = field(default_factory=lambda: MAX_WAIT)
    cancelled: threading.Event = field(default_factory=threading.Event, compare=False)

    def listing(self) -> Listing:
        """What is there, in one listing; nothing, where there is no such folder yet."""
        try:
            sizes = self.sizes()
        except FileNotFoundError:
            sizes = {}
        steps: dict[int, list[str]] = defaultdict(list)
        for name in sizes:
            top, _, rest = name.partition("/")
            folder, _, file = rest.partition("/")
            number = folder.removeprefix(PREFIX)
            if top == FOLDER and file and folder == f"{PREFIX}{number}" and number.isdecimal():
                steps[int(number)].append(name)
        return Listing(sizes, dict(steps))

    def manifest(self, step: int) -> CheckpointManifest:
        """A checkpoint's manifest. ValueError when it is damaged, or of another step."""
        name = folder_name(step, MANIFEST)
        manifest = CheckpointManifest.parse(self.read(name), f"{self}/{name}")
        if manifest.step != step:
            raise ValueError(f"{self}/{name}: step={manifest.step} must be that of its folder's name")
        return manifest

    def skips(self, listing: Listing) -> list[Skip]:
        """What the run had left out of its stream when its newest checkpoint went there."""
        return parse_skips(self.read(SKIPS), f"{self}/{SKIPS}") if SKIPS in listing.sizes else []

    def put(self, name: str, path: Path) -> None:
        """Send a file, and compare its size there. OSError, ValueError or FileNotFoundError, as for what is read."""
        from fsspec.callbacks import Callback

        def send(filesystem: Any, target: str) -> None:
            size = path.stat().st_size
            filesystem.put_file(str(path), target, callback=Callback(hooks={"cancelled": self._check}))
            compare_size(filesystem, target, size)

        self._check()
        if self.is_local:
            self._copy(path, self.local_path(name))
        else:
            self._request(name, send, writes=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""

        def send(filesystem: Any, target: str) -> None:
            filesystem.pipe_file(target, content)
            compare_size(filesystem, target, len(content))

        self._check()
        if self.is_local:
            with atomic_write(self.local_path(name)) as file:
                file.write(content)
        else:
            self._request(name, send, writes=True)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files that are there, manifests first: what is left of a checkpoint is then none."""
        manifests = [name for name in names if name.endswith(f"/{MANIFEST}")]
        for name in manifests:
            self._request(name, lambda filesystem, path: filesystem.rm_file(path), writes=True)
        if others := [name for name in names if name not in manifests]:
            self._request("", lambda filesystem, root: remove_all(filesystem, root, others), writes=True)
        if self.is_local:
            for folder in {self.local_path(name).parent for name in names}:
                if folder.name.startswith(PREFIX) and not any(folder.iterdir()):
                    folder.rmdir()

    def set_aside(self, step: int) -> None:
        """Make no checkpoint of one that proved damaged: its manifest gets another name."""
        name = folder_name(step, MANIFEST)
        self.write(folder_name(step, SET_ASIDE), self.read(name))
        self.remove([name])

    def _copy(self, path: Path, target: Path) -> None:
        with path.open("rb") as source, atomic_write(target) as file:
            while block := source.read(BLOCK):
                self._check()
                file.write(block)

    def _check(self, *_: object, **__: object) -> None:
        if self.cancelled.is_set():
            raise Cancelled

    def _retrying(self, again: Callable[[BaseException], bool]) -> Retrying:
        retrying = super()._retrying(lambda error: not self.cancelled.is_set() and again(error))
        return retrying.copy(sleep=sleep_using_event(self.cancelled))


def compare_size(filesystem: Any, path: str, size: int) -> None:
    """Raise `Damaged`, after which a file is sent again, unless it is there with its size."""
    filesystem.invalidate_cache(path)
    found = filesystem.info(path)["size"]
    if found != size:
        raise Damaged(f"size={found} there must be {size}")


def remove_all(filesystem: Any, root: str, names: Iterable[str]) -> None:
    """Remove files, at once where the file system can."""
    filesystem.rm([f"{root.rstrip('/')}/{name}" for name in names])


def steps_of_this_run(here: Sequence[Skip], there: Sequence[Skip], steps: Iterable[int]) -> list[int]:
    """Of the checkpoints there, those of steps that this run has not gone back on since, oldest first.

    Args:
        here: what the run has left out of its stream by now.
        there: what it had left out when the newest of them went there.
    """
    later = here[len(there) :] if list(here[: len(there)]) == list(there) else []
    back_to = min((skip.rolled_back_to for skip in later), default=None)
    return sorted(step for step in steps if back_to is None or step <= back_to)


def is_run_file(name: str) -> bool:
    """Whether a name in a run folder is that of one of the run's small files."""
    return name in RUN_FILES or name.split("/", 1)[0] in RUN_FOLDERS


def local_run_files(run: Path) -> list[str]:
    """Names of the run's small files that are here."""
    folders = [path for folder in RUN_FOLDERS for path in (run / folder).rglob("*")]
    found = [path for path in (*(run / name for name in RUN_FILES), *folders) if path.is_file()]
    return sorted(str(path.relative_to(run)) for path in found if path.suffix != ".tmp")
