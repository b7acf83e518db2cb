"""The arc: text in; a tokenizer, shards, a trained and resumed model, a tuned one, exports and a report out.

Each stage is a command that a user could type, and is timed. What came out is in `summary.json`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megakor.config.schema import DemoConfig, GenerateConfig, PairsConfig
from megakor.demo.commands import output, override, run, run_and_kill, verb
from megakor.generate.speaker import Speaker
from megakor.instruct.pairs import Pair, read_pairs, split
from megakor.launch.command import launched
from megakor.logs import get_logger
from megakor.train.metrics import read_metrics

log = get_logger(__name__)

NUM_RANKS = 2

MARKER = "demo.json"
SUMMARY = "summary.json"
SAMPLES = "samples.json"
NUM_SAMPLES = 3
PROMPT_CHARACTERS = 24


class Arc:
    """One run of the demo.

    Args:
        config: the demo's section.
        num_steps: pretraining steps.
        interval: steps between two checkpoints.
    """

    def __init__(self, config: DemoConfig, num_steps: int, interval: int) -> None:
        self.config, self.num_steps, self.interval = config, num_steps, min(interval, max(1, num_steps // 2))
        self.folder = Path(config.run)
        self.seconds: dict[str, float] = {}
        self.figures: dict[str, Any] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        log.info("── %s", name)
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)

    def path(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))

    def run(self) -> dict[str, Any]:
        """The whole arc; returns the summary."""
        self.make_folder()
        self.make_data()
        self.pretrain()
        self.evaluate_and_instruct()
        self.export()
        self.speak()
        return self.summarise()

    def make_folder(self) -> None:
        """An empty folder of our own: an earlier demo is replaced, anything else is refused."""
        if self.folder.exists():
            if any(self.folder.iterdir()) and not (self.folder / MARKER).is_file():
                raise ValueError(f"run={self.folder} must be new, empty or an earlier demo's folder")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        (self.folder / MARKER).write_text(json.dumps({"corpus": self.config.corpus}, ensure_ascii=False) + "\n")

    def make_data(self) -> None:
        """Corpus, tokenizer, shards."""
        config, corpus = self.config, self.path("corpus")
        text = {side: f"{corpus}/{side}.jsonl" for side in ("train", "heldout")}
        cap = {} if config.max_bytes is None else {"max_bytes": config.max_bytes}
        inputs = {"inputs": config.corpus} if config.corpus else {}
        with self.stage("corpus"):
            run(verb("corpus", out=corpus, **inputs, **cap))
        with self.stage("tokenizer"):
            size = {} if config.vocab_size is None else {"vocab_size": config.vocab_size}
            run(verb("train-tokenizer", inputs=text["train"], out=self.path("tokenizer"), **size))
        with self.stage("shards"):
            tokenizer = self.path("tokenizer")
            run(
                *(
                    verb("shard", inputs=file, tokenizer=tokenizer, out=self.path("shards", side))
                    for side, file in text.items()
                )
            )

    def pretrain(self) -> None:
        """Train, SIGKILL in the middle, go on by the same command; compare the steps that were taken twice."""
        overrides = [
            "experiment=demo",
            override("run", self.path("pretrain")),
            override("data.train", self.path("shards", "train")),
            override("data.validation.heldout", self.path("shards", "heldout")),
            override("data.tokenizer", self.path("tokenizer")),
            override("train.num_steps", self.num_steps),
            override("checkpoint.interval", self.interval),
            override("evaluation.interval", self.interval),
            override("parallel.pipeline_parallel_size", self.config.pipeline_parallel_size),
            *self.config.training,
        ]
        folder = self.folder / "pretrain"
        saved = self.interval * max(1, self.num_steps // self.interval // 2)
        last_before_kill = min(saved + max(1, self.interval // 4), self.num_steps - 1)
        with self.stage("pretrain"):
            killed_at = run_and_kill(launched("pretrain", NUM_RANKS, overrides), folder, last_before_kill)
        log.info("killed every process with SIGKILL at step %d; the same command goes on", killed_at)
        with self.stage("resume"):
            run(launched("pretrain", NUM_RANKS, overrides))
        self.figures |= training_figures(folder) | resume_figures(folder)

    def evaluate_and_instruct(self) -> None:
        """Measure bits per byte, and tune on the sample's pairs: the launcher takes a while to start on one core."""
        shards = {"heldout": self.path("shards", "heldout"), "train": self.path("shards", "train")}
        overrides = [
            "experiment=instruct_demo",
            override("base", self.path("pretrain")),
            override("tokenizer", self.path("tokenizer")),
            override("run", self.path("instruct")),
            override("parallel.pipeline_parallel_size", self.config.pipeline_parallel_size),
            *self.config.training,
        ]
        if self.config.instruct_steps is not None:
            overrides.append(override("train.num_steps", self.config.instruct_steps))
        with self.stage("evaluate, instruct"), ThreadPoolExecutor(1) as beside:
            evaluation = beside.submit(output, verb("evaluate", run=self.folder / "pretrain", **shards))
            run(launched("instruct", NUM_RANKS, overrides))
        for name in ("bits_per_byte", "order0_bits_per_byte", "unigram_bits_per_byte"):
            self.figures[name] = evaluation.result()[name]
        figures = training_figures(self.folder / "instruct")
        self.figures |= {f"instruct_{name}": figures[name] for name in ("first_loss", "last_loss")}

    def export(self) -> None:
        """Both models as Hugging Face folders; the command fails if the self-check does."""
        with self.stage("export"):
            names = ("pretrain", "instruct")
            run(*(verb("export", run=self.path(name), out=self.path("export", name)) for name in names))
        checks = [
            json.loads((self.folder / "export" / name / "megakor_export.json").read_text(encoding="utf-8"))
            for name in names
        ]
        self.figures["export_max_logit_difference"] = max(check["max_logit_difference"] for check in checks)

    def speak(self) -> None:
        """Three continuations of held-out beginnings, three answers to held-out questions."""
        with self.stage("samples"):
            lines = (self.folder / "corpus" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
            prompts = [json.loads(line)["text"][:PROMPT_CHARACTERS] for line in lines[:NUM_SAMPLES]]
            _, held_out = split(read_pairs(PairsConfig()), PairsConfig().validation_ratio)
            base, tuned = (Speaker.load(self.folder / name) for name in ("pretrain", "instruct"))
            continuations = [
                {"prompt": prompt, "text": base.generate(GenerateConfig(run=self.path("pretrain"), prompt=prompt))[0]}
                for prompt in prompts
            ]
            answers = [
                {"question": pair.question, "context": pair.context, "answer": self.answer(tuned, pair)}
                for pair in held_out[:NUM_SAMPLES]
            ]
        samples = {"continuations": continuations, "answers": answers}
        (self.folder / SAMPLES).write_text(json.dumps(samples, ensure_ascii=False, indent=1), encoding="utf-8")
        for sample in continuations:
            log.info("%s ▸ %s", sample["prompt"], " ".join(sample["text"].split()))
        for sample in answers:
            log.info("%s ▸ %s", sample["question"], " ".join(sample["answer"].split()))

    def answer(self, speaker: Speaker, pair: Pair) -> str:
        """What the tuned model says to a held-out question."""
        return speaker.generate(
            GenerateConfig(run=self.path("instruct"), question=pair.question, context=pair.context)
        )[0]

    def summarise(self) -> dict[str, Any]:
        """Write the summary, and the report over everything."""
        corpus = json.loads((self.folder / "corpus" / "corpus.json").read_text(encoding="utf-8"))
        meta = json.loads((self.folder / "tokenizer" / "tokenizer.meta.json").read_text(encoding="utf-8"))
        summary = {
            "seconds": self.seconds | {"total": round(sum(self.seconds.values()), 2)},
            "corpus_documents": corpus["documents"],
            "corpus_bytes": corpus["bytes"],
            "vocab_size": meta["vocab_size"],
            **self.figures,
        }
        (self.folder / SUMMARY).write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        run(verb("report", run=self.folder))
        return summary


def training_figures(folder: Path) -> dict[str, float]:
    """First and last loss, and median speed, of a training run."""
    steps = [record for record in read_metrics(folder) if record["kind"] == "train"]
    return {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
        "mfu": statistics.median(step["mfu"] for step in steps),
    }


def resume_figures(folder: Path) -> dict[str, Any]:
    """Compare the steps that were taken before the kill and again after the resume, bit by bit.

    The attempt that was killed had run past its last checkpoint without interruption; the second attempt took those
    steps again from that checkpoint.
    """
    attempts: dict[int, dict[int, tuple[float, float]]] = {}
    for record in read_metrics(folder):
        if record["kind"] == "train":
            attempts.setdefault(record["attempt"], {})[record["step"]] = (record["loss"], record["grad_norm"])
    before, after = attempts[1], attempts[2]
    twice = sorted(before.keys() & after.keys())
    return {
        "killed_at_step": max(before),
        "resumed_from_step": min(after) - 1,
        "steps_compared": len(twice),
        "resume_bitwise_equal": bool(twice) and all(before[step] == after[step] for step in twice),
    }
