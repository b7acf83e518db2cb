"""The configuration's types: one dataclass per section, one root per verb.

YAML holds values; these classes hold types, defaults, units and help texts. Hydra composes the YAML onto them and
`OmegaConf.to_object` returns instances. Rules that involve more than one field are in `megakor.config.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from megakor.config.data_schema import DataConfig
from megakor.config.fields import key, section


class Precision(Enum):
    """Arithmetic of the forward and backward pass. Master weights and moments are fp32 in all of them."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ActivationCheckpointing(Enum):
    """What the backward pass computes again instead of keeping it."""

    none = "none"
    full = "full"
    selective = "selective"


class OptimizerName(Enum):
    adamw = "adamw"
    adafactor = "adafactor"


class ScheduleName(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class OnError(Enum):
    """What to do with a record that cannot be read: stop with one error, or skip it and count it."""

    stop = "stop"
    skip = "skip"


class TokenizerKind(Enum):
    bpe = "bpe"
    unigram = "unigram"


# --------------------------------------------------------------------------------------------- model and layout


@dataclass
class ModelConfig:
    """A GPT-NeoX architecture, in Hugging Face's field names."""

    hidden_size: int = key(help="width of the residual stream")
    num_hidden_layers: int = key(help="number of transformer blocks")
    num_attention_heads: int = key(help="attention heads; must divide hidden_size")
    intermediate_size: int = key(help="width of the feed-forward layer")
    vocab_size: int | None = key(
        None,
        help="embedding rows, padding included; null: the tokenizer's, rounded up to make_vocab_size_divisible_by",
        unit="rows",
    )
    make_vocab_size_divisible_by: int = key(128, help="rounding of a null vocab_size", unit="rows")
    max_position_embeddings: int = key(2048, help="longest sequence the model is meant for", unit="tokens")
    rotary_pct: float = key(0.25, help="share of each head's dimensions that rotate")
    rotary_emb_base: float = key(10000.0, help="rotary base")
    layer_norm_eps: float = key(1e-5, help="LayerNorm epsilon")
    use_parallel_residual: bool = key(True, help="attention and feed-forward read the same input (GPT-NeoX) or in turn")
    attention_bias: bool = key(True, help="biases in the attention's linears")
    tie_word_embeddings: bool = key(False, help="share the input embedding with the output projection")
    initializer_range: float = key(0.02, help="standard deviation of initial weights")
    hidden_dropout: float = key(0.0, help="dropout of what attention and feed-forward add to the residual stream")
    attention_dropout: float = key(0.0, help="dropout of attention weights")


@dataclass
class ParallelConfig:
    """The layout. Sizes multiply to the number of processes."""

    tensor_parallel_size: int = key(1, help="ranks that split each layer", unit="ranks")
    pipeline_parallel_size: int = key(1, help="stages that split the layers", unit="ranks")
    context_parallel_size: int = key(1, help="ranks that split each sequence", unit="ranks")
    data_parallel_size: int | None = key(
        None, help="replicas; null: the number of processes divided by the other sizes", unit="ranks"
    )
    sequence_parallel: bool = key(False, help="tensor ranks split the residual stream along the sequence too")
    pipeline_partition: str = key("parameters", help="how layers go to stages: parameters, uniform or type:REGEX")
    zero_stage: int = key(1, help="DeepSpeed ZeRO stage: 0 (fp32 reference only), 1, 2 or 3")
    offload_optimizer: bool = key(False, help="keep optimizer state and its update on the host's CPUs")
    offload_parameters: bool = key(False, help="keep parameters in the host's memory between uses (ZeRO-3)")


# --------------------------------------------------------------------------------------------- a training run


@dataclass
class TrainConfig:
    """Size, length and arithmetic of a training run."""

    seed: int = key(1234, help="seed of the initial weights and of the data order")
    num_steps: int = key(help="optimizer steps", unit="steps")
    global_batch_size: int = key(help="sequences in one optimizer step, over all replicas", unit="sequences")
    micro_batch_size: int = key(help="sequences in one forward pass of one replica", unit="sequences")
    sequence_length: int = key(2048, help="tokens in a sequence", unit="tokens")
    batch_sizes: dict[int, int] = key(
        {}, help="global_batch_size earlier in the run: samples until which a size holds -> size", unit="sequences"
    )
    sequence_lengths: dict[int, int] = key(
        {}, help="shorter rows earlier in the run: samples until which a length holds -> length", unit="tokens"
    )
    precision: Precision = key(Precision.bf16, help="arithmetic of forward and backward")
    clip_grad_norm: float = key(1.0, help="global gradient norm is clipped to this; 0: no clipping")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing.none,
        help="recomputed in the backward pass: none; full: whole blocks; selective: attention alone",
    )
    activation_checkpointing_interval: int = key(1, help="with full: every so many blocks one", unit="blocks")
    compile: bool = key(False, help="torch.compile the blocks")


@dataclass
class OptimizerConfig:
    name: OptimizerName = key(OptimizerName.adamw, help="optimizer")
    lr: float = key(help="peak learning rate")
    beta1: float = key(0.9, help="decay of the first moment (adamw)")
    beta2: float = key(0.95, help="decay of the second moment (adamw)")
    eps: float = key(1e-8, help="added to the denominator (adamw)")
    weight_decay: float = key(0.1, help="decoupled weight decay; biases and norms are not decayed")


@dataclass
class ScheduleConfig:
    """The learning rate as a function of progress = step / num_steps."""

    name: ScheduleName = key(ScheduleName.cosine, help="shape after the warm-up")
    warmup_ratio: float = key(0.01, help="share of the run in which the rate rises linearly from 0")
    decay_ratio: float = key(0.2, help="share of the run at its end in which a wsd schedule falls linearly")
    min_lr_ratio: float = key(0.1, help="final rate over peak rate")


@dataclass
class CheckpointConfig:
    interval: int = key(1000, help="save every so many steps, and at the end", unit="steps")
    keep_last: int = key(3, help="whole checkpoints kept; older ones are removed; 0: all")
    resume: str = key("auto", help="auto: go on from the newest whole checkpoint; never: refuse a run folder in use")


@dataclass
class EvaluationConfig:
    """Held-out sets are evaluated with train.micro_batch_size and train.sequence_length."""

    interval: int = key(1000, help="evaluate every so many steps, and at the end; 0: never", unit="steps")


@dataclass
class LoggingConfig:
    interval: int = key(1, help="log every so many steps", unit="steps")
    wandb: WandbMode = key(WandbMode.offline, help="Weights & Biases: offline, online or disabled")
    wandb_project: str = key("megakor", help="Weights & Biases project")
    peak_tflops: float | None = key(
        None, help="matmul peak of one process's device, for MFU; null: measured at start", unit="TFLOP/s"
    )


@dataclass
class EngineConfig:
    """What every training verb shares."""

    name: str = key("run", help="name of the run")
    run: str = key(help="run folder: configuration, metrics, checkpoints")
    parallel: ParallelConfig = section(ParallelConfig, help="layout")
    train: TrainConfig = section(TrainConfig, help="size, length, arithmetic")
    optimizer: OptimizerConfig = section(OptimizerConfig, help="optimizer")
    schedule: ScheduleConfig = section(ScheduleConfig, help="learning rate")
    checkpoint: CheckpointConfig = section(CheckpointConfig, help="saving and resuming")
    evaluation: EvaluationConfig = section(EvaluationConfig, help="validation loss and bits per byte")
    logging: LoggingConfig = section(LoggingConfig, help="terminal, metrics.jsonl, Weights & Biases")
    deepspeed: dict[str, Any] = key({}, help="passed to DeepSpeed as it is; keys that megakor owns are refused")


@dataclass
class PretrainConfig(EngineConfig):
    """Train a model from scratch on shards."""

    model: ModelConfig = section(ModelConfig, help="architecture")
    data: DataConfig = section(DataConfig, help="shards and tokenizer")


@dataclass
class SimulateConfig(PretrainConfig):
    """Run the layout of a pretraining run on fake tensors: parameters, communication and memory of every stage."""

    world_size: int | None = key(None, help="processes; null: as few as the layout's sizes need", unit="ranks")
    format: str = key("table", help="what to print: table or json")


@dataclass
class PairsConfig:
    """Instruction data: Alpaca's instruction,input,output or question/answer, in .jsonl, .jsonl.gz or .csv."""

    files: list[str] = key([], help="files or globs; empty: the sample's own pairs")
    validation_ratio: float = key(0.05, help="share of the pairs held out")
    max_pairs: int | None = key(None, help="use at most so many pairs", unit="pairs")
    packing: bool = key(True, help="lay several pairs into a row; none sees another")
    on_error: OnError = key(OnError.stop, help="a row that cannot be read: stop or skip")


@dataclass
class InstructConfig(EngineConfig):
    """Go on from a checkpoint with instruction pairs; the architecture comes from the checkpoint."""

    base: str = key(help="run folder or checkpoint folder to start from")
    pairs: PairsConfig = section(PairsConfig, help="instruction data")
    tokenizer: str = key(help="folder of the tokenizer that the base was trained with")


# --------------------------------------------------------------------------------------------- the other verbs


@dataclass
class CorpusConfig:
    """Gather raw text into one corpus with a held-out split."""

    inputs: list[str] = key([], help=".txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet files or globs; empty: the sample")
    out: str = key(help="folder for train.jsonl, heldout.jsonl and corpus.json")
    text_key: str = key("text", help="field of the text in .jsonl and .parquet")
    id_key: str = key("id", help="field of the document's id, where there is one")
    heldout_ratio: float = key(0.05, help="share of the documents held out, chosen by a hash of the text")
    max_bytes: int | None = key(
        None, help="take documents evenly over all inputs up to so much text; null: all", unit="bytes"
    )
    on_error: OnError = key(OnError.stop, help="a record that cannot be read: stop or skip")


@dataclass
class TrainTokenizerConfig:
    """Train a SentencePiece tokenizer that keeps every character of Korean text."""

    inputs: list[str] = key(help="text files or globs, as for corpus")
    out: str = key(help="folder for tokenizer.model and tokenizer.meta.json")
    kind: TokenizerKind = key(TokenizerKind.bpe, help="segmentation model")
    vocab_size: int | None = key(
        None, help="pieces, special tokens included; null: sized to the text, at most 30,000", unit="pieces"
    )
    character_coverage: float = key(0.9995, help="share of characters with pieces of their own; the rest are bytes")
    max_bytes: int | None = key(None, help="train on at most so much text, taken evenly; null: all", unit="bytes")
    num_threads: int = key(2, help="threads of the trainer")
    text_key: str = key("text", help="field of the text in .jsonl and .parquet")
    on_error: OnError = key(OnError.stop, help="a record that cannot be read: stop or skip")


@dataclass
class ShardConfig:
    """Tokenise text into Megatron .bin/.idx shards with a manifest."""

    inputs: list[str] = key(help="text files or globs, as for corpus")
    tokenizer: str = key(help="folder of the tokenizer")
    out: str = key(help="folder for the shards and manifest.json")
    shard_size: int = key(64_000_000, help="a shard is closed at the first document past this", unit="tokens")
    num_workers: int = key(2, help="processes that tokenise")
    text_key: str = key("text", help="field of the text in .jsonl and .parquet")
    id_key: str = key("id", help="field of the document's id, where there is one")
    on_error: OnError = key(OnError.stop, help="a record that cannot be read: stop or skip")


@dataclass
class ExportConfig:
    """Write a checkpoint as a Hugging Face folder, and check it against its source."""

    run: str = key(help="run folder or checkpoint folder")
    out: str = key(help="folder to write")
    precision: Precision = key(Precision.fp32, help="type of the exported weights")
    trim_vocabulary: bool = key(True, help="drop the embedding rows past the true vocabulary")


@dataclass
class EvaluateConfig:
    """Bits per byte of a checkpoint on held-out shards, beside a unigram and an order-0 model."""

    run: str = key(help="run folder or checkpoint folder")
    heldout: str = key(help="folder of held-out shards")
    train: str | None = key(None, help="folder of training shards, for the unigram model; null: no unigram figure")
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
class ReportConfig:
    """One self-contained HTML page about a run."""

    run: str = key(help="run folder")
    out: str | None = key(None, help="page to write; null: report.html in the run folder")


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
