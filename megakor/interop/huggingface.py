"""Export: a checkpoint goes in, a Hugging Face folder comes out.

The folder loads offline with `AutoModelForCausalLM` and `AutoTokenizer`: safetensors, `config.json`,
`generation_config.json`, `tokenizer.json`, `tokenizer_config.json`, a chat template where the run has one, a model
card, and `megakor_export.json`, which holds the figures and lists the files. It is written aside, compared with its
source and renamed, so a folder at `out` is whole and checked, or absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.reader import check_whole, model_config, read_weights, resolve, run_of
from megakor.config.schema import ExportConfig, ModelConfig, Precision
from megakor.files import check_space
from megakor.interop.folder import check_out, mark, write_json, written_aside
from megakor.interop.model_card import write_model_card
from megakor.interop.self_check import self_check
from megakor.interop.tokenizer_files import eod_id, read_tokenizer_model, write_tokenizer_files
from megakor.logs import get_logger
from megakor.model.specs import EMBEDDING, HEAD, num_parameters, parameter_specs

MAX_SHARD_SIZE = "5GB"
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}

logger = get_logger(__name__)


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder and check the folder against it. One process.

    Returns:
        Figures: out, step, num_parameters, num_bytes, vocab_size, precision, and those of `self_check`.

    Raises:
        ValueError: the checkpoint is not whole, the tokenizer is not its own, `out` holds something else, or the
            written folder does not agree with the checkpoint.
        OSError: the folder cannot be written; nothing is left of it.
    """
    checkpoint = resolve(config.run)
    manifest = CheckpointManifest.load(checkpoint)
    check_whole(checkpoint)
    model = model_config(manifest)
    assert model.vocab_size is not None, "a checkpoint's vocabulary is resolved"
    tokenizer_folder = run_of(checkpoint) / "tokenizer"
    proto = read_tokenizer_model(tokenizer_folder, manifest)
    out = Path(config.out).absolute()
    check_out(out)
    vocab_size = manifest.num_tokens if config.trim_vocabulary else model.vocab_size
    check_space("out", out, num_parameters(model) * DTYPES[config.precision].itemsize)
    with written_aside(out) as aside:
        logger.info("export: %s -> %s", checkpoint, out)
        weights = _export_weights(read_weights(checkpoint), model, vocab_size, config.precision)
        num_exported = sum(tensor.numel() for tensor in weights.values())
        save_torch_state_dict(weights, aside, max_shard_size=MAX_SHARD_SIZE)
        del weights
        eod = eod_id(proto)
        write_json(aside / "config.json", model_json(model, vocab_size, eod, config.precision))
        write_json(aside / "generation_config.json", generation_json(eod, manifest.num_tokens, vocab_size))
        write_tokenizer_files(proto, tokenizer_folder, aside, model.max_position_embeddings)
        figures: dict[str, Any] = {
            "out": str(out),
            "step": manifest.step,
            "num_parameters": num_exported,
            "vocab_size": vocab_size,
            "precision": config.precision.value,
            **self_check(aside, checkpoint),
        }
        write_model_card(aside, run_of(checkpoint), manifest, figures)
        mark(aside, figures)
    logger.info(
        "export: %s parameters, largest difference of a logit %.2g, greedy continuation equal",
        f"{num_exported:,}",
        figures["max_logit_difference"],
    )
    return figures


def model_json(model: ModelConfig, vocab_size: int, eod: int, precision: Precision) -> dict[str, Any]:
    """`config.json` of a `GPTNeoXForCausalLM`.

    The rotary settings and the type are spelled twice: transformers 5 reads `rope_parameters` and `dtype`,
    transformers 4 reads `rotary_pct`, `rotary_emb_base` and `torch_dtype`.
    """
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": "gelu",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_emb_base,
            "partial_rotary_factor": model.rotary_pct,
        },
        "rotary_pct": model.rotary_pct,
        "rotary_emb_base": model.rotary_emb_base,
        "layer_norm_eps": model.layer_norm_eps,
        "use_parallel_residual": model.use_parallel_residual,
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.initializer_range,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def generation_json(eod: int, num_tokens: int, vocab_size: int) -> dict[str, Any]:
    """`generation_config.json`: the end token, and no token past the true vocabulary."""
    generation: dict[str, Any] = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    if vocab_size != num_tokens:
        generation["suppress_tokens"] = list(range(num_tokens, vocab_size))
    return generation


def _export_weights(
    weights: dict[str, torch.Tensor], model: ModelConfig, vocab_size: int, precision: Precision
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in the export's rows and type, taken out of `weights` one by one to spare memory."""
    exported = {}
    for spec in parameter_specs(model):
        tensor = weights.pop(spec.name)
        if spec.name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
            tensor = tensor[:vocab_size]
        tensor = tensor.to(DTYPES[precision]).contiguous().clone()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{spec.name} holds values that are not finite numbers in precision={precision.value}")
        exported[spec.name] = tensor
    return exported
