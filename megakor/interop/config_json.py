"""A Hugging Face `config.json` goes in, our architecture comes out.

What counts is what transformers' `GPTNeoXForCausalLM` computes from the file. Every key that changes it is mapped, or
refused where our model computes something else; the others (ids of special tokens, type of the weights, what
transformers itself does not know) are left out. No code that the folder holds or names is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megakor.config.checks import check_model
from megakor.config.rules import positive, require
from megakor.config.schema import ModelConfig

CONFIG_FILE = "config.json"
ARCHITECTURE = "GPTNeoXForCausalLM"
MODEL_TYPE = "gpt_neox"
MAPPED: dict[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Keys that we have under the same name, and what transformers takes where one is missing."""
ROTARY = {
    "rotary_pct": (0.25, ("rotary_pct", "partial_rotary_factor")),
    "rotary_emb_base": (10000.0, ("rotary_emb_base", "rope_theta")),
}
"""What transformers takes where none is given, and the spellings of transformers 4: the second is a copy."""
ROPE_SECTIONS = ("rope_scaling", "rope_parameters")
"""Where scaled rotary embeddings are asked for; transformers 5 keeps both rotary settings in the second."""
LARGEST = 1e15
KINDS = {bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}


def read_architecture(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model that a folder's `config.json` describes, and the content of the file.

    Raises:
        FileNotFoundError, ValueError: as `read_config` and `architecture`.
    """
    content = read_config(folder)
    try:
        return architecture(content), content
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no `config.json`, or the file is no JSON object of finite numbers.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"path={folder} must be a folder on this machine; nothing is downloaded")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"path={folder} must be a Hugging Face folder: it has no {CONFIG_FILE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); it must be JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return content


def architecture(content: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
        ValueError: it is of another architecture, a value is of the wrong type or size, or our model would compute
            something else.
    """
    require(content.get("architectures") == [ARCHITECTURE], "architectures", content.get("architectures"),
            f"be [{ARCHITECTURE}]")  # fmt: skip
    require(content.get("model_type") == MODEL_TYPE, "model_type", content.get("model_type"), f"be {MODEL_TYPE}")
    check_code(content)
    fields = {name: typed(name, content.get(name, default), type(default)) for name, default in MAPPED.items()}
    model = ModelConfig(**fields | rotary(content))
    positive("layer_norm_eps", model.layer_norm_eps)
    positive("rotary_emb_base", model.rotary_emb_base)
    check_model(model)
    check_arithmetic(content, model)
    return model


def check_code(content: dict[str, Any]) -> None:
    """Raise where the model is computed by code of the folder's own; that of a tokenizer is not asked for."""
    named = sorted(set(typed("auto_map", content.get("auto_map") or {}, dict)) - {"AutoTokenizer", "AutoProcessor"})
    rule = f"be left out: code in the folder is not run, and {ARCHITECTURE} is what is imported"
    require(not named, "auto_map", ", ".join(named), rule)


def check_arithmetic(content: dict[str, Any], model: ModelConfig) -> None:
    """Raise on keys by which transformers would compute something that our model does not."""
    act = content.get("hidden_act", "gelu")
    require(act == "gelu", "hidden_act", act, "be gelu, the exact one; the model has no other")
    head_dim = model.hidden_size // model.num_attention_heads
    given = content.get("head_dim")
    require(given in (None, head_dim), "head_dim", given, f"be hidden_size / num_attention_heads = {head_dim}")
    require(content.get("is_causal", True) is True, "is_causal", content.get("is_causal"), "be true")
    rule = "be left out: quantized weights are not imported"
    require(content.get("quantization_config") is None, "quantization_config", content.get("quantization_config"), rule)
    pruned = content.get("pruned_heads")
    require(not pruned, "pruned_heads", pruned, "be left out: every head is computed")


def rotary(content: dict[str, Any]) -> dict[str, float]:
    """`rotary_pct` and `rotary_emb_base`. Every spelling that is given must say the same, for versions differ in which
    they read."""
    sections = {key: typed(key, content[key], dict) for key in ROPE_SECTIONS if content.get(key)}
    for key, section in sections.items():
        for name in ("rope_type", "type"):
            kind = section.get(name, "default")
            require(kind == "default", f"{key}.{name}", kind, "be default: scaled rotary embeddings are not computed")
        strangers = sorted(section.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if strangers:
            require(False, f"{key}.{strangers[0]}", section[strangers[0]], "be left out: it is no setting of ours")
    found = {}
    for ours, (default, (first, copy)) in ROTARY.items():
        given = {f"{key}.{copy}": section[copy] for key, section in sections.items() if copy in section}
        given |= {key: content[key] for key in (first, copy) if key in content}
        if list(given) == [copy]:  # transformers reads the copy by itself in no version
            given = {first: default, **given}
        given = {key: typed(key, value, float) for key, value in given.items()}
        key, value = next(iter(given.items()), (ours, default))
        for other, its in given.items():
            require(its == value, other, its, f"be {key}={value}: versions of transformers differ in which they read")
        found[ours] = value
    return found


def typed(key: str, value: Any, kind: type) -> Any:
    """The value, which must be of its type, and no number out of all bounds; a whole number is a number, too."""
    require(type(value) is kind or (kind is float and type(value) is int), key, value, f"be {KINDS[kind]}")
    if kind in (int, float):
        require(abs(value) < LARGEST, key, value, f"be below {LARGEST:g} in size")
    return kind(value)


def _not_finite(word: str) -> float:
    raise ValueError(f"{word} is no number")
