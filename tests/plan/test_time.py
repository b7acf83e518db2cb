"""The time of a step against sums by hand: FLOPs, messages, bubbles, what is hidden, recomputed, frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megakor.config.choices import ActivationCheckpointing, OptimizerName, Precision
from megakor.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megakor.model.flops import train_flops_per_token
from megakor.model.specs import num_parameters
from megakor.parallel.dims import ParallelDims
from megakor.plan.hardware import Hardware, find_hardware
from megakor.plan.passes import Shape, parts_of
from megakor.plan.time import StepTime, even_stages, flops_per_token, stage_parameters, step_time
from megakor.plan.work import LINEARS, Adapters, Practice, StageLayers, Work

MODEL = ModelConfig(
    hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=4096, vocab_size=8192,
    rotary_pct=0.25,
)  # fmt: skip
TRAIN = TrainConfig(num_steps=1, global_batch_size=64, micro_batch_size=2, sequence_length=512)
A100 = find_hardware("a100-80g")
UNFUSED = Practice(fused_attention=False)


def step(ranks: int = 1, hardware: Hardware = A100, model: ModelConfig = MODEL, **options: object) -> StepTime:
    """A step; options are of the layout, the training or the step."""
    kinds = {kind: {} for kind in (ParallelConfig, TrainConfig, None)}  # type: ignore[var-annotated]
    for name, value in options.items():
        kind = next((kind for kind in (ParallelConfig, TrainConfig) if hasattr(kind, name)), None)
        kinds[kind][name] = value
    parallel, train = ParallelConfig(**kinds[ParallelConfig]), replace(TRAIN, **kinds[TrainConfig])
    return step_time(model, parallel, train, ParallelDims.from_config(parallel, ranks), hardware, **kinds[None])


def whole(parts: dict[str, Work], layers: int = MODEL.num_hidden_layers) -> Work:
    found = parts["embedding"] + parts["head"]
    for _ in range(layers):
        found += parts["block"]
    return found


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_products_are_the_models_flops(tensor: int) -> None:
    """6 N + 12·L·H·T but for what no product does: biases and norms."""
    parallel = ParallelConfig(tensor_parallel_size=tensor)
    work = whole(parts_of(Shape(MODEL, parallel, 2, 512, 2, practice=UNFUSED), TRAIN))
    vectors = num_parameters(MODEL) - 8 * 12 * 1024**2 - 2 * 8192 * 1024
    expected = 2 * 512 * (train_flops_per_token(MODEL, 512) - 6 * vectors)
    assert tensor * sum(product.flops for product in work.products) == pytest.approx(expected, rel=1e-12)


def test_fused_attention_leaves_out_the_masked_half_and_computes_its_scores_twice() -> None:
    parts = parts_of(Shape(MODEL, ParallelConfig(), 2, 512, 2), TRAIN)
    square = 2 * 2 * 512 * 512 * 1024  # one product of all heads, two sequences
    assert parts["block"].attention == pytest.approx(7 * square / 2)


@pytest.mark.parametrize(
    ("sequence_parallel", "together", "expected"),
    [
        (False, True, {"all_reduce": 3}),
        (False, False, {"all_reduce": 4}),
        (True, True, {"all_gather": 5, "reduce_scatter": 3}),
        (True, False, {"all_gather": 6, "reduce_scatter": 4}),
    ],
)
def test_a_blocks_messages(sequence_parallel: bool, together: bool, expected: dict[str, int]) -> None:
    """Korthikanti et al. 2022, section 4.2.2; a parallel residual joins both branches at once."""
    parallel = ParallelConfig(tensor_parallel_size=2, sequence_parallel=sequence_parallel)
    shape = Shape(replace(MODEL, use_parallel_residual=together), parallel, 2, 512, 2)
    large = [message for message in parts_of(shape, TRAIN)["block"].messages if message.num_bytes == shape.stream]
    assert {kind: sum(message.kind == kind for message in large) for kind in {m.kind for m in large}} == expected


def test_parts_add_up() -> None:
    found = step(16, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert all(seconds > 0 for name, seconds in found.parts.items() if name != "context")
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.mfu == pytest.approx(found.model_flops / found.seconds / (16 * 312e12))
    assert found.model_flops == train_flops_per_token(MODEL, 512) * 64 * 512


def test_a_bubble_is_what_stages_wait_for_at_both_ends() -> None:
    """(stages - 1) micro-batches of even stages, divided by the parts that are interleaved (Narayanan et al. 2021)."""
    model = replace(MODEL, vocab_size=8)  # so that the ends cost next to nothing
    one = step(4, model=model, pipeline_parallel_size=4)
    count = 64 // 2
    per_micro_batch = (one.compute + one.transfers) / count
    assert one.bubble == pytest.approx(3 * per_micro_batch, rel=0.01)
    two = step(4, model=model, pipeline_parallel_size=4, practice=Practice(virtual_stages=2))
    assert two.bubble == pytest.approx(one.bubble / 2, rel=0.02)
    assert two.transfers == pytest.approx(2 * one.transfers, rel=0.1)


def test_the_stage_that_takes_longest_sets_the_pace() -> None:
    uneven = [StageLayers(range(1), True, False), StageLayers(range(1, 8), False, True)]
    even = even_stages(8, 2)
    assert [len(layers.blocks) for layers in even] == [4, 4]
    slow = step(2, pipeline_parallel_size=2, stages=uneven)
    assert slow.compute > 1.5 * step(2, pipeline_parallel_size=2, stages=even).compute


def test_what_is_hidden_is_not_waited_for() -> None:
    options = {"tensor_parallel_size": 8, "sequence_parallel": True}
    hidden = step(8, **options)
    shown = step(8, practice=Practice(hides_tensor_messages=False), **options)
    assert hidden.tensor < shown.tensor
    # Cores that communicate compute nothing meanwhile.
    assert step(8, replace(A100, overlaps=False), **options).tensor == pytest.approx(shown.tensor)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_replicas_move_what_zero_moves(stage: int) -> None:
    """In ring passes over the weights, bf16, 4 micro-batches: ZeRO-1 sums fp32 once and gathers; ZeRO-2 sums every
    micro-batch; ZeRO-3 gathers twice and scatters every micro-batch."""
    hardware = replace(A100, overlaps=False, node_latency_us=1e-9, network_latency_us=1e-9, link_efficiency=1.0)
    found = step(8, hardware, zero_stage=stage, global_batch_size=64).replicas
    ring = 7 / 8 * num_parameters(MODEL) / (300e9)
    expected = {1: (2 * 4 + 2) * ring, 2: (4 * 2 * 2 + 2) * ring, 3: 4 * 3 * 2 * ring}[stage]
    assert found == pytest.approx(expected, rel=1e-6)


def test_zero_3_hides_its_messages_beside_the_passes() -> None:
    waited = step(8, replace(A100, node_gb_per_s=1.0), zero_stage=3)
    assert step(8, zero_stage=3).replicas == 0.0
    shown = step(8, replace(A100, node_gb_per_s=1.0, overlaps=False), zero_stage=3)
    assert 0.0 < waited.replicas < shown.replicas


def test_recomputation_is_work_that_is_not_the_models() -> None:
    kinds = {kind: step(activation_checkpointing=kind) for kind in ActivationCheckpointing}
    none, full, selective = (kinds[ActivationCheckpointing[name]] for name in ("none", "full", "selective"))
    assert none.model_flops == full.model_flops == selective.model_flops == none.hardware_flops
    tokens = 64 * 512
    assert selective.hardware_flops - none.hardware_flops == pytest.approx(tokens * 8 * 4 * 1024 * 512)
    block = stage_parameters(MODEL, StageLayers(range(1), False, False), 1)
    assert full.hardware_flops - none.hardware_flops == pytest.approx(tokens * 8 * (2 * block + 4 * 1024 * 512))
    assert none.seconds < selective.seconds < full.seconds
    assert full.recompute == pytest.approx(full.compute - none.compute)
    every_other = step(activation_checkpointing=ActivationCheckpointing.full, activation_checkpointing_interval=2)
    assert every_other.recompute == pytest.approx(full.recompute / 2)


def test_recomputation_ends_before_the_last_linear_layer() -> None:
    train = replace(TRAIN, activation_checkpointing=ActivationCheckpointing.full)
    parallel = ParallelConfig(tensor_parallel_size=2)
    early, late = (
        parts_of(Shape(MODEL, parallel, 2, 512, 2, practice=Practice(stops_early=early)), train)["again"]
        for early in (True, False)
    )
    assert len(late.products) == len(early.products) + 1
    assert [message.kind for message in late.messages] == ["all_reduce"]
    assert not early.messages


def test_adapters_leave_out_the_gradients_of_frozen_weights() -> None:
    adapters = Adapters(8, LINEARS)
    full, tuned = step(4, zero_stage=1), step(4, zero_stage=1, adapters=adapters)
    assert 0.6 < tuned.compute / full.compute < 0.85
    assert tuned.replicas < full.replicas / 10
    assert tuned.optimizer < full.optimizer / 10
    useful, again = flops_per_token(MODEL, TRAIN, adapters)
    trained = 8 * 8 * ((1024 + 3072) + (1024 + 1024) + 2 * (1024 + 4096))
    attention = 12 * 8 * 1024 * 512
    assert useful == pytest.approx((train_flops_per_token(MODEL, 512) - attention) * 2 / 3 + attention + 6 * trained)
    assert again == 0


def test_products_with_adapters_are_those_of_frozen_weights_and_of_thin_matrices() -> None:
    """2 forward and 2 for the input's gradient of each frozen weight; 6 of each of an adapter's."""
    shape = Shape(MODEL, ParallelConfig(), 2, 512, 2, adapters=Adapters(4, (LINEARS[0],)), practice=UNFUSED)
    frozen, thin = 8 * 12 * 1024**2 + 8192 * 1024, 8 * 4 * (1024 + 3072)
    attention = 12 * 8 * 1024 * 512
    found = sum(product.flops for product in whole(parts_of(shape, TRAIN)).products)
    assert found == pytest.approx(2 * 512 * (4 * frozen + 6 * thin + attention), rel=1e-12)


def test_offloading_takes_the_way_to_the_host() -> None:
    near, far = step(), step(offload_optimizer=True)
    assert far.optimizer > 10 * near.optimizer
    assert far.compute == near.compute


def test_offloaded_weights_come_from_the_host_in_both_passes() -> None:
    hardware = replace(A100, overlaps=False)
    near, far = (step(2, hardware, zero_stage=3, offload_parameters=offload) for offload in (False, True))
    fetched = 16 * 2 * 2 * num_parameters(MODEL) / 2  # micro-batches × passes × bytes of this rank's half
    assert far.replicas - near.replicas == pytest.approx(fetched / (31.5e9 * hardware.link_efficiency))


def test_more_of_everything_takes_longer() -> None:
    base = step(8, tensor_parallel_size=2)
    for slower in (
        {"hardware": replace(A100, bf16_tflops=100.0)},
        {"hardware": replace(A100, memory_gb_per_s=500.0)},
        {"hardware": replace(A100, node_gb_per_s=10.0)},
        {"precision": Precision.fp32},
        {"sequence_length": 1024},
        {"global_batch_size": 128},
        {"context_parallel_size": 2},
    ):
        assert step(8, **{"tensor_parallel_size": 2, **slower}).seconds > base.seconds, slower
    assert step(8, tensor_parallel_size=2, optimizer=OptimizerName.adafactor).optimizer < base.optimizer


def test_a_stages_weights_are_what_its_rank_holds() -> None:
    for tensor, stages in ((1, 1), (1, 4), (2, 4)):
        held = [stage_parameters(MODEL, layers, tensor) for layers in even_stages(8, stages)]
        whole_ones = 8 * (4 * 1024 + 2 * 1024) + 2 * 1024  # norms and row biases
        assert sum(held) * tensor == num_parameters(MODEL) + (tensor - 1) * whole_ones
