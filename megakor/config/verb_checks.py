"""The rules of the verbs that do not train."""

from __future__ import annotations

from pathlib import Path

from megakor.config.rules import positive, require, share
from megakor.config.schema import (
    CheckpointListConfig,
    CheckpointPruneConfig,
    CheckpointVerifyConfig,
    CorpusConfig,
    DemoConfig,
    DrillConfig,
    EvaluateConfig,
    GenerateConfig,
    ImportConfig,
    ShardConfig,
    TraceConfig,
    TrainTokenizerConfig,
)


def check_corpus(config: CorpusConfig) -> None:
    share("heldout_ratio", config.heldout_ratio, low_open=True, high_open=True)
    positive("max_bytes", config.max_bytes)


def check_train_tokenizer(config: TrainTokenizerConfig) -> None:
    require(bool(config.inputs), "inputs", config.inputs, "name at least one file or glob")
    positive("vocab_size", config.vocab_size)
    positive("max_bytes", config.max_bytes)
    positive("num_threads", config.num_threads)
    share("character_coverage", config.character_coverage, low_open=True)


def check_shard(config: ShardConfig) -> None:
    require(bool(config.inputs), "inputs", config.inputs, "name at least one file or glob")
    positive("shard_size", config.shard_size)
    positive("num_workers", config.num_workers)


def check_evaluate(config: EvaluateConfig) -> None:
    positive("cache_size", config.cache_size)
    positive("micro_batch_size", config.micro_batch_size)


def check_generate(config: GenerateConfig) -> None:
    given = [name for name in ("prompt", "question") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ValueError(f"either prompt= or question= must be given, not {' and '.join(given) or 'neither'}")
    require(not config.context or config.question is not None, "context", config.context, "come with a question")
    positive("max_new_tokens", config.max_new_tokens)
    positive("temperature", config.temperature, allow_zero=True)
    positive("num_samples", config.num_samples)
    share("top_p", config.top_p, low_open=True)


def check_import_config(config: ImportConfig) -> None:
    require(bool(config.path), "path", config.path, "name at least one file")
    positive("world_size", config.world_size)
    require(config.format in ("table", "json"), "format", config.format, "be table or json")


def check_trace(config: TraceConfig) -> None:
    given = [name for name in ("step", "document") if getattr(config, name) is not None] + ["spikes"] * config.spikes
    if len(given) != 1:
        raise ValueError(f"one of step=, document= and spikes=true must be given, not {' and '.join(given) or 'none'}")
    positive("step", config.step)
    positive("num_spikes", config.num_spikes)
    positive("around", config.around, allow_zero=True)
    require(config.format in ("table", "json"), "format", config.format, "be table or json")


def check_checkpoint_list(config: CheckpointListConfig) -> None:
    require(config.format in ("table", "json"), "format", config.format, "be table or json")


def check_checkpoint_verify(config: CheckpointVerifyConfig) -> None:
    positive("num_threads", config.num_threads)


def check_checkpoint_prune(config: CheckpointPruneConfig) -> None:
    positive("keep_last", config.keep_last, allow_zero=True)
    positive("keep_every", config.keep_every, allow_zero=True)
    for name in ("keep_every", "keep_best"):
        value = getattr(config, name)
        require(not value or config.keep_last > 0, name, value, "come with keep_last above 0; with 0 all stay")


def check_demo(config: DemoConfig) -> None:
    size = config.pipeline_parallel_size
    require(size in (1, 2), "pipeline_parallel_size", size, "be 1 or 2: the demo runs two processes")
    for name in ("max_bytes", "vocab_size", "num_steps", "instruct_steps"):
        positive(name, getattr(config, name))
    run = Path(config.run).resolve()
    require(run not in (Path.cwd(), *Path.cwd().parents), "run", config.run, "be a folder of its own")


def check_drill(config: DrillConfig) -> None:
    positive("faults", config.faults)
    positive("patience_seconds", config.patience_seconds)
    even = config.num_ranks > 0 and config.num_ranks % 2 == 0
    require(even, "num_ranks", config.num_ranks, "be an even number: layouts of two ranks are tried")
    require((config.data is None) == (config.tokenizer is None), "data", config.data, "come with tokenizer, or neither")
    run = Path(config.run).resolve()
    require(run not in (Path.cwd(), *Path.cwd().parents), "run", config.run, "be a folder of its own")
