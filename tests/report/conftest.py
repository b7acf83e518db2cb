"""Folders as the verbs write them: runs with metrics and checkpoints, and a demo with everything in it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megakor.config.schema import CorpusConfig, ShardConfig, TrainTokenizerConfig
from megakor.corpus.prepare import prepare
from megakor.data.build import build_shards
from megakor.tokenizer import Tokenizer
from megakor.tokenizer.train import train_tokenizer

SUMMARY = {
    "seconds": {"tokenizer": 2.5, "shards": 1.25, "pretrain": 190.0, "total": 193.75},
    "tokens_per_second": 8123.4,
    "bits_per_byte": 1.9,
    "order0_bits_per_byte": 4.4,
    "unigram_bits_per_byte": 2.2,
    "resume_bitwise_equal": True,
    "export_max_logit_difference": 2.1e-6,
}
SAMPLES = {
    "continuations": [{"prompt": "바다는", "text": " 넓고 깊다.\n그리고 푸르다."}],
    "answers": [{"question": "하늘은 왜 파란가요?", "context": "햇빛 이야기", "answer": "빛이 흩어지기 때문입니다."}],
}


def write_metrics(run: Path, attempts: list[tuple[int, int]], interval: int = 10) -> None:
    """Records of attempts that each went from one step to another; a later attempt's losses are told apart."""
    records: list[dict[str, Any]] = []
    for number, (first, last) in enumerate(attempts, start=1):
        common = {"attempt": number}
        start = {"step": first, "world_size": 2, "peak_tflops": 0.17, "num_parameters": 2_959_488}
        records.append({"kind": "start", **common, **start})
        for step in range(first + 1, last + 1):
            loss = 4 + 4 * math.exp(-step / 20) + number / 1000
            numbers = {"loss": loss, "lr": 1e-3 * step / last, "grad_norm": 1 + 1 / step, "tokens": 4096 * step}
            speed = {"seconds": 0.7, "tokens_per_second": 5800.0 + step, "tflops": 0.1, "mfu": 0.58}
            records.append({"kind": "train", **common, "step": step, **numbers, **speed})
            if step % interval == 0:
                heldout = {"set": "heldout", "loss": loss + 0.1, "bits_per_byte": (loss + 0.1) / 2.7}
                records.append({"kind": "validation", **common, "step": step, **heldout})
                records.append({"kind": "save", **common, "step": step, "seconds": 0.1})
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_config(run: Path, name: str, **sections: Any) -> None:
    run.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"name": name, "run": str(run), **sections}, allow_unicode=True, sort_keys=False)
    (run / "config.yaml").write_text(text)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False))


def write_checkpoint(run: Path, step: int, size: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"\0" * size)


@pytest.fixture(scope="session")
def demo_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo with real corpus, tokenizer and shards, and two training runs, the first of them resumed."""
    demo = tmp_path_factory.mktemp("runs") / "demo"
    prepare(CorpusConfig(inputs=[], out=str(demo / "corpus"), max_bytes=40_000))
    train = [str(demo / "corpus" / "train.jsonl")]
    train_tokenizer(TrainTokenizerConfig(inputs=train, out=str(demo / "tokenizer"), vocab_size=1200, num_threads=1))
    tokenizer = Tokenizer.load(demo / "tokenizer")
    for name in ("train", "heldout"):
        inputs, out = [str(demo / "corpus" / f"{name}.jsonl")], str(demo / "shards" / name)
        build_shards(ShardConfig(inputs=inputs, tokenizer=str(demo / "tokenizer"), out=out, num_workers=1), tokenizer)
    validation = {"heldout": str(demo / "shards" / "heldout")}
    data = {"train": str(demo / "shards" / "train"), "validation": validation, "tokenizer": str(demo / "tokenizer")}
    write_config(demo / "pretrain", "demo", model={"num_hidden_layers": 4, "hidden_size": 192}, data=data)
    write_metrics(demo / "pretrain", [(0, 45), (30, 60)])
    write_checkpoint(demo / "pretrain", 60, 1000)
    shutil.copytree(demo / "tokenizer", demo / "pretrain" / "tokenizer")
    write_config(demo / "instruct", "instruct_demo", base=str(demo / "pretrain"), pairs={"files": []})
    write_metrics(demo / "instruct", [(0, 20)])
    write_json(demo / "summary.json", SUMMARY)
    write_json(demo / "samples.json", SAMPLES)
    return demo


@pytest.fixture
def demo(demo_once: Path, tmp_path: Path) -> Path:
    """A copy of the demo that a test may change."""
    return shutil.copytree(demo_once, tmp_path / "demo")


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run folder with nothing but metrics."""
    write_metrics(tmp_path / "run", [(0, 12)])
    return tmp_path / "run"
