"""The verbs in the order of the arc: name, schema and what each does."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config import schema


@dataclass(frozen=True)
class Verb:
    """A verb of the command line; `module` is also runnable by `python -m`."""

    name: str
    schema: type
    summary: str

    @property
    def module(self) -> str:
        return "megakor." + self.name.replace("-", "_")

    @property
    def groups(self) -> tuple[str, ...]:
        """Config groups that the verb composes."""
        run = ("experiment", "model")
        return {"pretrain": run, "simulate": run, "instruct": ("experiment",)}.get(self.name, ())

    def owns_experiment(self, experiment: str) -> bool:
        """Whether a named run belongs to this verb: those of `instruct` begin with its name."""
        return experiment.startswith("instruct_") == (self.name == "instruct")


VERBS = {
    verb.name: verb
    for verb in (
        Verb("corpus", schema.CorpusConfig, "gather raw text into one corpus with a held-out split"),
        Verb("train-tokenizer", schema.TrainTokenizerConfig, "train a SentencePiece tokenizer"),
        Verb("shard", schema.ShardConfig, "tokenise text into Megatron .bin/.idx shards"),
        Verb("pretrain", schema.PretrainConfig, "train a model from scratch with DeepSpeed"),
        Verb("simulate", schema.SimulateConfig, "parameters, communication and memory of a layout, on fake tensors"),
        Verb("trace", schema.TraceConfig, "which documents made a step, and which steps saw a document"),
        Verb("instruct", schema.InstructConfig, "go on from a checkpoint with instruction pairs"),
        Verb("export", schema.ExportConfig, "write a checkpoint as a Hugging Face folder and check it"),
        Verb("evaluate", schema.EvaluateConfig, "bits per byte on held-out text, beside simple models"),
        Verb("generate", schema.GenerateConfig, "continue a prompt or answer a question"),
        Verb("report", schema.ReportConfig, "one self-contained HTML page about a run"),
        Verb("drill", schema.DrillConfig, "disturb a short training again and again, and see what is lost"),
        Verb("demo", schema.DemoConfig, "the whole arc on two processes"),
    )
}
