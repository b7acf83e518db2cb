"""The format of a checkpoint folder.

    RUN/checkpoints/step-00000100/manifest.json           what there is, written last
                                  pieces.parquet          where every piece is
                                  rank-00000.safetensors  the pieces that rank 0 owned, 1-D fp32
    RUN/checkpoints/latest                                "step-00000100"

Each safetensors key is `state/name@offset`: a contiguous run of elements, from `offset` on, of a flattened state
tensor of the parameter `name`, or of a tensor rank's shard of it: `state/name#index@offset`. The manifest lists for
every (state, name) its whole shape and how it was cut into shards, the table where the pieces are, so that a reader in
any layout reads the bytes that it needs. A folder is written aside under another name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megakor.checkpoint.pieces import PieceIndex
from megakor.files import sha256_of
from megakor.model.specs import Shard

VERSION = 3  # 2: pieces of shards; 3: a table of pieces
WEIGHT = "weight"  # the state that every parameter has: its fp32 value
MANIFEST = "manifest.json"
PIECES = "pieces.parquet"
LATEST = "latest"
FOLDER = "checkpoints"
PREFIX = "step-"
ASIDE = ".writing"
REMOVED = ".removed"
LOCK = ".lock"  # in the run folder; a run that is going on holds it
FETCHING = ".fetching"  # aside, too, on the way from object storage


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """One state tensor.

    Attributes:
        shape: of the whole.
        shard_dim: the dimension that it was cut along.
        num_shards: how many equal shards.
    """

    shape: list[int]
    shard_dim: int
    num_shards: int

    def shard(self, index: int) -> Shard:
        """One of the shards."""
        return Shard(self.shard_dim, index, self.num_shards)


@dataclass(frozen=True)
class AdapterEntry:
    """Of which model a checkpoint's tensors are the adapters, and how they count.

    Attributes:
        rank, alpha, targets: of `LoraConfig`.
        base: the base's checkpoint folder, as the run was told.
        base_step: its step.
        base_sha256: of its manifest, which has the SHA-256 of all its files.
    """

    rank: int
    alpha: float
    targets: list[str]
    base: str
    base_step: int
    base_sha256: str


@dataclass
class CheckpointManifest:
    """What a checkpoint holds and what it belongs to.

    Attributes:
        step: optimizer steps done.
        num_tokens: the true vocabulary.
        model: fields of `ModelConfig`, `vocab_size` resolved.
        tokenizer_fingerprint: SHA-256 of the tokenizer's model.
        optimizer: its name, its number of updates, the settings of its parameter groups, the loss scale; empty, as
            `data`, where weights alone are there.
        data: the stream's identity; with `step` it fixes every batch to come.
        train: the resolved configuration of the run; of a model that was imported, under `imported`, from where.
        kept: whether it stays until `checkpoint.keep_last` newer ones are there; if not, until the next one is.
        validation: loss of each held-out set at this step, where it was evaluated.
        adapters: the tensors are adapters of another checkpoint's model; None: they are the whole model.
        files: by name.
        tensors: by `state/name`.
    """

    step: int
    num_tokens: int
    model: dict[str, Any]
    tokenizer_fingerprint: str
    optimizer: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    kept: bool = True
    validation: dict[str, float] = field(default_factory=dict)
    adapters: AdapterEntry | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    version: int = VERSION

    @property
    def weights_alone(self) -> bool:
        """Whether no run goes on from it: it has no optimizer state and no data state."""
        return not self.optimizer

    @property
    def source(self) -> str | None:
        """The folder that its model was imported from; None: a run has trained it."""
        return self.train["imported"]["path"] if "imported" in self.train else None

    def to_json(self) -> str:
        """The manifest's text, with a digest over everything else in it."""
        content = asdict(self)
        return json.dumps({**content, "digest": digest(content)}, ensure_ascii=False)

    @classmethod
    def load(cls, folder: Path) -> CheckpointManifest:
        """Read a checkpoint's manifest.

        Raises:
            ValueError: it is missing, not JSON, of another version, or names a file outside the folder.
        """
        path = folder / MANIFEST
        try:
            return cls.parse(path.read_bytes(), path)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; the folder must be a whole checkpoint") from None

    @classmethod
    def parse(cls, content: bytes, path: object) -> CheckpointManifest:
        """A manifest from its file's content; `path` is for errors. ValueError as `load`."""
        try:
            raw = json.loads(content.decode())
            if raw["version"] != VERSION:
                raise ValueError(f"{path}: version={raw['version']} must be {VERSION}")
            if raw.pop("digest") != digest(raw):
                raise ValueError(f"{path}: damaged; its digest must be that of its content")
            raw["files"] = {
                name: FileEntry(typed(e["size"], int), typed(e["sha256"], str)) for name, e in raw["files"].items()
            }
            raw["tensors"] = {name: tensor_entry(entry) for name, entry in raw["tensors"].items()}
            typed(raw["step"], int)
            if raw.get("adapters") is not None:
                raw["adapters"] = AdapterEntry(**raw["adapters"])
            manifest = cls(**raw)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, WrongShape) as error:
            raise ValueError(f"{path}: damaged ({error}); it must be a checkpoint's manifest") from None
        for name in manifest.files:
            if Path(name).name != name:
                raise ValueError(f"{path}: file name {name!r} must not leave the folder")
        return manifest

    def wrong_sizes(self, folder: Path) -> Iterator[str]:
        """What is wrong with the folder's files, a sentence each: missing, of another size, or foreign."""
        for name, entry in self.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry.size:
                found = "missing" if size is None else f"{size} bytes"
                yield f"{path}: {found}; must be {entry.size} bytes"
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # NFS keeps hidden ones
        for foreign in sorted(names - self.files.keys() - {MANIFEST}):
            yield f"{folder / foreign}: must not be there; the manifest does not name it"

    def pieces(self, folder: Path) -> PieceIndex:
        """Where the pieces are. ValueError when the table is missing, damaged, or does not cover every tensor once."""
        path = folder / PIECES
        if PIECES not in self.files:
            raise ValueError(f"{folder / MANIFEST}: damaged; {PIECES} must be one of its files")
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.files[PIECES].sha256:
                raise ValueError("SHA-256 differs from the manifest's; the file is damaged")
            index = PieceIndex.from_bytes(content)
            shapes = {name: (entry.shape, entry.num_shards) for name, entry in self.tensors.items()}
            index.check(shapes, {name: entry.size for name, entry in self.files.items() if name != PIECES})
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{path}: {error}") from None
        return index

    def check_sizes(self, folder: Path) -> PieceIndex:
        """Where the pieces are.

        ValueError on a missing, truncated or foreign file, or on a tensor whose pieces do not cover it.
        """
        for wrong in self.wrong_sizes(folder):
            raise ValueError(wrong)
        return self.pieces(folder)

    def check_contents(self, folder: Path, part: int = 0, num_parts: int = 1) -> None:
        """Raise `ValueError` on a file whose SHA-256 differs.

        Args:
            part: which part of the files to look at, of `num_parts`; ranks share them out.
        """
        self.check_sizes(folder)
        for name in sorted(self.files)[part::num_parts]:
            if sha256_of(folder / name) != self.files[name].sha256:
                raise ValueError(f"{folder / name}: SHA-256 differs from the manifest's; the file is damaged")


class WrongShape(Exception):
    """A manifest's entry is not made as it must be."""


def typed(value: Any, kind: type) -> Any:
    """The value, which must be of its type."""
    if type(value) is not kind:
        raise WrongShape(f"{value!r} must be of type {kind.__name__}")
    return value


def tensor_entry(entry: dict[str, Any]) -> TensorEntry:
    """A tensor's entry from its JSON."""
    shape = [typed(size, int) for size in typed(entry["shape"], list)]
    shard_dim, num_shards = typed(entry["shard_dim"], int), typed(entry["num_shards"], int)
    if any(size < 0 for size in shape):
        raise WrongShape("sizes must not be negative")
    if not 0 <= shard_dim < len(shape) or num_shards < 1 or shape[shard_dim] % num_shards:
        raise WrongShape(f"{shape} must be cut along one of its dimensions into equal shards")
    return TensorEntry(shape, shard_dim, num_shards)


def piece_key(key: str, num_shards: int, shard: int, offset: int) -> str:
    """A piece's key in its safetensors file."""
    return f"{key}@{offset}" if num_shards == 1 else f"{key}#{shard}@{offset}"


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return run / FOLDER / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix(PREFIX))


def committed(run: Path) -> list[Path]:
    """The run's checkpoint folders that were committed, oldest first."""
    folders = [path for path in (run / FOLDER).glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((path for path in folders if path.name.removeprefix(PREFIX).isdecimal()), key=step_of)


def check_step(folder: Path, manifest: CheckpointManifest) -> None:
    """ValueError when a folder's name tells another step than its manifest."""
    number = folder.name.removeprefix(PREFIX)
    if number != folder.name and number.isdecimal() and int(number) != manifest.step:
        raise ValueError(f"{folder}: step={manifest.step} in its manifest must be that of its name")


def load_whole(folder: Path, contents: bool = False) -> CheckpointManifest:
    """The manifest of a checkpoint folder that is whole.

    Args:
        contents: whether to compare the SHA-256 of every file too.

    Raises:
        ValueError: it is damaged.
    """
    manifest = CheckpointManifest.load(folder)
    check_step(folder, manifest)
    manifest.check_contents(folder) if contents else manifest.check_sizes(folder)
    return manifest
