"""The verbs in the order of the arc: name, schema and what each does. Some have subverbs, a second word each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from megakor.config import schema


@dataclass(frozen=True)
class Verb:
    """A verb of the command line, such as `export` or `checkpoint list`; `module` is also runnable by `python -m`."""

    name: str
    schema: type
    summary: str

    @property
    def module(self) -> str:
        """Subverbs share their verb's; its `run` tells them apart by the configuration's type."""
        return "megakor." + self.name.partition(" ")[0].replace("-", "_")

    @property
    def config_name(self) -> str:
        """Name of the verb's YAML."""
        return self.name.replace(" ", "-")

    @property
    def groups(self) -> tuple[str, ...]:
        """Config groups that the verb composes."""
        if not issubclass(self.schema, schema.EngineConfig):
            return ()
        model = ("model",) if issubclass(self.schema, schema.PretrainConfig) else ()
        return ("experiment", *model, "cluster")

    def owns_experiment(self, experiment: str) -> bool:
        """Whether a named run belongs to this verb: those of `instruct` begin with its name."""
        return experiment.startswith("instruct_") == self.name.endswith("instruct")


VERBS = {
    verb.name: verb
    for verb in (
        Verb("corpus", schema.CorpusConfig, "gather raw text into one corpus with a held-out split"),
        Verb("train-tokenizer", schema.TrainTokenizerConfig, "train a SentencePiece tokenizer"),
        Verb("shard", schema.ShardConfig, "tokenise text into Megatron .bin/.idx shards"),
        Verb("preflight", schema.PreflightConfig, "check the machines of a run on all ranks, before it is built"),
        Verb("pretrain", schema.PretrainConfig, "train a model from scratch with DeepSpeed"),
        Verb(
            "launch pretrain",
            schema.LaunchPretrainConfig,
            "pretrain on one machine or many, started again after failures",
        ),
        Verb("launch instruct", schema.LaunchInstructConfig, "the same for instruct"),
        Verb("launch preflight", schema.LaunchPreflightConfig, "preflight on the machines of a cluster"),
        Verb("simulate", schema.SimulateConfig, "parameters, communication and memory of a layout, on fake tensors"),
        Verb("plan", schema.PlanConfig, "memory, time and cost of a run, without its machines"),
        Verb("plan search", schema.PlanSearchConfig, "the layouts that fit some accelerators, by predicted step time"),
        Verb("tune", schema.TuneConfig, "measure the planner's best layouts with real steps, and write the fastest"),
        Verb("trace", schema.TraceConfig, "which documents made a step, and which steps saw a document"),
        Verb("instruct", schema.InstructConfig, "go on from a checkpoint with instruction pairs"),
        Verb("checkpoint list", schema.CheckpointListConfig, "the checkpoints of a run, and whether they are whole"),
        Verb("checkpoint verify", schema.CheckpointVerifyConfig, "check every byte of a run's checkpoints"),
        Verb("checkpoint prune", schema.CheckpointPruneConfig, "remove checkpoints of a run that is not going on"),
        Verb("checkpoint export-universal", schema.ExportUniversalConfig, "write DeepSpeed's universal checkpoint"),
        Verb("export", schema.ExportConfig, "write a checkpoint as a Hugging Face folder and check it"),
        Verb("evaluate", schema.EvaluateConfig, "bits per byte on held-out text, beside simple models"),
        Verb("generate", schema.GenerateConfig, "continue a prompt or answer a question"),
        Verb("import-model", schema.ImportModelConfig, "read a Hugging Face model as a run, from safetensors alone"),
        Verb("import-config", schema.ImportConfig, "write GPT-NeoX's configuration as an experiment of ours"),
        Verb("report", schema.ReportConfig, "one self-contained HTML page about a run"),
        Verb("drill", schema.DrillConfig, "disturb a short training again and again, and see what is lost"),
        Verb("demo", schema.DemoConfig, "the whole arc on two processes"),
    )
}


def subverbs(word: str) -> list[Verb]:
    """The verbs that begin with this word and have another; empty for a verb that stands alone."""
    return [verb for verb in VERBS.values() if verb.name.startswith(f"{word} ")]


def find_verb(arguments: Sequence[str]) -> tuple[Verb, list[str]]:
    """The verb that a command line begins with, and what follows it.

    `launch` alone launches the verb that its experiment belongs to.

    Raises:
        ValueError: there is no such verb, or it needs a subverb and has none, or one that does not exist.
    """
    first, *rest = arguments
    if rest and f"{first} {rest[0]}" in VERBS:
        return VERBS[f"{first} {rest[0]}"], rest[1:]
    if first in VERBS:
        return VERBS[first], rest
    if first == "launch" and (not rest or rest[0].startswith("-") or "=" in rest[0]):
        experiment = next((word.partition("=")[2] for word in rest if word.startswith("experiment=")), "")
        verbs = [verb for verb in subverbs(first) if verb.owns_experiment(experiment)]
        return verbs[0], rest
    below = [verb.name.partition(" ")[2] for verb in subverbs(first)]
    if not below:
        names = list(dict.fromkeys(name.partition(" ")[0] for name in VERBS))
        raise ValueError(f"verb {first} must be one of {', '.join(names)}{_nearest(first, names)}")
    second = rest[0] if rest else ""
    if not second or "=" in second or second.startswith("-"):
        raise ValueError(f"verb {first} must be followed by one of {', '.join(below)}")
    raise ValueError(f"subverb {second} of {first} must be one of {', '.join(below)}{_nearest(second, below)}")


def _nearest(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f"; nearest: {near[0]}" if near else ""
