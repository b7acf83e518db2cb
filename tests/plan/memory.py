"""Published memory of training: formulas and figures of others on one side, the plan's on the other.

Activations are Korthikanti et al.'s of one layer, for layouts that megakor has as well: where scores are computed
again, both keep the same tensors. Figures of nvidia-smi include what the allocator keeps and its gaps: a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.choices import ActivationCheckpointing
from megakor.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megakor.model.specs import num_parameters
from megakor.parallel.dims import ParallelDims
from megakor.plan.activations import Block, activations
from megakor.plan.memory import LIBRARIES, stage_memory
from megakor.plan.partition import layers_of, partition
from tests.plan.published import FULL, NONE, SELECTIVE, gpt, train_config

MIB = 2**20
LISTED = 74053 * MIB
"""KoAlpaca's 12.8B: the first GPU in the listing of nvidia-smi."""


@dataclass(frozen=True)
class MemoryRow:
    """A figure of memory; bytes.

    Attributes:
        bound: whether what was measured includes the allocator's cache: a prediction of 0.75 to 1.0 of it passes.
        how: how the plan describes it.
    """

    source: str
    name: str
    published: float
    predicted: float
    how: str
    bound: bool = False

    @property
    def difference(self) -> float:
        """Predicted over published, less one, %."""
        return 100 * (self.predicted / self.published - 1)


def engine_config(
    parallel: ParallelConfig, micro_batch: int, checkpointing: ActivationCheckpointing, length: int = 2048
) -> EngineConfig:
    train = train_config(micro_batch, micro_batch, checkpointing, length, half=True)
    return EngineConfig(run="", parallel=parallel, train=train, optimizer=OptimizerConfig(lr=1e-4))


def layer_bytes(model: ModelConfig, parallel: ParallelConfig, micro_batch: int, kind: ActivationCheckpointing) -> int:
    """What a block keeps of a micro-batch, its input included."""
    config = engine_config(parallel, micro_batch, kind)
    block = Block.of(config, model, ParallelDims.from_config(parallel, parallel.tensor_parallel_size), None)
    return block.stream + (0 if kind is FULL else block.kept(scores=kind is not SELECTIVE))


def korthikanti() -> list[MemoryRow]:
    """Activations of a layer on one of 8 tensor ranks: table 2 of Korthikanti et al. 2022, with dropout of 0.1."""
    rows = []
    sizes = {"22B": (6144, 64, 4), "175B": (12288, 96, 1), "530B": (20480, 128, 1), "1T": (25600, 160, 1)}
    for name, (hidden, heads, micro_batch) in sizes.items():
        model = gpt(hidden, 1, heads)
        model.hidden_dropout = 0.1
        states = 2048 * micro_batch * hidden
        for layout, formula, bytes_of_states, sequence_parallel, kind in (
            ("tensor, selective", "s·b·h·(10 + 24/t)", 10 + 24 / 8, False, SELECTIVE),
            ("tensor and sequence, selective", "s·b·h·34/t", 34 / 8, True, SELECTIVE),
            ("full", "2·s·b·h", 2, False, FULL),
        ):
            parallel = ParallelConfig(tensor_parallel_size=8, sequence_parallel=sequence_parallel)
            predicted = layer_bytes(model, parallel, micro_batch, kind)
            rows.append(
                MemoryRow(
                    "Korthikanti et al. 2022, table 2",
                    f"{name}, {layout}: {formula}",
                    bytes_of_states * states,
                    predicted,
                    "a block's activations",
                )
            )
    return rows


POLYGLOT = {
    "1.3B": ModelConfig(2048, 24, 16, 8192, 30080, rotary_pct=0.5),
    "3.8B": ModelConfig(3072, 32, 24, 12288, 30080, rotary_pct=0.5),
    "5.8B": ModelConfig(4096, 28, 16, 16384, 30080, rotary_pct=0.25),
    "12.8B": ModelConfig(5120, 40, 40, 20480, 30080, rotary_pct=0.5),
}


def unfused_scores(model: ModelConfig, micro_batch: int, length: int, num_bytes: int) -> int:
    """What attention that is not fused keeps of its scores, bytes, at so many for each."""
    return model.num_hidden_layers * model.num_attention_heads * micro_batch * length**2 * num_bytes


def koalpaca() -> list[MemoryRow]:
    """KoAlpaca's full fine-tunings with Hugging Face's trainer, as nvidia-smi shows them."""
    alone, model = ParallelConfig(), POLYGLOT["5.8B"]
    config = engine_config(alone, 2, NONE)
    dims = ParallelDims.from_config(alone, 1)
    (stage,) = partition(layers_of(model), "parameters", 1, 1)
    weights = 2 * 2 * num_parameters(model)  # and gradients, fp16; Adafactor's moments are factored
    states = 2048 * 2 * model.hidden_size
    norms = model.num_hidden_layers * 2 * 4 * states
    predicted = (
        weights + activations(config, model, dims, stage).peak + unfused_scores(model, 2, 2048, 6) + norms + LIBRARIES
    )
    alone_row = MemoryRow(
        "KoAlpaca",
        "5.8B, one A100-80G, Adafactor, 2 × 2,048 tokens",
        69061 * MIB,
        predicted,
        "weights and gradients in fp16 without masters, activations as planned; assumed of autocast: scores in fp32 "
        "and fp16, norms' inputs in fp32",
        bound=True,
    )
    four_row = MemoryRow(
        "KoAlpaca",
        "12.8B, 4 × A100-80G, ZeRO-3, 1 × 1,024 tokens",
        LISTED,
        zero_3(4),
        "as planned, and scores in fp16, which megakor does not keep",
        bound=True,
    )
    return [alone_row, four_row]


def zero_3(ranks: int) -> int:
    """12.8B under ZeRO-3, with scores that go through memory."""
    parallel, model = ParallelConfig(zero_stage=3), POLYGLOT["12.8B"]
    config = engine_config(parallel, 1, NONE, 1024)
    config.train.global_batch_size = ranks * 64
    config.deepspeed = {"zero_optimization": {"reduce_bucket_size": model.hidden_size**2}}  # what `auto` is
    (stage,) = partition(layers_of(model), "parameters", 1, 1)
    planned = stage_memory(config, model, ParallelDims.from_config(parallel, ranks), stage)
    return planned.total + unfused_scores(model, 1, 1024, 2)


def of_eight() -> float:
    """What eight ranks take of the listed figure, by the plan."""
    return zero_3(8) / LISTED


def rows() -> list[MemoryRow]:
    """All of them."""
    return [*korthikanti(), *koalpaca()]
