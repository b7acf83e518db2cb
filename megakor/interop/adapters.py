"""Export of adapters alone: a checkpoint of a LoRA run goes in, a folder in PEFT's format comes out.

`adapter_model.safetensors` and `adapter_config.json`, which `PeftModel.from_pretrained` lays over the exported base;
and the tokenizer with its chat template. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from megakor.checkpoint.format import WEIGHT, AdapterEntry, CheckpointManifest
from megakor.checkpoint.reader import CheckpointValues, model_config, resolve, run_of
from megakor.config.schema import ExportConfig
from megakor.interop.folder import check_out, mark, write_json, written_aside
from megakor.interop.huggingface import DTYPES
from megakor.interop.tokenizer_files import read_tokenizer_model, write_tokenizer_files
from megakor.logs import get_logger

PREFIX = "base_model.model."
"""What PEFT's names have before Hugging Face's."""

logger = get_logger(__name__)


def export_adapters(config: ExportConfig) -> dict[str, Any]:
    """Write the adapters of a checkpoint for PEFT. One process; the base need not be there.

    Returns:
        Figures: out, step, num_parameters, num_bytes, precision.

    Raises:
        ValueError: the checkpoint is not whole or has no adapters, the tokenizer is not its own, or `out` holds
            something else.
        OSError: the folder cannot be written; nothing is left of it.
    """
    checkpoint = resolve(config.run)
    manifest = CheckpointManifest.load(checkpoint)
    manifest.check_contents(checkpoint)
    if manifest.adapters is None:
        raise ValueError(f"run={config.run} must be a run with lora.rank above 0: adapters=true exports adapters alone")
    tokenizer_folder = run_of(checkpoint) / "tokenizer"
    proto = read_tokenizer_model(tokenizer_folder, manifest)
    out = Path(config.out).absolute()
    check_out(out)
    with written_aside(out) as aside, CheckpointValues(checkpoint, with_optimizer=False) as values:
        tensors = {}
        for key, entry in manifest.tensors.items():
            state, _, name = key.partition("/")
            if state == WEIGHT:
                whole = values.weight(name, 0, math.prod(entry.shape)).view(entry.shape)
                tensors[PREFIX + name] = whole.to(DTYPES[config.precision])
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(aside / "adapter_config.json", adapter_json(manifest.adapters))
        write_tokenizer_files(proto, tokenizer_folder, aside, model_config(manifest).max_position_embeddings)
        figures: dict[str, Any] = {
            "out": str(out),
            "step": manifest.step,
            "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "precision": config.precision.value,
        }
        mark(aside, figures)
    logger.info("export: %s -> %s, adapters of %s parameters", checkpoint, out, f"{figures['num_parameters']:,}")
    return figures


def adapter_json(adapters: AdapterEntry) -> dict[str, Any]:
    """`adapter_config.json`. Where the base is exported to is not known here, so the model is given to PEFT."""
    alpha = adapters.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": adapters.targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
