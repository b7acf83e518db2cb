"""Checkpoints on their way to object storage, beside training.

    offer ─► clear: rank 0 makes room there ─► send: each rank its files ─► commit: rank 0 the run's small files, the
    manifest, `latest`; then it removes old ones

A thread of each rank does a stage at a time; the ranks tell each other at the step boundaries how far they are, and go
on to the next stage together. So one number from each rank at a boundary is all that training gives for it. Nothing
that goes wrong here ends a run before its end: the next checkpoint tries again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

import torch.distributed as dist

from megakor.checkpoint.format import FOLDER, LATEST, MANIFEST, PIECES, CheckpointManifest, step_of
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.remote import RemoteRun, folder_name, local_run_files, steps_of_this_run
from megakor.data.skips import FILE as SKIPS
from megakor.data.skips import parse_skips
from megakor.logs import get_logger
from megakor.parallel.together import first_told

log = get_logger(__name__)

POLL_SECONDS = 0.1  # at the end of a run


class Uploading(IntEnum):
    """How far a rank is with its stage of the upload."""

    idle = 0
    working = 1
    done = 2
    there = 3  # it is there already
    failed = 4


@dataclass
class Upload:
    """A checkpoint on its way.

    Attributes:
        folder: here.
        skips: content of the run's list of what it leaves out, as it was when the checkpoint was saved.
        began: when, in seconds of `time.perf_counter`.
        num_bytes: of the checkpoint's files of all ranks; known once they are being sent.
        stage: number of the stage that is being done.
        task: this rank's part of it, which returns whether the checkpoint is there already.
    """

    folder: Path
    skips: bytes | None
    began: float
    num_bytes: int = 0
    stage: int = 0
    task: Future[bool] = field(default_factory=Future)


class Uploader:
    """Sends a run's checkpoints to object storage; every rank has one, and calls its methods at the same steps.

    One is on its way and at most one waits, the newest: over a slow link those between are left out, with a warning,
    and training never waits. What is on its way or waits (`holds`) must stay in the run folder.

    Args:
        run: run folder, shared by all ranks.
        url: where to.
        keep: which checkpoints stay there.
        report: is told step, seconds and bytes of each that has arrived.
    """

    def __init__(
        self, run: Path, url: str, keep: Keep, report: Callable[[int, float, int], None] = lambda *_: None
    ) -> None:
        self.run, self.keep, self.report = run, keep, report
        self.remote = RemoteRun(url)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.error: str | None = None  # of the upload that ended last
        self._stages = (self._clear, self._send, self._commit)
        self._thread = ThreadPoolExecutor(1, "upload")
        self._current: Upload | None = None
        self._waiting: tuple[Path, bytes | None] | None = None
        self._sent: dict[str, tuple[int, int]] = {}  # small files, by size and time of change
        self._manifests: dict[int, CheckpointManifest] = {}  # of those there, without what the rule does not ask for

    @property
    def state(self) -> Uploading:
        """Of this rank. Ranks tell each other at every step boundary, and pass what they heard to `heard`."""
        if self._current is None:
            return Uploading.idle
        task = self._current.task
        if not task.done():
            return Uploading.working
        if task.exception() is not None:
            return Uploading.failed
        return Uploading.there if task.result() else Uploading.done

    @property
    def holds(self) -> set[int]:
        """Steps of the checkpoints that must stay in the run folder."""
        current = {step_of(self._current.folder)} if self._current else set()
        return current | ({step_of(self._waiting[0])} if self._waiting else set())

    def offer(self, folder: Path) -> None:
        """Upload a committed checkpoint, now or when the one before has arrived."""
        skips = self.run / SKIPS
        content = skips.read_bytes() if self.rank == 0 and skips.is_file() else None
        if self._current is None:
            self._begin(folder, content)
            return
        if self._waiting is not None and self.rank == 0:
            log.warning(
                "%s is not uploaded: %s is still on its way to %s, and %s is newer",
                self._waiting[0].name, self._current.folder.name, self.remote, folder.name,
            )  # fmt: skip
        self._waiting = folder, content

    def heard(self, states: Sequence[int]) -> None:
        """Go on together, when all ranks have done their stage; every rank calls with everyone's states, by rank."""
        upload = self._current
        if upload is None:
            return
        if Uploading.working in states:
            if Uploading.failed in states and states[self.rank] == Uploading.working:
                self.remote.cancelled.set()
            return
        if Uploading.failed in states:
            self._end(upload, self._what_failed(upload))
        elif Uploading.there in states or upload.stage + 1 == len(self._stages):
            self._end(upload, None, Uploading.there not in states)
        else:
            upload.stage += 1
            upload.task = self._thread.submit(self._stages[upload.stage], upload)

    def finish(self, meet: Callable[[Uploading], Sequence[int]]) -> None:
        """Wait for what is on its way, and for what waits; every rank calls, at the end of a run.

        Args:
            meet: everyone's states, by rank, to whom this rank's is told.

        Raises:
            OSError: on all ranks, when the last checkpoint has not arrived.
        """
        while self._current is not None:
            self.heard(meet(self.state))
            if self._current is not None and not self._current.task.done():
                wait([self._current.task], POLL_SECONDS)
        if self.error is not None:
            raise OSError(f"{self.error}; it is whole in run={self.run}, and the same command tries again")

    def abandon(self) -> None:
        """Forget what is on its way and what waits; every rank calls. Waits for the request that is being made."""
        upload, self._current, self._waiting = self._current, None, None
        if upload is not None:
            self.remote.cancelled.set()
            wait([upload.task])
            self.remote.cancelled.clear()

    def close(self) -> None:
        """End this rank's thread. What has not arrived is no checkpoint there."""
        self.remote.cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, folder: Path, skips: bytes | None) -> None:
        self.remote.cancelled.clear()
        self._current = upload = Upload(folder, skips, time.perf_counter())
        upload.task = self._thread.submit(self._clear, upload)

    def _end(self, upload: Upload, error: str | None, arrived: bool = False) -> None:
        self._current, self.error = None, error
        if error is not None and self.rank == 0:
            log.warning("%s; the next checkpoint tries again", error)
        if arrived and self.rank == 0:
            seconds = time.perf_counter() - upload.began
            log.info("%s has arrived at %s in %.1f s", upload.folder.name, self.remote, seconds)
            self.report(step_of(upload.folder), seconds, upload.num_bytes)
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._begin(*waiting)

    def _what_failed(self, upload: Upload) -> str:
        """The first error of a rank that did not end because of another's; every rank calls."""
        error = upload.task.exception()
        own = None if error is None or self.remote.cancelled.is_set() else str(error) or type(error).__name__
        rank, text = first_told(own) or (0, "cancelled")
        return f"uploading {upload.folder.name}: rank {rank}: {text}"

    def _clear(self, upload: Upload) -> bool:
        """Rank 0: no checkpoint may be there of steps that are taken anew; whether this one is there already."""
        if self.rank:
            return False
        step, remote = step_of(upload.folder), self.remote
        listing = remote.listing()
        here = parse_skips(upload.skips, self.run / SKIPS) if upload.skips else []
        taken = steps_of_this_run(here, remote.skips(listing), listing.whole)
        if strangers := [number for number in taken if number > step]:
            raise ValueError(
                f"{remote}: holds a checkpoint of step {strangers[-1]}, and must hold none after {step}: another start "
                f"has gone on from there; go on from it, or name another checkpoint.upload"
            )
        content = (upload.folder / MANIFEST).read_bytes()
        if step in taken and remote.read(folder_name(step, MANIFEST)) == content:
            return True
        old = [number for number in listing.whole if number not in taken]
        remote.remove([folder_name(number, MANIFEST) for number in sorted({*old, step} & set(listing.whole))])
        names = [name for number in {*old, step} for name in listing.steps.get(number, [])]
        remote.remove([name for name in names if not name.endswith(f"/{MANIFEST}")])
        for number in (*old, step):
            self._manifests.pop(number, None)
        return False

    def _send(self, upload: Upload) -> bool:
        """Every rank: the files that it wrote. Of a checkpoint that more ranks wrote, some of the others' too."""
        files = CheckpointManifest.load(upload.folder).files
        upload.num_bytes = sum(entry.size for entry in files.values())
        for name in files:
            if writer(name) % self.world_size == self.rank:
                self.remote.put(folder_name(step_of(upload.folder), name), upload.folder / name)
        return False

    def _commit(self, upload: Upload) -> bool:
        """Rank 0: what makes it a checkpoint. When this returns it is one; that old ones are gone is another matter."""
        if self.rank:
            return False
        step, remote = step_of(upload.folder), self.remote
        self._send_run_files(upload.skips)
        remote.put(folder_name(step, MANIFEST), upload.folder / MANIFEST)
        remote.write(f"{FOLDER}/{LATEST}", upload.folder.name.encode())
        try:
            self._prune(step)
        except (OSError, ValueError) as error:
            log.warning("removing old checkpoints: %s", error)
        return False

    def _send_run_files(self, skips: bytes | None) -> None:
        """The run's small files that have changed since they were sent."""
        if skips is not None:
            self.remote.write(SKIPS, skips)
        for name in local_run_files(self.run):
            state = (self.run / name).stat()
            version = state.st_size, state.st_mtime_ns
            if name != SKIPS and self._sent.get(name) != version:
                self.remote.write(name, (self.run / name).read_bytes())
                self._sent[name] = version

    def _prune(self, step: int) -> None:
        """Remove the checkpoints there that go when the one of `step` has arrived, and what never became one."""
        listing = self.remote.listing()
        known = self._manifests
        for number in listing.whole:
            if number not in known:
                try:
                    known[number] = replace(self.remote.manifest(number), files={}, tensors={}, train={}, data={})
                except ValueError as error:
                    log.warning("%s", error)
        whole = [number for number in listing.whole if number in known]
        going = set(self.keep.goes([known[number] for number in whole])) if whole else set()
        going |= listing.steps.keys() - set(listing.whole)
        for number in sorted(going - {step}):
            self.remote.remove(listing.steps[number])
            known.pop(number, None)


def writer(name: str) -> int:
    """The rank that wrote a file of a checkpoint."""
    return 0 if name == PIECES else int(Path(name).stem.rpartition("-")[2])
