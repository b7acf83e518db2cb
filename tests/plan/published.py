"""Published speeds of training: each row is a run that somebody measured, and how the plan describes it.

No row has a factor of its own. What a source does not say is marked as assumed in the row.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from megakor.config.choices import ActivationCheckpointing, Precision
from megakor.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.hardware import Hardware, find_hardware
from megakor.plan.time import StepTime, step_time
from megakor.plan.work import Practice

FULL, SELECTIVE, NONE = (
    ActivationCheckpointing.full,
    ActivationCheckpointing.selective,
    ActivationCheckpointing.none,
)


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        source: who measured it.
        name: of the run.
        gpus: how many of the hardware.
        published: model FLOPs utilization, %; hardware FLOPs utilization where `of_hardware`.
        assumed: what the source does not say.
        fitted: whether constants were fitted on it (`tests.plan.fit`).
        network_gb_per_s: of its nodes, where they are not the hardware file's.
    """

    source: str
    name: str
    model: ModelConfig
    parallel: ParallelConfig
    train: TrainConfig
    hardware: str
    gpus: int
    practice: Practice
    published: float
    of_hardware: bool = False
    assumed: str = ""
    fitted: bool = False
    network_gb_per_s: float | None = None

    def step(self, hardware: Hardware | None = None) -> StepTime:
        """The plan's step, on the row's hardware or as if on another."""
        hardware = hardware or find_hardware(self.hardware)
        if self.network_gb_per_s is not None:
            hardware = replace(hardware, network_gb_per_s=self.network_gb_per_s)
        dims = ParallelDims.from_config(self.parallel, self.gpus)
        return step_time(self.model, self.parallel, self.train, dims, hardware, practice=self.practice)

    def predicted(self, hardware: Hardware | None = None) -> float:
        """What the plan says, %."""
        step = self.step(hardware)
        return 100 * (step.hfu if self.of_hardware else step.mfu)

    @property
    def difference(self) -> float:
        """Predicted over published, less one, %."""
        return 100 * (self.predicted() / self.published - 1)


def gpt(hidden: int, layers: int, heads: int, vocabulary: int = 51200) -> ModelConfig:
    """A GPT-3 model: blocks one part after the other, learned positions, tied embeddings."""
    return ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
        rotary_pct=0.0,
        use_parallel_residual=False,
        tie_word_embeddings=True,
    )


def train_config(
    batch: int, micro_batch: int, checkpointing: ActivationCheckpointing, length: int = 2048, half: bool = False
) -> TrainConfig:
    return TrainConfig(
        num_steps=1,
        global_batch_size=batch,
        micro_batch_size=micro_batch,
        sequence_length=length,
        precision=Precision.fp16 if half else Precision.bf16,
        activation_checkpointing=checkpointing,
    )


MEGATRON = Practice(
    fused_attention=False, hides_tensor_messages=False, hides_replica_messages=(), stops_early=False, copies=False
)
"""Megatron-LM of 2021: PyTorch's data parallelism after the last micro-batch, scores in memory."""

FITTED_LENGTHS = (1024, 4096, 16384)

KORTHIKANTI = "Korthikanti et al. 2022"
NARAYANAN = "Narayanan et al. 2021, table 1"


def korthikanti() -> list[Row]:
    """Megatron-LM with tensor and sequence parallelism: full recomputation without the latter, selective with it.

    Utilization of the full rows: that of the selective row by both iteration times.
    """
    sizes = {  # hidden, layers, heads, pipeline, interleaved, batch, micro-batch, seconds (full, selective), MFU
        "22B": (6144, 48, 64, 1, 1, 4, 4, 1.42, 1.10, 41.5),
        "175B": (12288, 96, 96, 8, 3, 64, 1, 18.13, 13.75, 51.4),
        "530B": (20480, 105, 128, 35, 3, 280, 1, 49.05, 37.83, 56.0),
        "1T": (25600, 128, 160, 64, 1, 512, 1, 94.42, 71.49, 56.3),
    }
    rows = []
    for name, (hidden, layers, heads, stages, parts, batch, micro, full, selective, mfu) in sizes.items():
        runs = [(SELECTIVE, mfu, 1), (FULL, mfu * selective / full, 1)]
        if name == "530B":
            runs += [(SELECTIVE, 54.2, 8), (FULL, 42.1, 8)]  # the abstract's, on 2,240 GPUs
        for kind, published, replicas in runs:
            parallel = ParallelConfig(
                tensor_parallel_size=8,
                pipeline_parallel_size=stages,
                sequence_parallel=kind is SELECTIVE,
                zero_stage=0,
            )
            practice = replace(MEGATRON, virtual_stages=parts, hides_tensor_messages=True, sends_parts=True)
            train = train_config(batch * replicas, micro, kind, half=True)
            run = f"{name}, {8 * stages * replicas} a100-80g, {kind.value}"
            rows.append(
                Row(KORTHIKANTI, run, gpt(hidden, layers, heads), parallel, train, "a100-80g", 8 * stages * replicas,
                    practice, published)
            )  # fmt: skip
    return rows


def narayanan() -> list[Row]:
    """Megatron-LM's weak scaling; utilization of hardware FLOPs, recomputation counted.

    Micro-batches and interleaving: examples/academic_paper_scripts/sc21/run_table_1.sh of its repository.
    """
    sizes = {  # hidden, layers, heads, tensor, pipeline, interleaved, GPUs, batch, micro-batch, TFLOP/s
        "1.7B": (2304, 24, 24, 1, 1, 1, 32, 512, 16, 137),
        "3.6B": (3072, 30, 32, 2, 1, 1, 64, 512, 16, 138),
        "7.5B": (4096, 36, 32, 4, 1, 1, 128, 512, 16, 142),
        "18.4B": (6144, 40, 48, 8, 1, 1, 256, 1024, 8, 135),
        "39.1B": (8192, 48, 64, 8, 2, 1, 512, 1536, 4, 138),
        "76.1B": (10240, 60, 80, 8, 4, 3, 1024, 1792, 2, 140),
        "145.6B": (12288, 80, 96, 8, 8, 2, 1536, 2304, 2, 148),
        "310.1B": (16384, 96, 128, 8, 16, 2, 1920, 2160, 1, 155),
        "529.6B": (20480, 105, 128, 8, 35, 3, 2520, 2520, 1, 163),
        "1008.0B": (25600, 128, 160, 8, 64, 1, 3072, 3072, 1, 163),
    }
    return [
        Row(NARAYANAN, f"{name}, {gpus} a100-80g", gpt(hidden, layers, heads),
            ParallelConfig(tensor_parallel_size=tensor, pipeline_parallel_size=stages, zero_stage=0),
            train_config(batch, micro, FULL, half=True), "a100-80g", gpus,
            replace(MEGATRON, virtual_stages=parts, sends_parts=True),
            100 * tflops / 312, of_hardware=True, fitted=index % 2 == 0)
        for index, (name, (hidden, layers, heads, tensor, stages, parts, gpus, batch, micro, tflops))
        in enumerate(sizes.items())
    ]  # fmt: skip


def llm_foundry() -> list[Row]:
    """MPT models under FSDP: the tables of scripts/train/benchmarking/README.md, from 1B parameters on, without FP8."""
    sizes = {
        "1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56),
        "70b": (8192, 80, 64),
    }  # fmt: skip
    rows = []
    for run in csv.DictReader(Path(__file__).with_name("llm_foundry.csv").read_text().splitlines()):
        gpus, micro, count = int(run["gpus"]), int(run["micro_batch"]), int(run["micro_batches"])
        checkpointing = FULL if run["checkpointing"] == "true" else NONE
        newer = run["mixed_precision"] == "DEFAULT"
        train = train_config(gpus * micro * count, micro, checkpointing, int(run["sequence_length"]))
        practice = Practice(hides_replica_messages=(2, 3), stops_early=newer, wide_gradients=newer, copies=False)
        rows.append(
            Row("LLM-Foundry", f"{run['model']}, {train.sequence_length} tokens, {gpus} {run['hardware']}",
                gpt(*sizes[run["model"]], vocabulary=50368),
                ParallelConfig(zero_stage=3 if run["sharding"] == "FULL_SHARD" else 2), train, run["hardware"], gpus,
                practice, float(run["mfu"]),
                fitted=gpus == 8 and run["hardware"] != "a100-40g" and train.sequence_length in FITTED_LENGTHS,
                assumed="" if checkpointing is NONE else
                "PyTorch 2.1, whose recomputation stops early" if newer else "PyTorch before 2.1, which recomputes all")
        )  # fmt: skip
    return rows


def others() -> list[Row]:
    """GPT-NeoX-20B and TinyLlama."""
    neox = replace(gpt(6144, 44, 64, 50432), use_parallel_residual=True, tie_word_embeddings=False, rotary_pct=0.25)
    # What the code of February 2022 counted for a token: 6 N + 60 L·H·T. The paper's 117 TFLOP/s are of that.
    counted = 6 * 20_556_201_984 + 60 * 44 * 6144 * 2048
    useful = 6 * (20_556_201_984 - 50432 * 6144) + 12 * 44 * 6144 * 2048
    # Linear layers of TinyLlama (22 layers; 32 heads, 4 of keys; gated 5,632): 21,504 × 2,048 weights a layer, as here.
    tiny = replace(gpt(2048, 22, 32, 32000), intermediate_size=6656, tie_word_embeddings=False, rotary_pct=1.0)
    fsdp = Practice(hides_replica_messages=(2, 3), stops_early=False, copies=False)
    lit = "the attention of 4 key heads and the gated feed-forward as a GPT-NeoX block with as many FLOPs"
    return [
        Row("GPT-NeoX-20B (Black et al. 2022)", "20B, 96 a100-40g", neox,
            ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=4), train_config(1536, 4, FULL, half=True),
            "a100-40g", 96, MEGATRON, 100 * 117 / 312 * useful / counted, network_gb_per_s=12.5),
        Row("TinyLlama", "1.1B, 16 a100-40g", tiny, ParallelConfig(zero_stage=2), train_config(1024, 8, NONE),
            "a100-40g", 16, fsdp, 56.0, assumed=f"on 16, sharding as ZeRO-2; {lit}"),
        Row("TinyLlama", "1.1B, 64 a100-40g", tiny, ParallelConfig(zero_stage=3), train_config(512, 4, NONE),
            "a100-40g", 64, fsdp, 52.0, assumed=f"on 64, A100s of 40 GB; {lit}"),
    ]  # fmt: skip


def rows() -> list[Row]:
    """All of them."""
    return [*korthikanti(), *narayanan(), *llm_foundry(), *others()]
