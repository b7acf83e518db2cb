"""The configuration's types of the verbs that use or examine a model or a run."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.choices import Precision
from megakor.config.fields import key


@dataclass
class ExportConfig:
    """Write a checkpoint as a Hugging Face folder, and check it against its source."""

    run: str = key(help="run folder or checkpoint folder")
    out: str = key(help="folder to write")
    precision: Precision = key(Precision.fp32, help="type of the exported weights")
    trim_vocabulary: bool = key(True, help="drop the embedding rows past the true vocabulary")
    adapters: bool = key(False, help="write the adapters of a LoRA run alone, for PEFT, not merged into their base")


@dataclass
class EvaluateConfig:
    """Bits per byte of a checkpoint on held-out shards, beside a unigram and an order-0 model."""

    run: str = key(help="run folder or checkpoint folder")
    heldout: str = key(help="folder of held-out shards")
    train: str | None = key(None, help="folder of training shards, for the unigram model; null: no unigram figure")
    cache: str | None = key(
        None, help="folder on a disk of this machine for shards that are elsewhere (s3://, gs://, hf://)"
    )
    cache_size: int = key(100 * 2**30, help="most that it holds; what was used longest ago makes room", unit="bytes")
    micro_batch_size: int = key(8, help="sequences in one forward pass", unit="sequences")


@dataclass
class GenerateConfig:
    """Continue a prompt, or answer a question with an instruction-tuned checkpoint."""

    run: str = key(help="run folder or checkpoint folder")
    prompt: str | None = key(None, help="text to continue")
    question: str | None = key(None, help="question put through the chat template instead")
    context: str = key("", help="input that goes with the question")
    max_new_tokens: int = key(64, help="longest continuation", unit="tokens")
    temperature: float = key(0.8, help="0: greedy")
    top_p: float = key(0.95, help="nucleus: smallest set of tokens with this probability")
    seed: int = key(1234, help="seed of the sampling")
    num_samples: int = key(1, help="continuations to draw")


@dataclass
class TraceConfig:
    """Which documents made a step's batch, which steps saw a document, what was read around the worst steps."""

    run: str = key(help="folder of a pretraining run")
    step: int | None = key(None, help="list what made this step's batch", unit="step")
    document: str | None = key(None, help="list the steps that saw the document with this id")
    spikes: bool = key(False, help="list what was read at the steps whose loss stands out most")
    num_spikes: int = key(3, help="with spikes: how many of them", unit="steps")
    around: int = key(0, help="with spikes: steps before and after each, too", unit="steps")
    format: str = key("table", help="what to print: table, or json: one object a line")


@dataclass
class CheckpointListConfig:
    """The checkpoints of a run: step, size, layout, validation losses, and whether they are whole."""

    run: str = key(help="run folder or checkpoint folder")
    format: str = key("table", help="what to print: table, or json: one object a line")


@dataclass
class CheckpointVerifyConfig:
    """Read every byte of a run's checkpoints, or of one, and compare it with what was written."""

    run: str = key(help="run folder: all its checkpoints; or one checkpoint folder")
    num_threads: int = key(4, help="threads that read and digest", unit="threads")


@dataclass
class CheckpointPruneConfig:
    """Remove checkpoints of a run that is not going on; the newest whole one always stays."""

    run: str = key(help="run folder")
    keep_last: int = key(0, help="whole checkpoints kept, the newest; 0: all, but for outlived ones for restarts")
    keep_every: int = key(0, help="with keep_last: those of multiples of so many steps stay; 0: none", unit="steps")
    keep_best: str | None = key(None, help="with keep_last: held-out set; the checkpoint with its lowest loss stays")
    damaged: bool = key(False, help="remove damaged checkpoints too, and what interrupted saves have left")
    dry_run: bool = key(False, help="remove nothing, say what would go")


@dataclass
class ExportUniversalConfig:
    """Write a checkpoint in DeepSpeed's universal format, which engines of DeepSpeed's own resume."""

    run: str = key(help="run folder or checkpoint folder")
    out: str = key(help="folder to write, new or empty")


@dataclass
class ImportConfig:
    """Write GPT-NeoX's configuration as an experiment of ours, and list what becomes of every key."""

    path: list[str] = key(help="GPT-NeoX's YAML file, or several, which are merged")
    out: str = key(".", help="folder for --config-dir; the experiment is written to experiment/<name>.yaml in it")
    name: str | None = key(None, help="name of the experiment; null: that of the first file")
    world_size: int | None = key(
        None, help="GPUs, to work out batch sizes; null: global_num_gpus, or num_nodes × num_gpus", unit="ranks"
    )
    format: str = key("table", help="what to print: table, or json: one object")


@dataclass
class ImportModelConfig:
    """Read a Hugging Face folder of a GPT-NeoX model, safetensors alone, as a run that instruct can start from."""

    path: str = key(help="Hugging Face folder on this machine")
    run: str = key(help="run folder to write, new or empty")
    tokenizer: str | None = key(None, help="folder of the model's tokenizer, one of megakor's; null: path's own")


@dataclass
class ReportConfig:
    """One self-contained HTML page about a run."""

    run: str = key(help="run folder")
    out: str | None = key(None, help="page to write; null: report.html in the run folder")


@dataclass
class DrillConfig:
    """Disturb a short training again and again: killed ranks, damaged files, full disks, other layouts."""

    run: str = key("runs/drill", help="folder of the drill; one that is there is replaced")
    faults: int = key(5, help="times that the run is disturbed")
    seed: int = key(1234, help="of the choice of faults")
    num_ranks: int = key(2, help="processes; an even number", unit="ranks")
    layouts: bool = key(True, help="go on in other layouts, too; false: all losses must be equal to the last bit")
    patience_seconds: float = key(120.0, help="a start that takes longer has hung", unit="s")
    data: str | None = key(None, help="folder of training shards; null: made of the sample")
    tokenizer: str | None = key(None, help="folder of the tokenizer that made them")
    training: list[str] = key([], help="further overrides of the training, such as checkpoint.asynchronous=false")


@dataclass
class DemoConfig:
    """The whole arc on two processes: text in; a trained, resumed, exported, instruction-tuned model out."""

    run: str = key("runs/demo", help="folder of the demo; one that is there is replaced")
    corpus: list[str] = key([], help="files or globs as for corpus; empty: the sample")
    max_bytes: int | None = key(4_000_000, help="cap on the text used; null: all", unit="bytes")
    vocab_size: int | None = key(None, help="pieces of the tokenizer; null: sized to the text", unit="pieces")
    pipeline_parallel_size: int = key(1, help="1: two data-parallel ranks; 2: two pipeline stages", unit="ranks")
    num_steps: int | None = key(None, help="pretraining steps; null: as experiment=demo", unit="steps")
    instruct_steps: int | None = key(None, help="instruction steps; null: as experiment=instruct_demo", unit="steps")
    training: list[str] = key([], help="further overrides of both training runs, such as train.sequence_length=128")
