"""Configurations in the shapes that GPT-NeoX's users write, with Polyglot-Ko's published sizes."""

from __future__ import annotations

from typing import Any

# Architectures and batch sizes are those of Polyglot-Ko's model cards; the rest is as in the shipped experiments.
SIZES: dict[str, dict[str, Any]] = {
    "1_3b_polyglot": {"layers": 24, "hidden": 2048, "heads": 16, "rotary": 0.5, "batch": 1024, "micro": 8,
                      "steps": 101567, "lr": 2.0e-4, "min_lr": 2.0e-5},
    "3_8b_polyglot": {"layers": 32, "hidden": 3072, "heads": 24, "rotary": 0.5, "batch": 1024, "micro": 4,
                      "steps": 104428, "lr": 1.6e-4, "min_lr": 1.6e-5},
    "5_8b_polyglot": {"layers": 28, "hidden": 4096, "heads": 16, "rotary": 0.25, "batch": 256, "micro": 1,
                      "steps": 328064, "lr": 1.2e-4, "min_lr": 1.2e-5, "tensor": 2},
    "12_8b_256xa100": {"layers": 40, "hidden": 5120, "heads": 40, "rotary": 0.5, "batch": 256, "micro": 1,
                       "steps": 318528, "lr": 1.0e-4, "min_lr": 1.0e-5, "tensor": 4, "stages": 4},
}  # fmt: skip
RECOMPUTED = ("3_8b_polyglot",)
"""Those whose shipped experiment recomputes whole blocks."""

MODEL = """\
# Braces, quotes and dashes, a comma at the end: most files are written so.
{{
   "pipe-parallel-size": {stages},   # 1: no pipeline
   "model-parallel-size": {tensor},
   "sequence_parallel": {sequence},

   "num-layers": {layers},
   "hidden-size": {hidden},
   "num-attention-heads": {heads},
   "seq-length": 2048,
   "max-position-embeddings": 2048,
   "norm": "layernorm",
   "pos-emb": "rotary",
   "rotary_pct": {rotary},
   "no-weight-tying": True,
   "gpt_j_residual": true,
   "make_vocab_size_divisible_by": {rows},
   "padded_vocab_size": 30080,
   "bias-gelu-fusion": false,

   "optimizer": {{
     "type": "Adam",
     "params": {{"lr": {lr}, "betas": [0.9, 0.95], "eps": 1.0e-8}},
   }},
   "min_lr": {min_lr},
   "lr-decay-style": "cosine",
   "lr-decay-iters": {steps},
   "warmup": 0.01,
   "train-iters": {steps},

   "zero_optimization": {{"stage": 1, "overlap_comm": True}},
   "train_batch_size": {batch},
   "train_micro_batch_size_per_gpu": {micro},
   "checkpoint-activations": {recomputed},

   "gradient_clipping": 1.0,
   "weight-decay": 0.1,
   "hidden-dropout": 0,
   "attention-dropout": 0,
   "precision": "bfloat16",
   "bf16": {{"enabled": true}},
}}
"""

PLACES = """\
# Plain YAML
data-path: /data/말뭉치/korean_text_document
vocab-file: /data/tokenizer.json
tokenizer_type: HFTokenizer
save: checkpoints
checkpoint-factor: 1000
"""


def model_file(name: str) -> str:
    """GPT-NeoX's file of the model and its training, for one of Polyglot-Ko's sizes."""
    sizes = {"tensor": 1, "stages": 1, **SIZES[name]}
    words = {"sequence": str(sizes["tensor"] > 1).lower(), "recomputed": str(name in RECOMPUTED).lower()}
    return MODEL.format(**sizes, **words, rows=128 // sizes["tensor"])


SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128, "max_position_embeddings": 256,
    "pos_emb": "rotary", "train_iters": 100, "optimizer.type": "Adam", "optimizer.params.lr": 0.001,
    "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
}  # fmt: skip
"""What is needed, by dotted keys."""
