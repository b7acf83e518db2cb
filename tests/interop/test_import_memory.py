"""An import never holds the model: a tensor is read, written and let go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from megakor.checkpoint.reader import resolve
from megakor.config.schema import ImportModelConfig, Precision
from megakor.interop.huggingface import model_json
from megakor.interop.import_model import import_model
from megakor.model.specs import parameter_specs
from megakor.tokenizer.tokenizer import Tokenizer
from tests.interop.conftest import MODEL
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size

BIG = replace(MODEL, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
"""157 MB in fp32, the largest tensor 4.2 MB."""


def peak_of_import(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Bytes of host memory that imports take: of a model of two small blocks, and of `BIG`."""
    give_back_freed_blocks()
    peaks = []
    for name in ("small", "big"):
        before = resident_size()
        import_model(ImportModelConfig(str(folder / name), str(folder / f"{name} run"), str(tokenizer.folder)))
        resolve(folder / f"{name} run")
        peaks.append(peak_resident_size() - before)
    return peaks


def test_one_tensor_at_a_time(tmp_path: Path, bpe: Tokenizer) -> None:
    for name, model in {"small": MODEL, "big": BIG}.items():
        (tmp_path / name).mkdir()
        content = model_json(model, MODEL.vocab_size or 0, 0, Precision.bf16)
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        tensors = {spec.name: torch.ones(spec.shape, dtype=torch.bfloat16) for spec in parameter_specs(model)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    ((_, peak),) = run_ranks(peak_of_import, 1, tmp_path, bpe)
    print(f"peak of the import: {peak / 1e6:.1f} MB")
    assert peak < 40e6
