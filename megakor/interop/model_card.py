"""The model card: a run's resolved configuration and its measured results go in, the export's README.md comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from megakor.checkpoint.format import CheckpointManifest
from megakor.instruct.template import FILE as CHAT_TEMPLATE
from megakor.train.metrics import read_metrics


def write_model_card(out: Path, run: Path, manifest: CheckpointManifest, figures: dict[str, Any]) -> None:
    """Write `README.md`, with the YAML header that model hubs read, into an export."""
    has_chat_template = (out / CHAT_TEMPLATE).is_file()
    tags = ["gpt_neox", "megakor", *(["conversational"] if has_chat_template else [])]
    header = ModelCardData(language="ko", library_name="transformers", pipeline_tag="text-generation", tags=tags)
    model = manifest.model
    architecture = [
        ("architecture", f"GPT-NeoX, {'parallel' if model['use_parallel_residual'] else 'sequential'} residual"),
        ("parameters", f"{figures['num_parameters']:,}"),
        ("layers / hidden / feed-forward", _shape(model)),
        ("attention heads", model["num_attention_heads"]),
        ("rotary share of a head", model["rotary_pct"]),
        ("vocabulary (rows)", f"{manifest.num_tokens:,} ({figures['vocab_size']:,})"),
        ("sequence length", f"{model['max_position_embeddings']:,} tokens"),
        ("type of the weights", figures["precision"]),
        ("tokenizer fingerprint", f"`{manifest.tokenizer_fingerprint[:16]}`"),
    ]
    check = [
        ("largest difference of a logit (fp32 arithmetic)", f"{figures['max_logit_difference']:.3g}"),
        ("held to", f"{figures['tolerance']:g}"),
        ("largest difference to the unrounded weights", f"{figures['rounding_logit_difference']:.3g}"),
        ("8 greedy tokens equal", "yes" if figures["greedy_equal"] else "no"),
        ("token ids equal", "yes" if figures["tokens_equal"] else "no"),
    ]
    origin, results = "imported into", []
    if manifest.source is None:
        origin, measured = "trained with", _table(_results(run, manifest))
        results = [f"## Results\n\nMeasured by the run itself, up to step {manifest.step:,}.\n\n{measured}"]
    parts = [
        f"---\n{header.to_yaml()}\n---\n\n# {_title(run)}\n\nA Korean language model, {origin} megakor.",
        f"## Use\n\n```python\n{_usage(has_chat_template)}\n```\n\n"
        "Text goes through Unicode NFC, and U+2581 becomes `_`. The literals of control symbols (`<|endoftext|>`,\n"
        "`<|sep|>`) in a prompt are parsed as those symbols: remove them from untrusted text first.",
        f"## Model\n\n{_table(architecture)}",
        *results,
        f"## Export\n\nCompared with the source checkpoint when it was written.\n\n{_table(check)}",
    ]
    config = run / "config.yaml"
    if config.is_file():
        parts.append(f"## Configuration\n\n```yaml\n{config.read_text(encoding='utf-8').strip()}\n```")
    (out / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _usage(has_chat_template: bool) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ]
    if has_chat_template:
        lines += [
            'messages = [{"role": "user", "content": "봄에 심기 좋은 채소는 무엇인가요?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("옛날 옛적에", return_tensors="pt")')
    return "\n".join([*lines, "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"])


def _title(run: Path) -> str:
    return run.resolve().name


def _shape(model: dict[str, Any]) -> str:
    return f"{model['num_hidden_layers']} / {model['hidden_size']:,} / {model['intermediate_size']:,}"


def _results(run: Path, manifest: CheckpointManifest) -> list[tuple[str, object]]:
    """What `metrics.jsonl` says of the run up to the exported step."""
    records = [record for record in read_metrics(run) if record["step"] <= manifest.step]
    rows: list[tuple[str, object]] = [("optimizer steps", f"{manifest.step:,}")]
    training = [record for record in records if record["kind"] == "train"]
    if training:
        last = training[-1]
        rows.append(("training tokens", f"{last['tokens']:,}"))
        rows.append(("training loss, last step", f"{last['loss']:.4f} nats per token"))
    sets = {record["set"]: record for record in records if record["kind"] == "validation"}
    for name, record in sets.items():
        rows.append((f"loss on `{name}` at step {record['step']:,}", f"{record['loss']:.4f} nats per token"))
        rows.append((f"bits per byte on `{name}`", f"{record['bits_per_byte']:.4f}"))
    return rows


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
