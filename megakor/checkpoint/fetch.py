"""Back from object storage: a run's small files, and its newest checkpoint, as if they had never left the run folder.

look ─► bring back the run's small files ─► which checkpoints are there ─► fetch: ranks share out the files
─► step-….fetching, each file compared with its SHA-256 ─► rename
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megakor.checkpoint.format import FETCHING, MANIFEST, CheckpointManifest, committed, step_folder, step_of
from megakor.checkpoint.remote import GROWING, RemoteRun, folder_name, is_run_file, steps_of_this_run
from megakor.checkpoint.save import put_in_place
from megakor.data.indexed import FileRecord
from megakor.data.remote import Damaged
from megakor.data.skips import read_skips
from megakor.files import atomic_write
from megakor.logs import get_logger
from megakor.parallel.together import first_told, on_first_rank, raise_together

log = get_logger(__name__)


def look(remote: RemoteRun, run: Path) -> list[int]:
    """Bring back the run's small files that are missing here, or have grown since; rank 0 alone calls.

    Returns:
        Steps of the checkpoints there, oldest first.

    Raises:
        OSError, ValueError: the place cannot be read, and no checkpoint is here to go on from: it cannot be known
            whether there is one. With one here this is a warning.
    """
    try:
        listing = remote.listing()
        for name in sorted(filter(is_run_file, listing.sizes)):
            here = run / name
            size = here.stat().st_size if here.is_file() else -1
            if size < 0 or (name in GROWING and size < listing.sizes[name]):
                content = remote.read(name)
                with atomic_write(here) as file:
                    file.write(content)
        return steps_of_this_run(read_skips(run), remote.skips(listing), listing.whole)
    except (OSError, ValueError) as error:
        if not committed(run):
            raise
        log.warning("checkpoint.upload: %s; the run goes on from what is in its folder", error)
        return []


def fetch_checkpoint(remote: RemoteRun, run: Path, step: int) -> str | None:
    """Fetch a checkpoint into the run folder, where it replaces one of the same step; every rank calls.

    Returns:
        What is wrong with it there, in which case it is set aside there, and none any more; None when it is here.

    Raises:
        OSError, ValueError: on all ranks, when any could not read it there or write it here.
    """
    folder = step_folder(run, step)
    aside = folder.with_name(folder.name + FETCHING)
    content, damage = on_first_rank(lambda: begin(remote, aside, step))
    error = None
    if damage is None:
        log.info("fetching %s from %s", folder.name, remote)
        try:
            damage = fetch_share(remote, aside, step, content)
        except (OSError, ValueError) as caught:
            error = caught
        raise_together(error, f"fetching {folder.name} from {remote}", "it is as it was there")
        told = first_told(damage)
        damage = told[1] if told is not None else None
    return on_first_rank(lambda: end(remote, aside, folder, content, damage))


def begin(remote: RemoteRun, aside: Path, step: int) -> tuple[bytes, str | None]:
    """Rank 0: an empty folder to fetch into; the manifest's content, and what is wrong with the checkpoint so far."""
    for leftover in aside.parent.glob(f"*{FETCHING}"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    listing, name = remote.listing(), folder_name(step, MANIFEST)
    content = remote.read(name)
    try:
        manifest = CheckpointManifest.parse(content, f"{remote}/{name}")
        if manifest.step != step:
            raise ValueError(f"{remote}/{name}: step={manifest.step} must be that of its folder's name")
    except ValueError as error:
        return content, str(error)
    for file, entry in manifest.files.items():
        name = folder_name(step, file)
        if listing.sizes.get(name) != entry.size:
            found = f"{listing.sizes[name]} bytes" if name in listing.sizes else "missing"
            return content, f"{remote}/{name}: {found}; must be {entry.size} bytes"
    return content, None


def fetch_share(remote: RemoteRun, aside: Path, step: int, content: bytes) -> str | None:
    """Fetch this rank's share of the files; what is wrong with one of them there."""
    files = CheckpointManifest.parse(content, remote).files
    try:
        for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
            record = FileRecord(files[name].size, files[name].sha256)
            remote.fetch(folder_name(step, name), record, aside / name)
    except (Damaged, FileNotFoundError) as error:
        return str(error)
    return None


def end(remote: RemoteRun, aside: Path, folder: Path, content: bytes, damage: str | None) -> str | None:
    """Rank 0: commit what all have fetched, or set it aside there."""
    if damage is None:
        try:
            manifest = CheckpointManifest.parse(content, remote)
            manifest.check_sizes(aside)
        except ValueError as error:
            damage = str(error)
    if damage is not None:
        shutil.rmtree(aside)
        try:
            remote.set_aside(step_of(folder))
        except (OSError, ValueError) as error:
            log.warning("%s", error)
        return damage
    with atomic_write(aside / MANIFEST) as file:
        file.write(content)
    put_in_place(aside, folder)
    return None
