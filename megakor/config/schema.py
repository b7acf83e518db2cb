"""The configuration's types: one dataclass per section, one root per verb.

YAML holds values; these classes hold types, defaults, units and help texts. Hydra composes the YAML onto them and
`OmegaConf.to_object` returns instances. All are imported from here. Rules that involve more than one field are in
`megakor.config.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megakor.config.choices import (
    ActivationCheckpointing,
    ClusterKind,
    JobKind,
    LoraTarget,
    NodeLauncher,
    OnError,
    OnSpike,
    OptimizerName,
    Precision,
    ScheduleName,
    TokenizerKind,
    WandbMode,
)
from megakor.config.cluster_schema import ClusterConfig, KubernetesConfig, SlurmConfig
from megakor.config.data_schema import DataConfig
from megakor.config.fields import key, section
from megakor.config.survival_schema import CheckpointConfig, HealthConfig, LaunchConfig
from megakor.config.text_schema import CorpusConfig, ShardConfig, TrainTokenizerConfig
from megakor.config.use_schema import (
    CheckpointListConfig,
    CheckpointPruneConfig,
    CheckpointVerifyConfig,
    DemoConfig,
    DrillConfig,
    EvaluateConfig,
    ExportConfig,
    ExportUniversalConfig,
    GenerateConfig,
    ImportConfig,
    ImportModelConfig,
    ReportConfig,
    TraceConfig,
)

__all__ = [
    "ActivationCheckpointing",
    "CheckpointConfig",
    "CheckpointListConfig",
    "CheckpointPruneConfig",
    "CheckpointVerifyConfig",
    "ClusterConfig",
    "ClusterKind",
    "CorpusConfig",
    "DataConfig",
    "DemoConfig",
    "DrillConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "ExportUniversalConfig",
    "GenerateConfig",
    "HealthConfig",
    "ImportConfig",
    "ImportModelConfig",
    "InstructConfig",
    "JobKind",
    "KubernetesConfig",
    "LaunchConfig",
    "LaunchInstructConfig",
    "LaunchPreflightConfig",
    "LaunchPretrainConfig",
    "LoggingConfig",
    "LoraConfig",
    "LoraTarget",
    "ModelConfig",
    "NodeLauncher",
    "OnError",
    "OnSpike",
    "OptimizerConfig",
    "OptimizerName",
    "PairsConfig",
    "ParallelConfig",
    "PlanConfig",
    "PlanSearchConfig",
    "Precision",
    "PreflightConfig",
    "PretrainConfig",
    "ReportConfig",
    "ScheduleConfig",
    "ScheduleName",
    "ShardConfig",
    "SimulateConfig",
    "SlurmConfig",
    "TokenizerKind",
    "TraceConfig",
    "TrainConfig",
    "TrainTokenizerConfig",
    "TuneConfig",
    "WandbMode",
]


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
    health: HealthConfig = section(HealthConfig, help="what is done about steps that go wrong")
    evaluation: EvaluationConfig = section(EvaluationConfig, help="validation loss and bits per byte")
    logging: LoggingConfig = section(LoggingConfig, help="terminal, metrics.jsonl, Weights & Biases")
    cluster: ClusterConfig = section(ClusterConfig, help="machines, and what starts processes on them")
    launch: LaunchConfig = section(LaunchConfig, help="how megakor launch starts the run")
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
class TuneConfig(PretrainConfig):
    """Measure a few of the planner's best layouts with real steps, and write the fastest as an experiment."""

    num_layouts: int = key(4, help="layouts to try, those first that the planner holds fastest", unit="layouts")
    num_steps: int = key(5, help="steps of each that are measured; the median counts", unit="steps")
    warmup_steps: int = key(2, help="steps of each before them", unit="steps")
    out: str | None = key(None, help="folder for experiment/NAME-tuned.yaml; null: tune in the run folder")
    format: str = key("table", help="what to print: table or json")


@dataclass
class PreflightConfig(PretrainConfig):
    """Check the machines of a pretraining run, on all its ranks, before anything is built."""

    format: str = key("table", help="what to print: table or json")
    wait_seconds: float = key(30.0, help="how long ranks wait for each other at the start", unit="s")
    slow_below: float = key(0.7, help="share of the others' median; devices and links below it are faults")
    out: str | None = key(None, help="write the measured rates there, a YAML file that plan takes as hardware")
    watts: float | None = key(
        None, help="with out: power of a device with its share of the node, which is not measured", unit="W"
    )


@dataclass
class PairsConfig:
    """Instruction data: Alpaca's instruction,input,output or question/answer, in .jsonl, .jsonl.gz or .csv."""

    files: list[str] = key([], help="files or globs; empty: the sample's own pairs")
    validation_ratio: float = key(0.05, help="share of the pairs held out")
    max_pairs: int | None = key(None, help="use at most so many pairs", unit="pairs")
    packing: bool = key(True, help="lay several pairs into a row; none sees another")
    on_error: OnError = key(OnError.stop, help="a row that cannot be read: stop or skip")


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021): y = W x + alpha / rank · B A x; A and B are trained."""

    rank: int = key(0, help="rows of A and columns of B; 0: no adapters, all parameters are trained")
    alpha: float = key(16.0, help="what an adapter counts is alpha / rank")
    targets: list[LoraTarget] = key([LoraTarget.query_key_value], help="linears of every block that get one")


@dataclass
class InstructConfig(EngineConfig):
    """Go on from a checkpoint with instruction pairs; the architecture comes from the checkpoint."""

    base: str = key(help="run folder or checkpoint folder to start from")
    pairs: PairsConfig = section(PairsConfig, help="instruction data")
    tokenizer: str = key(help="folder of the tokenizer that the base was trained with")
    lora: LoraConfig = section(LoraConfig, help="low-rank adapters, trained instead of the base's weights")


# ------------------------------------------------------------------------------------------- a run on its machines


@dataclass
class LaunchPretrainConfig(PretrainConfig):
    """Start a pretraining run on the machines of `cluster`."""

    dry_run: bool = key(False, help="write what would run, print it, and start nothing; also --dry-run")


@dataclass
class LaunchInstructConfig(InstructConfig):
    """Start an instruction-tuning run on the machines of `cluster`."""

    dry_run: bool = key(False, help="write what would run, print it, and start nothing; also --dry-run")


@dataclass
class LaunchPreflightConfig(PreflightConfig):
    """Check the machines of `cluster` before a run is started there."""

    dry_run: bool = key(False, help="write what would run, print it, and start nothing; also --dry-run")


@dataclass
class PlanConfig(PretrainConfig):
    """Memory, time and cost of a run, without its machines; instruction tuning is planned as training of its model."""

    lora: LoraConfig = section(LoraConfig, help="low-rank adapters, trained instead of all weights")
    format: str = key("table", help="what to print: table or json")
    picture: str | None = key(None, help="SVG file to write: memory by pipeline stage")


@dataclass
class PlanSearchConfig(PretrainConfig):
    """Every layout of a model on some accelerators, by predicted step time."""

    lora: LoraConfig = section(LoraConfig, help="low-rank adapters, trained instead of all weights")
    format: str = key("table", help="what to print: table or json")
    num_rows: int = key(10, help="layouts to print; a table's, JSON has all", unit="layouts")
