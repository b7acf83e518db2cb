"""The start of a training run: process group, layout, run folder, and what a run may go on from.

Every rank calls what is here, in the same order.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from filelock import FileLock, Timeout

from megakor.checkpoint.fetch import fetch_checkpoint, look
from megakor.checkpoint.format import LOCK, CheckpointManifest, check_step, committed, step_folder, step_of
from megakor.checkpoint.remote import RemoteRun
from megakor.config.resolved import plain
from megakor.config.schema import EngineConfig, ModelConfig, OptimizerName
from megakor.config.secrets import take_secrets
from megakor.files import atomic_write
from megakor.logs import get_logger
from megakor.parallel.dims import ParallelDims
from megakor.parallel.roll_call import RollCall
from megakor.parallel.together import first_told, on_first_rank
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.device import check_precision, end_process_group, start_process_group

log = get_logger(__name__)

CONFIG = "config.yaml"
PADDING = ("model.vocab_size", "model.make_vocab_size_divisible_by")
"""Rows past the true vocabulary take no part in anything; but Adafactor's row and column means count them."""


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return result


def check_same_everywhere(resolved: dict[str, Any]) -> None:
    """Raise on every rank when any rank's configuration differs from rank 0's, naming the keys."""
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, flat(resolved))
    for rank, other in enumerate(everyone):
        for key in sorted(everyone[0].keys() | other.keys()):
            first, theirs = everyone[0].get(key), other.get(key)
            if first != theirs:
                raise ValueError(f"{key}={theirs} on rank {rank} must equal rank 0's, {first}")


@contextmanager
def process_group(config: EngineConfig) -> Iterator[ParallelDims]:
    """The run's process group and layout; a clean end on success, so that no rank aborts at exit.

    The first thing that a run does: its secrets are in the environment from here on.

    Raises:
        OSError: a rank died, which is named; the others raise as soon as they miss it.
    """
    take_secrets(Path(config.run), config.cluster.secrets)
    check_precision(config.train.precision)
    start_process_group()
    roll_call = RollCall() if dist.get_world_size() > 1 else None
    try:
        dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
        check_same_everywhere(plain(config))
        yield dims
        dist.barrier()
    except RuntimeError as error:  # what a failed collective raises
        gone = roll_call.missing() if roll_call is not None else []
        if not gone:
            raise
        ranks = ", ".join(str(rank) for rank in gone)
        raise OSError(
            f"run={config.run}: rank {ranks} died or lost its connection, and every rank must be there; the same "
            f"command goes on from the last checkpoint ({str(error).splitlines()[0]})"
        ) from error
    if roll_call is not None:
        roll_call.close()
    end_process_group()


def write_run(config: EngineConfig, tokenizer: Tokenizer) -> None:
    """Make the run folder and put the resolved configuration and the tokenizer into it.

    Called when everything about the run has been checked: a refused run leaves the folder as it was.
    """
    run = Path(config.run)

    def write() -> None:
        run.mkdir(parents=True, exist_ok=True)
        with atomic_write(run / CONFIG) as file:
            file.write(yaml.safe_dump(plain(config), allow_unicode=True, sort_keys=False).encode())
        if (run / "tokenizer").resolve() != tokenizer.folder.resolve():
            shutil.copytree(tokenizer.folder, run / "tokenizer", dirs_exist_ok=True)

    on_first_rank(write)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder, which takes one run at a time; the kernel frees it when rank 0's process ends.

    ValueError on every rank when another run holds it.
    """
    path = run / LOCK
    lock = FileLock(path, timeout=0)

    def take() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"run={run} must be a folder that no other run is using; one is: {path.read_text()}"
            ) from None
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    on_first_rank(take)
    try:
        yield
    finally:
        lock.release()


def bring_back(config: EngineConfig) -> list[int]:
    """Bring the run's small files back from `checkpoint.upload`, where they are missing here.

    Every rank calls, before anything is read from the run folder.

    Returns:
        Steps of the checkpoints that are there, oldest first.

    Raises:
        ValueError: `checkpoint.resume=never` with an address that a run has used.
        OSError, ValueError: it cannot be read, and the run folder holds nothing to go on from.
    """
    url, run = config.checkpoint.upload, Path(config.run)
    if url is None:
        return []
    remote = RemoteRun(url)

    def find() -> list[int]:
        if config.checkpoint.resume != "never":
            return look(remote, run)
        if remote.listing().whole:
            raise ValueError(f"checkpoint.upload={remote} must hold no checkpoints with checkpoint.resume=never")
        return []

    with locked(run):
        return on_first_rank(find)


def resume_point(config: EngineConfig, there: Sequence[int] = ()) -> Path | None:
    """The checkpoint to go on from, the newest whole one: ranks share the reading, and all get the same answer.

    Args:
        there: steps of the checkpoints in object storage, as `bring_back` found them. One that is newer than those
            here, or whole where the one here is not, is fetched into the run folder.

    Raises:
        ValueError: `checkpoint.resume=never` in a folder that a run has used, or every checkpoint is damaged.
        OSError: the one in object storage cannot be fetched.
    """
    run = Path(config.run)

    def look_here() -> list[Path]:
        if config.checkpoint.resume == "never" and (run / CONFIG).is_file():
            raise ValueError(f"run={run} must be a new folder with checkpoint.resume=never")
        return committed(run)

    found = {step_of(folder): folder for folder in on_first_rank(look_here)}
    for step in sorted({*found, *there}, reverse=True):
        if step in found:
            damage = shared_check(found[step])
            if damage is None:
                return found[step]
            log.warning("passing over a damaged checkpoint: %s", damage)
        if step in there:
            assert config.checkpoint.upload is not None
            damage = fetch_checkpoint(RemoteRun(config.checkpoint.upload), run, step)
            if damage is None:
                return step_folder(run, step)
            log.warning("passing over a damaged checkpoint: %s", damage)
    if found or there:
        raise ValueError(f"run={run} must hold a whole checkpoint: every one that is there is damaged")
    return None


def shared_check(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: each rank compares the SHA-256 of its part of the files."""
    error = None
    try:
        manifest = CheckpointManifest.load(folder)
        check_step(folder, manifest)
        manifest.check_contents(folder, dist.get_rank(), dist.get_world_size())
    except (ValueError, OSError) as caught:
        error = str(caught)
    told = first_told(error)
    return told[1] if told is not None else None


def check_continues(
    manifest: CheckpointManifest, config: EngineConfig, model: ModelConfig, fingerprint: str, data: dict[str, Any]
) -> None:
    """Raise unless a checkpoint is of this model, tokenizer, data and optimizer; every difference is named."""
    if manifest.weights_alone:
        raise ValueError(
            f"run={config.run} must be a folder of its own: its checkpoint of step {manifest.step} holds an imported "
            f"model's weights alone, which instruct takes as base={config.run}"
        )
    optimizer = config.optimizer.name.value
    ours = {**flat(plain(model), "model."), **data, "optimizer.name": optimizer, "tokenizer": fingerprint}
    theirs = {
        **flat(manifest.model, "model."),
        **manifest.data,
        "optimizer.name": manifest.optimizer["name"],
        "tokenizer": manifest.tokenizer_fingerprint,
    }
    if config.optimizer.name is not OptimizerName.adafactor:
        for key in PADDING:
            ours.pop(key), theirs.pop(key)
    if "data.train" in data:
        ours["data.tokenizer"], theirs["data.tokenizer"] = ours.pop("tokenizer"), theirs.pop("tokenizer")
    if ours.keys() != theirs.keys():
        others = ", ".join(sorted(ours.keys() ^ theirs.keys()))
        raise ValueError(
            f"run={config.run} must be a folder of its own: its checkpoints are of a run of another kind, which "
            f"differs in having {others}"
        )
    differences = [f"{key}={ours[key]} must be {theirs[key]}" for key in sorted(ours) if ours[key] != theirs[key]]
    if differences:
        raise ValueError("; ".join(differences) + f": the run goes on from its checkpoint of step {manifest.step}")


def check_tokenizer(manifest: CheckpointManifest, tokenizer: Tokenizer) -> None:
    """Raise unless a checkpoint's model was trained with this tokenizer."""
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer={tokenizer.folder} (fingerprint {tokenizer.fingerprint[:12]}…) must be the one that the base "
            f"was trained with ({manifest.tokenizer_fingerprint[:12]}…)"
        )
