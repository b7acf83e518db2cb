"""`config.json` becomes our architecture: what changes the arithmetic is mapped or refused, key by key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig

from megakor.config.schema import ModelConfig, Precision
from megakor.interop.config_json import MAPPED, ROTARY, architecture, read_architecture
from megakor.interop.huggingface import model_json
from tests.interop.conftest import MODEL

BASE: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 1400, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 96,
}  # fmt: skip

POLYGLOT = {
    **BASE, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "initializer_range": 0.02,
    "layer_norm_eps": 1e-05, "num_steps": "global_step301000", "rotary_emb_base": 10000, "rotary_pct": 0.5,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.22.2", "use_cache": True,
    "use_parallel_residual": True,
}  # fmt: skip
"""The keys of Polyglot-Ko's own file, as transformers 4.22 wrote it."""


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def test_missing_keys_are_as_in_transformers() -> None:
    theirs = GPTNeoXConfig()
    assert {key: getattr(theirs, key) for key in MAPPED} == MAPPED
    assert theirs.rope_parameters["partial_rotary_factor"] == ROTARY["rotary_pct"][0]
    assert theirs.rope_parameters["rope_theta"] == ROTARY["rotary_emb_base"][0]
    assert architecture({key: BASE[key] for key in ("architectures", "model_type")}) == ModelConfig(**MAPPED)


def test_every_field_of_ours_is_read() -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"make_vocab_size_divisible_by"}
    assert fields == MAPPED.keys() | ROTARY.keys()


def test_what_export_writes() -> None:
    for changes in ({}, {"tie_word_embeddings": True, "use_parallel_residual": False, "attention_bias": False}):
        model = dataclasses.replace(MODEL, **changes)
        assert architecture(model_json(model, 1400, 0, Precision.fp32)) == dataclasses.replace(model, vocab_size=1400)


def test_polyglot_ko() -> None:
    model = architecture(POLYGLOT)
    assert (model.rotary_pct, model.rotary_emb_base, model.vocab_size) == (0.5, 10000.0, 1400)


ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "spelled",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rotary_pct": 0.5, "rotary_emb_base": 5000, "partial_rotary_factor": 0.5, "rope_theta": 5000.0},
        {"rope_parameters": ROPE},
        {"rope_parameters": ROPE, "rope_scaling": None, "rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rope_scaling": {**ROPE, "type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rotary_pct": 0.5, "rotary_emb_base": 5000},
    ],
)
def test_spellings_of_the_rotary_settings(spelled: dict[str, Any]) -> None:
    theirs = GPTNeoXConfig(**json.loads(json.dumps({**BASE, **spelled}))).rope_parameters
    model = architecture({**BASE, **spelled})
    assert (model.rotary_pct, model.rotary_emb_base) == (theirs["partial_rotary_factor"], theirs["rope_theta"])
    assert (model.rotary_pct, model.rotary_emb_base) == (0.5, 5000.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["GPTNeoXJapaneseForCausalLM"]}, "architectures=['GPTNeoXJapaneseForCausalLM'] must be"),
        ({"architectures": None}, "architectures=None must be [GPTNeoXForCausalLM]"),
        ({"model_type": "llama"}, "model_type=llama must be gpt_neox"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map=AutoModelForCausalLM must be left out: code"),
        ({"auto_map": ["mine.Model"]}, "auto_map=['mine.Model'] must be an object"),
        ({"hidden_act": "gelu_new"}, "hidden_act=gelu_new must be gelu"),
        ({"hidden_act": None}, "hidden_act=None must be gelu"),
        ({"head_dim": 8}, "head_dim=8 must be hidden_size / num_attention_heads = 16"),
        ({"is_causal": False}, "is_causal=False must be true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} must be left out"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]} must be left out"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type=linear must be default"),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "rope_parameters.rope_type=yarn must be default"),
        ({"rope_parameters": {**ROPE, "factor": 2}}, "rope_parameters.factor=2 must be left out"),
        ({"rope_parameters": ROPE, "rotary_pct": 1.0}, "rotary_pct=1.0 must be rope_parameters.partial"),
        ({"rope_theta": 5000}, "rope_theta=5000.0 must be rotary_emb_base=10000.0"),
        ({"rope_scaling": 2}, "rope_scaling=2 must be an object"),
        ({"rotary_pct": "0.5"}, "rotary_pct=0.5 must be a number"),
        ({"rotary_pct": 1.5}, "rotary_pct=1.5 must lie in (0, 1]"),
        ({"rotary_pct": 0.2}, "rotary_pct=0.2 must rotate an even"),
        ({"rotary_emb_base": 1e300}, "rotary_emb_base=1e+300 must be below 1e+15"),
        ({"vocab_size": 10**400}, "000 must be below 1e+15"),
        ({"rotary_emb_base": 0}, "rotary_emb_base=0.0 must be above 0"),
        ({"hidden_size": 33}, "hidden_size=33 must be divisible by"),
        ({"hidden_size": 32.0}, "hidden_size=32.0 must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be above 0"),
        ({"vocab_size": None}, "vocab_size=None must be a whole number"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05 must be above 0"),
        ({"attention_bias": "false"}, "attention_bias=false must be true or false"),
        ({"hidden_dropout": 1}, "hidden_dropout=1.0 must lie in [0, 1)"),
    ],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=" must ") as raised:
        read_architecture(write(tmp_path, {**BASE, **changes}))
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_code_of_a_tokenizer_is_left_alone() -> None:
    assert architecture({**BASE, "auto_map": {"AutoTokenizer": ["mine.Slow", None]}}) == architecture(BASE)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"hidden_size": NaN}', "[" * 100_000, '"\\ud800'])
def test_damaged_files(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: .*must be (a )?JSON"):
        read_architecture(write(tmp_path, content))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path=EleutherAI/polyglot-ko-1.3b must be a folder on this machine"):
        read_architecture(Path("EleutherAI/polyglot-ko-1.3b"))
    with pytest.raises(ValueError, match=r"path=.* must be a Hugging Face folder: it has no config\.json"):
        read_architecture(tmp_path)
