"""A whole layout, stage by stage: a configuration goes in, what a rank of every stage holds, says and keeps comes out.

Ranks of one stage differ in their data, context and tensor positions, and their figures are the same: tensor shards are
equal, and the first tensor rank, which is run, has the most columns of the true vocabulary in its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megakor.config.schema import EngineConfig, ModelConfig, SimulateConfig
from megakor.model.specs import EMBEDDING, HEAD, num_parameters, parameter_specs, resolve_vocabulary
from megakor.parallel.dims import ParallelDims, smallest_world_size
from megakor.plan.memory import state_bytes
from megakor.plan.partition import prefix_of, words
from megakor.plan.traffic import FP32, Traffic, replica_traffic
from megakor.simulate.stage import Pass, build_quietly, fake_rank, run_pass
from megakor.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage; sizes in bytes.

    Attributes:
        holds: its layers, in words.
        parameters: elements of its weights.
        micro_batch: what it puts into collectives and sends to its neighbours in one forward and backward pass.
        step: the same in an optimizer step, what goes by formula included.
        in_flight: micro-batches whose activations it keeps at once, min(micro-batches, stages - stage): 1F1B
            (Narayanan et al. 2021, section 2.2).
        kept: activations of one of them, from its forward pass to its backward pass.
        activations: the most that activations take: those of the micro-batches in flight, one of them at work.
        weights: by formula, as are gradients and optimizer.
    """

    stage: int
    holds: str
    parameters: int
    micro_batch: list[Traffic]
    step: list[Traffic]
    in_flight: int
    kept: int
    activations: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def memory(self) -> int:
        """Bytes of all of it."""
        return self.activations + self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Simulation:
    """A layout's figures.

    Attributes:
        parameters: of the whole model; the stages' reconcile to it exactly.
        num_micro_batches: of a rank in one step.
    """

    name: str
    dims: ParallelDims
    zero_stage: int
    parameters: int
    micro_batch_size: int
    sequence_length: int
    num_micro_batches: int
    stages: list[Stage]


def vocabulary(config: SimulateConfig) -> tuple[ModelConfig, int]:
    """The architecture with its embedding rows, and the true vocabulary.

    A given `model.vocab_size` stands for itself; null needs the tokenizer, as in training.
    """
    if config.model.vocab_size is not None:
        return config.model, config.model.vocab_size
    num_tokens = Tokenizer.load(config.data.tokenizer).vocab_size
    return resolve_vocabulary(config.model, num_tokens), num_tokens


def check_parameters(model: ModelConfig, passes: list[Pass]) -> None:
    """The stages' parameters are the model's: each one once, and stages × tensor ranks add up to its size.

    A parameter that tensor ranks split counts with all its parts, one that all of them hold counts once, a tied one
    with one stage.
    """
    held = {part.name: part.numel * part.count for run in passes for part in run.parts if not part.tied_elsewhere}
    assert sum(not part.tied_elsewhere for run in passes for part in run.parts) == len(held), "held by two stages"
    assert held == {spec.name: math.prod(spec.shape) for spec in parameter_specs(model)}, "the stages' parameters"
    assert sum(held.values()) == num_parameters(model)


def stage_of(config: EngineConfig, model: ModelConfig, dims: ParallelDims, number: int, run: Pass) -> Stage:
    """One stage's figures, from its rank's pass."""
    num_micro_batches = dims.num_micro_batches(config.train)
    numel = sum(part.numel for part in run.parts)
    micro_batch = list(run.traffic)
    if number < dims.pipeline - 1:
        micro_batch.append(Traffic("pipeline", "send_hidden_states", 1, run.border))
    if number > 0:
        micro_batch.append(Traffic("pipeline", "send_gradients", 1, run.border))
    step = [traffic.times(num_micro_batches) for traffic in micro_batch]
    if model.tie_word_embeddings and dims.pipeline > 1:
        tied = [part.numel * FP32 for part in run.parts if part.name == f"{EMBEDDING}.weight"]
        step += [Traffic("tied stages", "all_reduce", 1, num_bytes) for num_bytes in tied]
    step += replica_traffic(config, dims, numel, num_micro_batches)
    in_flight = min(num_micro_batches, dims.pipeline - number)
    weights, gradients, optimizer = state_bytes(config, dims, numel)
    return Stage(
        stage=number,
        holds=words({HEAD if part.tied_elsewhere else prefix_of(part.name) for part in run.parts}),
        parameters=numel,
        micro_batch=micro_batch,
        step=step,
        in_flight=in_flight,
        kept=run.kept,
        activations=(in_flight - 1) * run.kept + run.peak,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
    )


def simulate(config: SimulateConfig) -> Simulation:
    """Run one micro-batch through the first rank of every stage.

    Raises:
        ValueError: the layout does not fit the number of processes or the batch, or a pass waits for the device.
    """
    dims = ParallelDims.from_config(config.parallel, config.world_size or smallest_world_size(config.parallel))
    model, num_tokens = vocabulary(config)
    passes = []
    for number in range(dims.pipeline):
        with fake_rank(number * dims.world_size // dims.pipeline, dims) as groups:
            built = build_quietly(config, model, num_tokens, groups)
            passes.append(run_pass(config, model, built, groups))
    check_parameters(model, passes)
    train = config.train
    return Simulation(
        name=config.name,
        dims=dims,
        zero_stage=config.parallel.zero_stage,
        parameters=num_parameters(model),
        micro_batch_size=train.micro_batch_size,
        sequence_length=train.sequence_length,
        num_micro_batches=dims.num_micro_batches(config.train),
        stages=[stage_of(config, model, dims, number, run) for number, run in enumerate(passes)],
    )
