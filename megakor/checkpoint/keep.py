"""Which checkpoints of a run stay: the newest, every k-th for good, the best of a held-out set."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megakor.checkpoint.format import REMOVED, CheckpointManifest, committed, step_of


@dataclass(frozen=True)
class Keep:
    """The rule.

    Attributes:
        last: newest ones that stay; 0: all. Those that are for restarts alone neither count nor outlive the next.
        every: multiples of so many steps stay for good; 0: none.
        best: held-out set, of whose lowest losses the checkpoint stays; None: none.
    """

    last: int = 0
    every: int = 0
    best: str | None = None

    def goes(self, manifests: Sequence[CheckpointManifest]) -> list[int]:
        """Steps of the checkpoints that go, of those given, oldest first, all whole, the last just saved."""
        steps = [manifest.step for manifest in manifests]
        regular = [manifest.step for manifest in manifests if manifest.kept]
        stay = {*regular[-self.last :], steps[-1]}  # with 0 all of them
        if self.every:
            stay |= {step for step in regular if step % self.every == 0}
        if self.best is not None:
            losses = [(m.validation[self.best], m.step) for m in manifests if self.best in m.validation]
            stay |= {min(losses)[1]} if losses else set()
        return [step for step in steps if step not in stay]


def prune(run: Path, step: int, keep: Keep, spared: Collection[int] = ()) -> list[Path]:
    """Remove the checkpoints that go when the one of `step` has been saved; returns their folders.

    Later ones, which a resume has passed over as damaged, neither count nor go; nor do damaged ones.

    Args:
        spared: steps of some that must be there a while longer, such as those on their way to object storage.
    """
    whole = {}
    for folder in committed(run):
        if step_of(folder) <= step:
            try:
                whole[folder] = CheckpointManifest.load(folder)
            except ValueError:
                continue  # a resume names it
    going = set(keep.goes(list(whole.values()))) if whole else set()
    gone = [folder for folder, manifest in whole.items() if manifest.step in going and manifest.step not in spared]
    for folder in gone:
        discard(folder)
    return gone


def discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that nothing half removed bears a checkpoint's name."""
    going = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(going, ignore_errors=True)  # of a removal that was cut off
    folder.rename(going)
    shutil.rmtree(going)
