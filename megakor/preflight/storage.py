"""What a node reads and writes: shards, tokenizer, the base of a tuning, and the run folder that all nodes share.

The first rank of every node reads all inputs and tells their fingerprints; rank 0 writes a file into the run folder,
which the others must see, and each of them one, which rank 0 must see. Nothing of it stays.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megakor.checkpoint.format import MANIFEST, CheckpointManifest
from megakor.checkpoint.reader import model_config, resolve
from megakor.config.schema import EngineConfig, InstructConfig, ModelConfig, OptimizerName, PretrainConfig
from megakor.data.foreign import foreign_manifest, is_foreign
from megakor.data.manifest import check_files, load_manifest
from megakor.data.remote import RemoteFolder
from megakor.files import sha256_of
from megakor.instruct.pairs import pair_files
from megakor.model.specs import num_parameters, resolve_vocabulary
from megakor.preflight.meeting import POLL_SECONDS, Meeting
from megakor.tokenizer.tokenizer import Tokenizer

SEEN_SECONDS = 10.0
"""How long a shared file system may take to show a new file."""
ANSWERED_SECONDS = 40.0
"""How long a node may take to read manifests and list shards."""


def inputs(config: EngineConfig) -> dict[str, Callable[[], str]]:
    """What every node reads, by its key: a function that reads it and returns its fingerprint.

    The functions raise OSError or ValueError where something cannot be read or is damaged.
    """
    if isinstance(config, InstructConfig):
        return {
            "tokenizer": lambda: Tokenizer.load(config.tokenizer).fingerprint,
            "base": lambda: sha256_of(resolve(config.base) / MANIFEST),
            "pairs.files": lambda: digest_of_files(pair_files(config.pairs)),
        }
    assert isinstance(config, PretrainConfig)
    data = config.data
    folders = {f"data.validation.{name}": folder for name, folder in data.validation.items()}
    if not data.dataset:
        named = data.named_sources.items()
        folders |= {f"data.sources.{name}" if name else "data.train": folder for name, folder in named}
    found: dict[str, Callable[[], str]] = {key: partial(shards, folder) for key, folder in folders.items()}
    found["data.tokenizer"] = lambda: Tokenizer.load(data.tokenizer).fingerprint
    return found


def shards(folder: str) -> str:
    """The fingerprint of a folder's shards, whose files are all there in their sizes."""
    if is_foreign(folder):
        place, manifest = foreign_manifest(Path(folder))
    else:
        place = RemoteFolder(folder)
        manifest = load_manifest(place)
    check_files(place, manifest)
    if place.is_local and len(manifest.shards):
        with place.local_path(manifest.shards[0].file("bin")[0]).open("rb") as file:
            file.read(1)
    return manifest.fingerprint()


def digest_of_files(paths: Sequence[str]) -> str:
    """One SHA-256 of files, in their order."""
    return hashlib.sha256("".join(sha256_of(Path(path)) for path in paths).encode()).hexdigest()


def read_inputs(config: EngineConfig) -> dict[str, dict[str, str]]:
    """The fingerprint of every input that can be read here, and the error of every other."""
    fingerprints, errors = {}, {}
    for key, read in inputs(config).items():
        try:
            fingerprints[key] = read()[:12]
        except (OSError, ValueError) as error:
            errors[key] = str(error)
    return {"fingerprints": fingerprints, "errors": errors}


def checkpoint_bytes(config: EngineConfig) -> int:
    """Bytes of a checkpoint: weights in fp32, and with AdamW two moments; Adafactor's are far smaller than weights."""
    model: ModelConfig
    if isinstance(config, InstructConfig):
        model = model_config(CheckpointManifest.load(resolve(config.base)))
    else:
        assert isinstance(config, PretrainConfig)
        model = resolve_vocabulary(config.model, Tokenizer.load(config.data.tokenizer).vocab_size)
    return num_parameters(model) * (12 if config.optimizer.name is OptimizerName.adamw else 4)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder that is there inside, and gone afterwards if it was not there before and nothing is in it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def seen(path: Path, seconds: float = SEEN_SECONDS) -> bool:
    """Whether a file appears within so many seconds."""
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def check_shared(meeting: Meeting, run: Path, leaders: Sequence[int]) -> dict[int, str]:
    """What is wrong with the run folder by rank, on rank 0; elsewhere empty. Rank 0 and every leader call.

    Args:
        leaders: one rank of each node, rank 0 among them.
    """
    if meeting.rank:
        name = meeting.answer("folder made", seconds=ANSWERED_SECONDS + SEEN_SECONDS)
        if name is not None:
            mark = run / name
            own = own_mark(mark, meeting.rank)
            meeting.gather("folder", told_by(mark, own), ANSWERED_SECONDS)
            meeting.answer("folder seen")
            own.unlink(missing_ok=True)
        return {}
    mark = run / f".preflight-{secrets.token_hex(4)}"
    try:
        with made(run):
            mark.write_text("")
            try:
                meeting.answer("folder made", mark.name)
                return answers(meeting, mark, leaders)
            finally:
                mark.unlink()
    except OSError as error:
        meeting.answer("folder made")
        return {0: f"must be writable: {error}"}


def own_mark(mark: Path, rank: int) -> Path:
    """The file by which a rank shows rank 0 that it writes to the same folder."""
    return mark.with_name(f"{mark.name}-{rank}")


def told_by(mark: Path, own: Path) -> str:
    """What another node's rank finds wrong, having written its own file; empty: nothing."""
    if not seen(mark):
        return f"must be a folder that all nodes share: a file of rank 0's is not seen within {SEEN_SECONDS:.0f} s"
    try:
        own.write_text("")
    except OSError as error:
        return f"must be writable: {error}"
    return ""


def answers(meeting: Meeting, mark: Path, leaders: Sequence[int]) -> dict[int, str]:
    """Rank 0's part once its file is there: what the others say, and whether it sees their files."""
    wrong: dict[int, str] = {}
    try:
        said = meeting.gather("folder", "", ANSWERED_SECONDS, leaders)
        for rank in leaders[1:]:
            word = said.get(rank, f"must be looked into within {ANSWERED_SECONDS:.0f} s")
            if not word and not seen(own_mark(mark, rank)):
                word = f"must be a folder that all nodes share: its file is not seen on rank 0 in {SEEN_SECONDS:.0f} s"
            if word:
                wrong[rank] = word
    finally:
        meeting.answer("folder seen")
        for rank in leaders[1:]:
            own_mark(mark, rank).unlink(missing_ok=True)
    return wrong


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or is to be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free
