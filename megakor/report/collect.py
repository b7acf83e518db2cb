"""What a report shows, gathered from files: a folder in, a `Report` of plain values out.

A folder is that of one training run, or a demo's with `corpus/ tokenizer/ shards/ pretrain/ instruct/` in it. Whatever
is not there is left out; only the records of training steps must be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megakor.checkpoint.format import PREFIX, committed
from megakor.data.manifest import MANIFEST_NAME
from megakor.tokenizer.tokenizer import META_FILE, Tokenizer
from megakor.train.metrics import METRICS, read_metrics

CONFIG = "config.yaml"
SUMMARY = "summary.json"
SAMPLES = "samples.json"
CORPUS = "corpus.json"
STAGES = ("pretrain", "instruct")  # training runs in a demo's folder, in the order of the arc
SENTENCE = (
    "세종대왕은 1443년에 훈민정음(訓民正音)을 만들었고, 오늘날 우리는 그것을 한글이라고 부른다. "
    "Learn Hangul in a day 😀"
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: from 1.
        first_step: optimizer steps that were done already.
        last_step: the last step that it logged; None if it logged none.
        world_size: ranks.
    """

    number: int
    first_step: int
    last_step: int | None
    world_size: int | None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that the run saved; `size` in bytes where it is still kept, `seconds` of saving where known."""

    step: int
    size: int | None
    seconds: float | None


@dataclass(frozen=True)
class TrainingRun:
    """One training run.

    Attributes:
        key: `pretrain` or `instruct`.
        name: of the run.
        config: the resolved configuration, and `config_yaml`, its text.
        steps: one record for each logged step, in their order.
        validation: records by held-out set, one a step.
        attempts: every start of the run.
        checkpoints: every one saved.
        start: the last start's record.
        tokens_per_byte: of the training shards, where their manifest is found.
    """

    key: str
    name: str
    config: Mapping[str, Any]
    config_yaml: str | None
    steps: Sequence[Record]
    validation: Mapping[str, Sequence[Record]]
    attempts: Sequence[Attempt]
    checkpoints: Sequence[Checkpoint]
    start: Record
    tokens_per_byte: float | None

    @property
    def title(self) -> str:
        return "Instruction tuning" if self.key == "instruct" else "Pretraining"

    @property
    def resumes(self) -> list[tuple[int, int]]:
        """(step gone on from, last step before the interruption) of every resume."""
        return [(now.first_step, max(now.first_step, before.last_step or 0)) for before, now in pairwise(self.attempts)]


@dataclass(frozen=True)
class Piece:
    """One token of the sample sentence, as SentencePiece spells it."""

    text: str
    is_byte: bool


@dataclass(frozen=True)
class Report:
    """Everything that a page shows; empty where a folder does not hold it."""

    name: str
    is_demo: bool
    runs: Sequence[TrainingRun]
    corpus: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    pieces: Sequence[Piece] = ()
    shards: Mapping[str, Record] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)


def collect(folder: Path) -> Report:
    """Gather what there is to tell about a run's or a demo's folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no training step has been logged in it, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run={folder} must be the folder of a run or of a demo")
    is_run = any((folder / name).is_file() for name in (METRICS, CONFIG))
    folders = [folder] if is_run else [folder / stage for stage in STAGES if (folder / stage / METRICS).is_file()]
    if not folders:
        raise ValueError(f"run={folder} must hold a {METRICS}, or a {STAGES[0]}/{METRICS}: nothing has been logged yet")
    configs = [_read_config(each) for each in folders]
    shard_folders = _shards_of_run(configs[0]) if is_run else _shards_of_demo(folder / "shards")
    shards = {name: read_json(path / MANIFEST_NAME) for name, path in shard_folders.items()}
    shards = {name: manifest for name, manifest in shards.items() if manifest}
    runs = [_training_run(each, config, shards.get("train")) for each, config in zip(folders, configs, strict=True)]
    tokenizer_folder = next(
        (place / "tokenizer" for place in (folder, *folders) if (place / "tokenizer" / META_FILE).is_file()), None
    )
    tokenizer = Tokenizer.load(tokenizer_folder) if tokenizer_folder else None
    meta = tokenizer.meta if tokenizer else {}
    return Report(
        name=runs[0].name if is_run else folder.resolve().name,
        is_demo=not is_run,
        runs=runs,
        corpus=read_json(folder / "corpus" / CORPUS) or _corpus_behind(meta),
        tokenizer=meta,
        pieces=cut_into_pieces(tokenizer, SENTENCE) if tokenizer else (),
        shards=shards,
        summary=read_json(folder / SUMMARY),
        samples=read_json(folder / SAMPLES),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. `ValueError` where it holds something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); it must be JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def last_of_each_step(records: Sequence[Record]) -> list[Record]:
    """One record a step, in the order of steps. A resumed run tells some steps again: the last telling counts."""
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def cut_into_pieces(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """The tokens of a text."""
    ids = tokenizer.encode(text)
    return [Piece(tokenizer.piece(index), tokenizer.is_byte(index)) for index in ids]


def _read_config(run: Path) -> tuple[str | None, dict[str, Any]]:
    path = run / CONFIG
    if not path.is_file():
        return None, {}
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())}); it must be YAML") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a run's configuration")
    return text, config


def _training_run(run: Path, config: tuple[str | None, dict[str, Any]], train_shards: Record | None) -> TrainingRun:
    text, resolved = config
    records = read_metrics(run)
    steps = last_of_each_step(_of_kind(records, "train"))
    if not steps:
        raise ValueError(f"run={run} must have logged at least one training step: {METRICS} holds none yet")
    validation = _of_kind(records, "validation")
    starts = _of_kind(records, "start")
    key = "instruct" if "pairs" in resolved or (not resolved and run.name == "instruct") else "pretrain"
    tokens, num_bytes = ((train_shards or {}).get(name) for name in ("num_tokens", "num_text_bytes"))
    return TrainingRun(
        key=key,
        name=str(resolved.get("name") or run.resolve().name),
        config=resolved,
        config_yaml=text,
        steps=steps,
        validation={
            name: last_of_each_step([record for record in validation if record.get("set") == name])
            for name in dict.fromkeys(str(record.get("set")) for record in validation)
        },
        attempts=[_attempt(start, records) for start in starts],
        checkpoints=_checkpoints(run, last_of_each_step(_of_kind(records, "save"))),
        start=starts[-1] if starts else {},
        tokens_per_byte=tokens / num_bytes if key == "pretrain" and tokens and num_bytes else None,
    )


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record.get("kind") == kind]


def _attempt(start: Record, records: Sequence[Record]) -> Attempt:
    number = start.get("attempt", 1)
    steps = [record["step"] for record in _of_kind(records, "train") if record.get("attempt", 1) == number]
    return Attempt(number, start["step"], max(steps, default=None), start.get("world_size"))


def _checkpoints(run: Path, saves: Sequence[Record]) -> list[Checkpoint]:
    sizes = {
        int(folder.name.removeprefix(PREFIX)): sum(file.stat().st_size for file in folder.iterdir())
        for folder in committed(run)
    }
    seconds = {save["step"]: save.get("seconds") for save in saves}
    return [Checkpoint(step, sizes.get(step), seconds.get(step)) for step in sorted(sizes.keys() | seconds.keys())]


def _shards_of_run(config: tuple[str | None, dict[str, Any]]) -> dict[str, Path]:
    data = config[1].get("data") or {}
    named = {"train": data.get("train"), **(data.get("sources") or {}), **(data.get("validation") or {})}
    return {name: Path(folder) for name, folder in named.items() if folder}


def _shards_of_demo(folder: Path) -> dict[str, Path]:
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
    return {path.name: path for path in sorted(found, key=lambda path: path.name != "train")}


def _corpus_behind(tokenizer_meta: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the corpus that a tokenizer was trained on, where they still lie beside it."""
    for source in tokenizer_meta.get("trained_on", {}).get("inputs", []):
        figures = read_json(Path(source).parent / CORPUS)
        if figures:
            return figures
    return {}
