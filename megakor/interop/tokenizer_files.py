"""The tokenizer's part of an export: the run's `tokenizer.model` goes in, what `AutoTokenizer` reads comes out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from megakor.checkpoint.format import CheckpointManifest
from megakor.instruct.template import FILE as CHAT_TEMPLATE
from megakor.interop.tokenizer_json import build_tokenizer
from megakor.tokenizer.special import END_OF_DOCUMENT, SEPARATOR
from megakor.tokenizer.tokenizer import META_FILE, MODEL_FILE


def read_tokenizer_model(folder: Path, manifest: CheckpointManifest) -> Any:
    """The `ModelProto` of a run's tokenizer, proved to be the one that the checkpoint was trained with.

    Raises:
        ValueError: there is no tokenizer, or its fingerprint (SHA-256) is not the manifest's.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: a checkpoint is exported together with its run's tokenizer")
    content = path.read_bytes()
    fingerprint = hashlib.sha256(content).hexdigest()
    if fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{path} has fingerprint {fingerprint[:12]}…, must be the checkpoint's "
            f"tokenizer_fingerprint={manifest.tokenizer_fingerprint[:12]}…"
        )
    proto = ModelProto()
    proto.ParseFromString(content)
    if len(proto.pieces) != manifest.num_tokens:
        raise ValueError(f"{path} has {len(proto.pieces)} pieces, must be num_tokens={manifest.num_tokens}")
    return proto


def eod_id(proto: Any) -> int:
    """The id of the end-of-text symbol."""
    for index, piece in enumerate(proto.pieces):
        if piece.piece == END_OF_DOCUMENT:
            return index
    raise ValueError(f"tokenizer.model has no {END_OF_DOCUMENT}, which ends every document")


def copy_own_files(folder: Path, out: Path) -> None:
    """Copy the files that make a folder a tokenizer of ours."""
    for name in (MODEL_FILE, META_FILE):
        shutil.copyfile(folder / name, out / name)


def write_tokenizer_files(proto: Any, folder: Path, out: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; copy our own files, and the chat template if there is one.

    transformers reads `tokenizer.json`; `tokenizer.model` and `tokenizer.meta.json` are for `megakor import-model`.

    Padding is on the left, as batched generation needs it; training code sets its own side. `<unk>` is not declared as
    a token: byte fallback leaves it no use, and a declared token would be parsed from text.
    """
    build_tokenizer(proto).save(str(out / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if any(piece.piece == SEPARATOR for piece in proto.pieces):
        config["sep_token"] = SEPARATOR
    copy_own_files(folder, out)
    template = folder / CHAT_TEMPLATE
    if template.is_file():
        shutil.copyfile(template, out / CHAT_TEMPLATE)
        config["chat_template"] = template.read_text(encoding="utf-8")  # for transformers before 4.43
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
