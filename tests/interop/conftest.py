"""Tokenizers and a small run, made once for the tests of this folder."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megakor.checkpoint.format import WEIGHT, CheckpointManifest, step_folder
from megakor.checkpoint.save import commit, write_pieces
from megakor.config.schema import ModelConfig, TokenizerKind, TrainTokenizerConfig
from megakor.model.specs import WHOLE, parameter_specs
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.tokenizer.train import train_tokenizer
from megakor.train.optimizer import Piece

HANGUL = [chr(code) for code in range(0xAC00, 0xD7A4)]


def generated_lines(seed: int, count: int) -> list[str]:
    """Lines of words that repeat, as text's do, with the odd things that real text has between them."""
    rng = random.Random(seed)
    common = rng.sample(HANGUL, 300)
    words = ["".join(rng.choices(common, k=rng.randint(1, 5))) for _ in range(400)]
    endings = ["은", "는", "이", "가", "을", "를", "에서", "입니다", "했다", "하였다", "하고", ""]
    odd = [
        "  ", "   ", "\t", "\u3000", "ㅋㅋㅋ", "ㅠㅠ", "...", "2024년", "1,234", "㎡", "漢字", "English", "<|acc|>",
        "<|tel|>", "<|rrn|>", "<0x41>", "<unk>", "<|acc", "🙂", "👩‍👩‍👧", "한글", "é", "e\u0301", "▁", "_", "\x00",
        "\r", "''", "○○○",
    ]  # fmt: skip
    lines = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(0, 12)):
            kind = rng.random()
            if kind < 0.75:
                parts.append(rng.choice(words) + rng.choice(endings))
            elif kind < 0.95:
                parts.append(rng.choice(odd) * rng.randint(1, 3))
            else:
                parts.append(
                    chr(
                        rng.choice(
                            [rng.randint(0x20, 0x7E), rng.randint(0xA0, 0x17F), rng.choice(range(0xAC00, 0xD7A4))]
                        )
                    )
                )
            parts.append(rng.choice([" ", " ", " ", "", "  ", "\n"]))
        lines.append("".join(parts))
    return lines


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "generated.txt"
    path.write_text("\n".join(generated_lines(7, 3000)), encoding="utf-8")
    return path


def _train(kind: TokenizerKind, inputs: list[str], out: Path, vocab_size: int | None) -> Tokenizer:
    return train_tokenizer(
        TrainTokenizerConfig(inputs=inputs, out=str(out), kind=kind, vocab_size=vocab_size, num_threads=1)
    )


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Tokenizer:
    return _train(TokenizerKind.bpe, [str(corpus_file)], tmp_path_factory.mktemp("tokenizer") / "bpe", 1400)


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Tokenizer:
    return _train(TokenizerKind.unigram, [str(corpus_file)], tmp_path_factory.mktemp("tokenizer") / "unigram", 1400)


# A padded vocabulary (rows past the tokenizer's), biases, and a rotary share that is not the default of any library.
MODEL = ModelConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=1408,
    max_position_embeddings=96,
    rotary_pct=0.5,
    rotary_emb_base=5000.0,
    use_parallel_residual=True,
)


def write_run(run: Path, tokenizer: Tokenizer, model: ModelConfig, seed: int = 0) -> Path:
    """A run folder with one checkpoint of random weights, large enough for logits to differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for spec in parameter_specs(model):
        values = torch.randn(spec.shape, generator=generator).flatten() * 0.15
        pieces.append(Piece(WEIGHT, spec.name, spec.shape, WHOLE, 0, values, True))
    folder, aside = step_folder(run, 100), run / "aside"
    folder.parent.mkdir(parents=True)
    aside.mkdir()
    manifest = CheckpointManifest(
        step=100,
        num_tokens=tokenizer.vocab_size,
        model=asdict(model),
        tokenizer_fingerprint=tokenizer.fingerprint,
        optimizer={},
        data={},
        train={},
    )
    written = write_pieces(aside, 0, pieces)
    assert written is not None
    commit(aside, folder, manifest, [written])
    shutil.copytree(tokenizer.folder, run / "tokenizer")
    (run / "config.yaml").write_text("name: 말뭉치-시험\ntrain:\n  num_steps: 100\n", encoding="utf-8")
    records = [
        {"kind": "start", "attempt": 1, "step": 0, "world_size": 1},
        {"kind": "train", "attempt": 1, "step": 100, "loss": 3.25, "tokens": 409600},
        {"kind": "validation", "attempt": 1, "step": 100, "set": "heldout", "loss": 3.5, "bits_per_byte": 1.875},
        {"kind": "train", "attempt": 1, "step": 101, "loss": 9.75, "tokens": 413696},
    ]
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tra']), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path, bpe: Tokenizer) -> Path:
    write_run(tmp_path / "run", bpe, MODEL)
    return tmp_path / "run"
