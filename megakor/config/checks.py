"""Every rule that a composed configuration must keep, field by field and across fields.

`check` runs once after composition and raises on the first broken rule, naming key, value and rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megakor.config.cluster_checks import check_cluster
from megakor.config.data_checks import check_data, check_pairs
from megakor.config.rules import divides, positive, require, share
from megakor.config.schema import (
    CheckpointListConfig,
    CheckpointPruneConfig,
    CheckpointVerifyConfig,
    CorpusConfig,
    DemoConfig,
    DrillConfig,
    EngineConfig,
    EvaluateConfig,
    GenerateConfig,
    ImportConfig,
    InstructConfig,
    LaunchInstructConfig,
    LaunchPreflightConfig,
    LaunchPretrainConfig,
    LoraConfig,
    ModelConfig,
    OnSpike,
    OptimizerName,
    ParallelConfig,
    PlanConfig,
    PlanSearchConfig,
    Precision,
    PreflightConfig,
    PretrainConfig,
    ShardConfig,
    SimulateConfig,
    TraceConfig,
    TrainConfig,
    TrainTokenizerConfig,
    TuneConfig,
)
from megakor.config.verb_checks import (
    check_checkpoint_list,
    check_checkpoint_prune,
    check_checkpoint_verify,
    check_corpus,
    check_demo,
    check_drill,
    check_evaluate,
    check_generate,
    check_import_config,
    check_shard,
    check_trace,
    check_train_tokenizer,
)

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "data_types": "train.precision",
    "gradient_clipping": "train.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}
"""Top-level DeepSpeed keys that megakor sets, and the key to use instead."""


def check_model(model: ModelConfig, prefix: str = "model") -> None:
    """The rules of an architecture."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                 "make_vocab_size_divisible_by", "max_position_embeddings", "initializer_range"):  # fmt: skip
        positive(f"{prefix}.{name}", getattr(model, name))
    heads = model.num_attention_heads
    require(
        model.hidden_size % heads == 0,
        f"{prefix}.hidden_size",
        model.hidden_size,
        f"be divisible by {prefix}.num_attention_heads={heads}",
    )
    share(f"{prefix}.rotary_pct", model.rotary_pct, low_open=True)
    for name in ("hidden_dropout", "attention_dropout"):
        share(f"{prefix}.{name}", getattr(model, name), high_open=True)
    head_dim = model.hidden_size // heads
    rotary_dim = int(head_dim * model.rotary_pct)
    require(
        rotary_dim > 0 and rotary_dim % 2 == 0,
        f"{prefix}.rotary_pct",
        model.rotary_pct,
        f"rotate an even, positive number of the {head_dim} dimensions of a head, not {rotary_dim}",
    )


def check_parallel(parallel: ParallelConfig, train: TrainConfig, optimizer: OptimizerName) -> None:
    """The rules of a layout that hold for any model and any number of processes."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "data_parallel_size"):
        positive(f"parallel.{name}", getattr(parallel, name))
    stage, stages = parallel.zero_stage, parallel.pipeline_parallel_size
    tensor, context = parallel.tensor_parallel_size, parallel.context_parallel_size
    require(stage in (0, 1, 2, 3), "parallel.zero_stage", stage, "be 0, 1, 2 or 3")
    if stages > 1:
        rule = f"be 1 with parallel.pipeline_parallel_size={stages}: DeepSpeed's pipeline keeps gradients whole"
        require(stage == 1, "parallel.zero_stage", stage, rule)
        rule = f"be 1 with parallel.pipeline_parallel_size={stages}: only a model without stages splits sequences"
        require(context == 1, "parallel.context_parallel_size", context, rule)
    if stage == 0:
        rule = "be 1 or more unless train.precision=fp32: ZeRO-0 is the fp32 reference"
        require(train.precision is Precision.fp32, "parallel.zero_stage", stage, rule)
        rule = f"be 1 or more with parallel.tensor_parallel_size={tensor}: ZeRO-0 is the reference of whole layers"
        require(tensor == 1, "parallel.zero_stage", stage, rule)
    if parallel.sequence_parallel:
        rule = "be false with parallel.tensor_parallel_size=1: tensor ranks are what splits the sequence"
        require(tensor > 1, "parallel.sequence_parallel", True, rule)
    for until, length in train.sequence_lengths.items():
        divides(f"train.sequence_lengths.{until}", length, f"train.sequence_length={train.sequence_length}",
                train.sequence_length)  # fmt: skip
    for length in (train.sequence_length, *train.sequence_lengths.values()):
        divides("parallel.context_parallel_size", context, f"train.sequence_length={length}", length)
        if parallel.sequence_parallel:
            what = f"train.sequence_length={length} / parallel.context_parallel_size={context} = {length // context}"
            divides("parallel.tensor_parallel_size", tensor, what, length // context)
    if parallel.offload_parameters:
        rule = f"be false with parallel.zero_stage={stage}: ZeRO-3 alone moves parameters; nearest: zero_stage=3"
        require(stage == 3, "parallel.offload_parameters", True, rule)
    if parallel.offload_optimizer:
        rule = "be false with parallel.zero_stage=0, which has no optimizer shards; nearest: parallel.zero_stage=1"
        require(stage > 0, "parallel.offload_optimizer", True, rule)
        rule = f"be false with parallel.pipeline_parallel_size={stages}: DeepSpeed's pipeline updates on the device"
        require(stages == 1, "parallel.offload_optimizer", True, rule)
        rule = "be false with optimizer.name=adafactor, whose sums over ranks are taken on the device"
        require(optimizer is OptimizerName.adamw, "parallel.offload_optimizer", True, rule)
    method = parallel.pipeline_partition
    require(
        method in ("parameters", "uniform") or method.startswith("type:"),
        "parallel.pipeline_partition",
        method,
        "be parameters, uniform or type:REGEX",
    )


def check_engine(config: EngineConfig) -> None:
    """The rules that every training verb shares."""
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    for name in ("num_steps", "global_batch_size", "micro_batch_size", "sequence_length"):
        positive(f"train.{name}", getattr(train, name))
    positive("train.clip_grad_norm", train.clip_grad_norm, allow_zero=True)
    for name in ("batch_sizes", "sequence_lengths"):
        for until, size in getattr(train, name).items():
            require(until > 0, f"train.{name}", until, "have keys above 0: the samples until which a size holds")
            positive(f"train.{name}.{until}", size)
    positive("train.activation_checkpointing_interval", train.activation_checkpointing_interval)
    check_parallel(config.parallel, train, optimizer.name)
    positive("optimizer.lr", optimizer.lr)
    positive("optimizer.eps", optimizer.eps)
    positive("optimizer.weight_decay", optimizer.weight_decay, allow_zero=True)
    share("optimizer.beta1", optimizer.beta1, high_open=True)
    share("optimizer.beta2", optimizer.beta2, high_open=True)
    for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
        share(f"schedule.{name}", getattr(schedule, name))
    check_survival(config)
    check_cluster(config)
    positive("evaluation.interval", config.evaluation.interval, allow_zero=True)
    positive("logging.interval", config.logging.interval)
    positive("logging.peak_tflops", config.logging.peak_tflops)
    check_deepspeed(config.deepspeed)


def check_survival(config: EngineConfig) -> None:
    """The rules of checkpoints, of steps that go wrong, and of starting again."""
    checkpoint, health = config.checkpoint, config.health
    for name in ("interval", "keep_last", "keep_every", "restart_interval"):
        positive(f"checkpoint.{name}", getattr(checkpoint, name), allow_zero=True)
    every = checkpoint.keep_every
    rule = "be 0 with checkpoint.interval=0, which saves nothing to keep"
    require(not every or checkpoint.interval > 0, "checkpoint.keep_every", every, rule)
    if every:
        divides("checkpoint.interval", checkpoint.interval, f"checkpoint.keep_every={every}", every)
    require(checkpoint.resume in ("auto", "never"), "checkpoint.resume", checkpoint.resume, "be auto or never")
    if checkpoint.upload is not None:
        rule = f"be a folder or an address other than run={config.run}"
        require(checkpoint.upload.strip() not in ("", config.run), "checkpoint.upload", checkpoint.upload, rule)
    for name in ("skip_limit", "spike_window", "spike_threshold", "hang_seconds"):
        positive(f"health.{name}", getattr(health, name))
    positive("launch.num_ranks", config.launch.num_ranks)
    positive("launch.restarts", config.launch.restarts, allow_zero=True)
    positive("launch.pause_seconds", config.launch.pause_seconds, allow_zero=True)
    for name in ("spike_skip", "roll_back_limit", "replica_check_interval"):
        positive(f"health.{name}", getattr(health, name), allow_zero=True)
    rule = "be below 1800: the process group gives a silent rank up then, and does not say which"
    require(health.hang_seconds is None or health.hang_seconds < 1800, "health.hang_seconds", health.hang_seconds, rule)
    rule = "be 0 with parallel.zero_stage=3, which leaves no replicas to compare"
    partitioned = config.parallel.zero_stage == 3
    require(not (partitioned and health.replica_check_interval), "health.replica_check_interval",
            health.replica_check_interval, rule)  # fmt: skip


def check_best(config: EngineConfig, names: list[str]) -> None:
    """Raise unless the set whose best checkpoint stays is one that is evaluated."""
    best = config.checkpoint.keep_best
    require(best is None or best in names, "checkpoint.keep_best", best, f"name one of the held-out sets: {names}")


def check_deepspeed(section: dict[str, Any]) -> None:
    """The pass-through section may not set what megakor sets."""
    for key, ours in OWNED_DEEPSPEED_KEYS.items():
        require(key not in section, f"deepspeed.{key}", section.get(key), f"be left out: megakor sets it from {ours}")
    for key, rule in {
        "stage": "be left out: megakor sets it from parallel.zero_stage",
        "compute_grad_norm": "be left out: megakor keeps it on, since steps whose norm is not finite are skipped",
    }.items():
        value = section.get("zero_optimization", {}).get(key)
        require(value is None, f"deepspeed.zero_optimization.{key}", value, rule)
    for key in ("pipe_partitioned", "grad_partitioned"):
        value = section.get("pipeline", {}).get(key)
        rule = "be left out: megakor keeps it off, since it would corrupt sequence-parallel activations"
        require(value is None, f"deepspeed.pipeline.{key}", value, rule)


def check_fit(config: EngineConfig, model: ModelConfig) -> None:
    """The rules between a run and its model; instruction tuning learns the model from its base checkpoint."""
    check_model(model)
    stages, layers = config.parallel.pipeline_parallel_size, model.num_hidden_layers
    rule = f"be at most model.num_hidden_layers={layers}"
    require(stages <= layers, "parallel.pipeline_parallel_size", stages, rule)
    tensor, context = config.parallel.tensor_parallel_size, config.parallel.context_parallel_size
    heads = model.num_attention_heads
    divides("parallel.tensor_parallel_size", tensor, f"model.num_attention_heads={heads}", heads)
    rows = "vocab_size" if model.vocab_size is not None else "make_vocab_size_divisible_by"
    for name in ("intermediate_size", rows):
        size = getattr(model, name)
        divides("parallel.tensor_parallel_size", tensor, f"model.{name}={size}", size)
    what = f"model.num_attention_heads={heads} / parallel.tensor_parallel_size={tensor} = {heads // tensor}"
    divides("parallel.context_parallel_size", context, what, heads // tensor)
    longest = model.max_position_embeddings
    rule = f"be at most model.max_position_embeddings={longest}"
    require(config.train.sequence_length <= longest, "train.sequence_length", config.train.sequence_length, rule)


def check_pretrain(config: PretrainConfig) -> None:
    check_engine(config)
    check_fit(config, config.model)
    check_data(config.data)
    check_best(config, list(config.data.validation))
    rule = "be off or warn with data.dataset: a stretch can be left out of shards alone"
    acts = config.health.on_spike is OnSpike.act
    require(not (acts and config.data.dataset), "health.on_spike", config.health.on_spike.value, rule)


def check_simulate(config: SimulateConfig) -> None:
    check_pretrain(config)
    positive("world_size", config.world_size)
    require(config.format in ("table", "json"), "format", config.format, "be table or json")


def check_lora(lora: LoraConfig) -> None:
    positive("lora.rank", lora.rank, allow_zero=True)
    positive("lora.alpha", lora.alpha)
    targets = [target.value for target in lora.targets]
    require(len(targets) == len(set(targets)) > 0, "lora.targets", targets, "name at least one linear, each once")


def check_plan(config: PlanConfig | PlanSearchConfig) -> None:
    """A plan looks at no data."""
    check_engine(config)
    check_fit(config, config.model)
    check_lora(config.lora)
    require(config.format in ("table", "json"), "format", config.format, "be table or json")


def check_plan_search(config: PlanSearchConfig) -> None:
    check_plan(config)
    positive("num_rows", config.num_rows)
    require(config.cluster.gpus is not None, "cluster.gpus", config.cluster.gpus, "be given: 256xa100-80g and the like")


def check_tune(config: TuneConfig) -> None:
    check_pretrain(config)
    rule = "name the accelerators, as many as there are, such as 8xa100-80g: the planner chooses what is tried"
    require(config.cluster.gpus is not None, "cluster.gpus", None, rule)
    for name in ("num_layouts", "num_steps"):
        positive(name, getattr(config, name))
    positive("warmup_steps", config.warmup_steps, allow_zero=True)
    require(config.format in ("table", "json"), "format", config.format, "be table or json")


def check_preflight(config: PreflightConfig) -> None:
    check_pretrain(config)
    require(config.format in ("table", "json"), "format", config.format, "be table or json")
    for name in ("wait_seconds", "watts"):
        positive(name, getattr(config, name))
    share("slow_below", config.slow_below, high_open=True)
    require((config.out is None) == (config.watts is None), "out", config.out, "come with watts, or neither")


def check_instruct(config: InstructConfig) -> None:
    check_engine(config)
    check_lora(config.lora)
    rule = "be {}: a pair stays whole"
    require(not config.train.sequence_lengths, "train.sequence_lengths", config.train.sequence_lengths, rule)
    check_pairs(config.pairs)
    check_best(config, ["pairs"])
    rule = "be off or warn: a stretch can be left out of pretraining shards alone"
    require(config.health.on_spike is not OnSpike.act, "health.on_spike", config.health.on_spike.value, rule)


CHECKS: dict[type, Callable[[Any], None]] = {
    CorpusConfig: check_corpus,
    TrainTokenizerConfig: check_train_tokenizer,
    ShardConfig: check_shard,
    PretrainConfig: check_pretrain,
    PreflightConfig: check_preflight,
    SimulateConfig: check_simulate,
    PlanConfig: check_plan,
    PlanSearchConfig: check_plan_search,
    TuneConfig: check_tune,
    InstructConfig: check_instruct,
    LaunchPretrainConfig: check_pretrain,
    LaunchInstructConfig: check_instruct,
    LaunchPreflightConfig: check_preflight,
    EvaluateConfig: check_evaluate,
    GenerateConfig: check_generate,
    ImportConfig: check_import_config,
    TraceConfig: check_trace,
    CheckpointListConfig: check_checkpoint_list,
    CheckpointVerifyConfig: check_checkpoint_verify,
    CheckpointPruneConfig: check_checkpoint_prune,
    DemoConfig: check_demo,
    DrillConfig: check_drill,
}


def check(config: Any) -> None:
    """Raise `ValueError` on the first rule that the configuration breaks."""
    rules = CHECKS.get(type(config))
    if rules is not None:
        rules(config)
