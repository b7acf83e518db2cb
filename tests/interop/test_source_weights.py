"""What is wrong with a folder's weights is told before anything is written, and pickles are never opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakor.config.schema import ModelConfig
from megakor.interop.source_weights import SourceWeights
from megakor.model.parameters import initial_value
from megakor.model.specs import parameter_specs

MODEL = ModelConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=24, rotary_pct=0.5
)
EMBED, HEAD, QKV = "gpt_neox.embed_in.weight", "embed_out.weight", "gpt_neox.layers.0.attention.query_key_value.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({spec.name: initial_value(spec, 1) for spec in parameter_specs(MODEL)}, tmp_path / "model.safetensors")
    return tmp_path


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path, model: ModelConfig = MODEL) -> str:
    with pytest.raises(ValueError, match=" must ") as raised:
        SourceWeights(folder, model)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    return str(raised.value)


BUFFERS = {
    "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2, dtype=torch.float16),
    "gpt_neox.rotary_emb.inv_freq": torch.ones(2),
}


def test_buffers_and_the_newer_name_of_the_head(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({**BUFFERS, "lm_head.weight": tensors.pop(HEAD)}))
    weights = SourceWeights(folder, MODEL)
    assert weights.stored.keys() == {spec.name for spec in parameter_specs(MODEL)}
    for spec in parameter_specs(MODEL):
        assert torch.equal(weights.read(spec.name), initial_value(spec, 1))


def test_a_tied_head_must_be_the_embedding(folder: Path) -> None:
    tied = ModelConfig(**{**vars(MODEL), "tie_word_embeddings": True})
    assert f"tensor {HEAD} must equal {EMBED}" in refused(folder, tied)
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert HEAD not in SourceWeights(folder, tied).stored
    edit(folder, lambda tensors: tensors.pop(HEAD))
    assert HEAD not in SourceWeights(folder, tied).stored
    assert f"tensor {HEAD} [24, 8] must be in one of its files" in refused(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(QKV), f"tensor {QKV} [24, 8] must be in one of its files"),
        (lambda t: t.update({QKV: t[QKV][:12].clone()}), f"tensor {QKV} of shape [12, 8] must be of [24, 8]"),
        (lambda t: t.update({QKV: t[QKV].double()}), f"tensor {QKV} of type F64 must be of F32, BF16, F16"),
        (lambda t: t.update({QKV: t[QKV].to(torch.int8)}), f"tensor {QKV} of type I8 must be"),
        (lambda t: t.update({"gpt_neox.extra": t[QKV].clone()}), "tensor gpt_neox.extra must be one of the arch"),
        (lambda t: t.update({"lm_head.weight": t[HEAD].clone()}), "tensor lm_head.weight must be there once"),
        (lambda t: t.update({QKV.replace(".0.", ".5."): t[QKV].clone()}), "num_hidden_layers=2 must be 3, the number"),
        (lambda t: t.update({"gpt_neox.layers.0.attention.bias.x": t[QKV].clone()}), "attention.bias.x must be one"),
    ],
)
def test_tensors_must_be_those_of_the_architecture(folder: Path, change: Callable[[Tensors], Any], told: str) -> None:
    edit(folder, change)
    assert told in refused(folder)


def test_a_wrong_number_of_blocks_is_told_at_once(folder: Path) -> None:
    assert "num_hidden_layers=1000000000 must be 2" in refused(
        folder, ModelConfig(**{**vars(MODEL), "num_hidden_layers": 10**9})
    )


def test_values_must_be_finite(folder: Path) -> None:
    edit(folder, lambda tensors: tensors[QKV][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {QKV} must hold finite numbers alone"):
        SourceWeights(folder, MODEL).read(QKV)


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


NAMES = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "mp_rank_00_model_states.pt", "모델.ckpt", "a.pth"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_is_named_and_not_opened(folder: Path, name: str) -> None:
    ran = folder / "ran"
    (folder / name).write_bytes(pickle.dumps(Runs(ran)))
    SourceWeights(folder, MODEL)  # beside safetensors it does no harm
    (folder / "model.safetensors").unlink()
    told = refused(folder)
    assert f"must hold model.safetensors or model.safetensors.index.json; {name} is not opened" in told
    assert "a pickle can run code" in told
    assert "save_pretrained(FOLDER, safe_serialization=True)" in told
    write_index(folder, {QKV: name})
    assert f"weight_map.{QKV}={name} must be a .safetensors file; {name} is not opened: it is a pickle" in refused(
        folder
    )
    assert not ran.exists()
    (folder / name).unlink()
    os.mkfifo(folder / name)  # who opened it would wait for ever
    assert f"{name} is not opened" in refused(folder)


def test_a_pickle_by_another_name_is_no_safetensors_file(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Runs(ran)) * 100)
    assert "model.safetensors: " in (told := refused(folder))
    assert "must be a whole safetensors file; files of other formats are not read" in told
    torch.save({"가": torch.zeros(2)}, folder / "model.safetensors")
    assert "must be a whole safetensors file" in refused(folder)
    assert not ran.exists()


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda head, _: head[QKV]["data_offsets"].__setitem__(0, head[QKV]["data_offsets"][0] - 4),  # overlap
        lambda head, data: head[QKV].update(data_offsets=[len(data), len(data) + 768]),
        lambda head, _: head[QKV].update(shape=[24, 9]),
        lambda head, _: head[QKV].update(shape=[-24, -8]),
        lambda head, _: head[QKV].update(dtype="Q4"),
        lambda head, _: head.pop(QKV),  # a hole
        lambda head, _: head.update(x={}),
    ],
)
def test_damaged_headers(folder: Path, change: Callable[[dict[str, Any], bytes], Any]) -> None:
    head, data = header(folder)
    change(head, data)
    text = json.dumps(head).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert "model.safetensors: Error" in (told := refused(folder))
    assert "must be a whole safetensors file" in told


@pytest.mark.parametrize("size", [0, 4, 100, -1, 10_000])
def test_cut_short_or_too_long(folder: Path, size: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size] if size < 10_000 else content + b"\0")
    assert "must be a whole safetensors file" in refused(folder)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(folder: Path) -> dict[str, str]:
    """Cut the file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        key: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, key in enumerate(sorted(tensors))
    }
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    write_index(folder, weight_map)
    return weight_map


def test_the_index_must_be_right(folder: Path) -> None:
    weight_map = shard(folder)
    assert len(SourceWeights(folder, MODEL).files) == 2
    mine, other = weight_map[QKV], next(name for name in weight_map.values() if name != weight_map[QKV])
    outside = folder.parent / "outside.safetensors"
    shutil.copyfile(folder / mine, outside)
    for name in ("../outside.safetensors", str(outside)):
        write_index(folder, {**weight_map, QKV: name})
        assert f"weight_map.{QKV}={name} must be a file of the folder itself" in refused(folder)
    (folder / mine).unlink()
    write_index(folder, weight_map)
    assert f"={mine} must be there" in refused(folder)
    (folder / mine).symlink_to(outside)  # as in the cache of Hugging Face's hub
    assert len(SourceWeights(folder, MODEL).files) == 2
    write_index(folder, {**weight_map, QKV: other})
    assert f"tensor {QKV} is" in (told := refused(folder))
    assert "model.safetensors.index.json must name a file's tensors" in told
    write_index(folder, {key: name for key, name in weight_map.items() if key != QKV})
    assert f"{mine}: tensor {QKV} is not in the index" in refused(folder)
    write_index(folder, {**weight_map, "gpt_neox.x": mine})
    assert f"{mine}: tensor gpt_neox.x is not there" in refused(folder)
    write_index(folder, {**weight_map, QKV: "model.txt"})
    assert refused(folder).endswith("model.txt must be a .safetensors file")
    write_index(folder, {})
    assert "weight_map must name at least one file" in refused(folder)
    for content in ([1], {QKV: 3}, {QKV: [mine]}):
        write_index(folder, content)
        assert "must map tensors to files under weight_map" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "must map tensors to files under weight_map" in refused(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    assert "must hold model.safetensors or model.safetensors.index.json, and has neither" in refused(tmp_path)
