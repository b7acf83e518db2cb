"""Removing checkpoints of a run that is not going on: `megakor checkpoint prune`.

The rule is `Keep`, as in training. What goes is renamed first, so that nothing half removed bears a checkpoint's name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from megakor.checkpoint.format import ASIDE, FOLDER, LATEST, LOCK, REMOVED, CheckpointManifest, load_whole
from megakor.checkpoint.inventory import checkpoints_of, is_checkpoint, latest_of
from megakor.checkpoint.keep import Keep, discard
from megakor.config.schema import CheckpointPruneConfig
from megakor.files import atomic_write

LEFT = (ASIDE, REMOVED)
"""How folders end that a save or a removal left when it was cut off."""


def prune_run(config: CheckpointPruneConfig) -> None:
    """Remove a run's checkpoints by rule, and print what went. The newest whole one stays, whatever the rule.

    Before anything goes, every byte of the newest one is compared with its SHA-256; where it is damaged, the one
    before is the newest.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no checkpoint, none that is whole, or none with a loss on `keep_best`; or the run goes on.
    """
    run = Path(config.run)
    if run.is_dir() and is_checkpoint(run):
        raise ValueError(f"run={run} must be a run folder, and is one checkpoint")
    folders = checkpoints_of(run)
    with at_rest(run, config.dry_run):
        whole, damaged = sorted_out(folders)
        if not whole:
            raise ValueError(f"run={run} must hold a whole checkpoint: every one that is there is damaged")
        names = sorted({name for manifest in whole.values() for name in manifest.validation})
        if config.keep_best is not None and config.keep_best not in names:
            raise ValueError(f"keep_best={config.keep_best} must be one of the sets that have been evaluated: {names}")
        manifests = list(whole.values())
        going = set(Keep(config.keep_last, config.keep_every, config.keep_best).goes(manifests))
        gone = [folder for folder, manifest in whole.items() if manifest.step in going]
        stays = [folder for folder in whole if folder not in gone]
        if config.damaged:
            gone += damaged
            gone += sorted(path for path in (run / FOLDER).iterdir() if path.name.endswith(LEFT))
        total = sum(remove(folder, config.dry_run) for folder in gone)
        if not config.dry_run and not (run / FOLDER / str(latest_of(run / FOLDER))).is_dir():
            with atomic_write(run / FOLDER / LATEST) as stream:
                stream.write(stays[-1].name.encode())
    verb = "would remove" if config.dry_run else "removed"
    print(f"{verb} {len(gone)} folders, {total:,} bytes; {len(stays)} whole ones stay, the newest is {stays[-1].name}")
    if damaged and not config.damaged:
        print(f"{len(damaged)} damaged ones stay too: damaged=true removes them")


@contextmanager
def at_rest(run: Path, dry_run: bool) -> Iterator[None]:
    """Hold the run's lock, so that it cannot start meanwhile; a dry run changes nothing and needs none.

    Raises:
        ValueError: the run is going on.
    """
    if dry_run:
        yield
        return
    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"run={run} must not be going on: another process holds {run / LOCK}") from None
    try:
        yield
    finally:
        lock.release()


def sorted_out(folders: list[Path]) -> tuple[dict[Path, CheckpointManifest], list[Path]]:
    """The whole checkpoints with their manifests, oldest first, the last one checked to the byte; and the damaged."""
    whole, damaged = {}, []
    for folder in folders:
        try:
            whole[folder] = load_whole(folder)
        except ValueError as error:
            print(f"damaged: {error}")
            damaged.append(folder)
    for folder in reversed(list(whole)):
        try:
            load_whole(folder, contents=True)
            break
        except ValueError as error:
            print(f"damaged: {error}")
            damaged.append(folder)
            del whole[folder]
    return whole, damaged


def remove(folder: Path, dry_run: bool) -> int:
    """Remove a folder of checkpoints and say so; returns its bytes."""
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not dry_run:
        shutil.rmtree(folder) if folder.name.endswith(LEFT) else discard(folder)
    print(f"{'would remove' if dry_run else 'removed'} {folder} ({tqdm.format_sizeof(num_bytes, 'B')})", flush=True)
    return num_bytes
