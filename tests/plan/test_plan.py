"""Plans: parameters of the models that are shipped, time and cost, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakor.config.schema import ClusterConfig, LoraTarget, TrainTokenizerConfig
from megakor.model.lora import num_adapter_parameters
from megakor.plan.memory import GIB
from megakor.plan.picture import COLORS, picture
from megakor.plan.plan import Plan, inference_gb, make_plan
from megakor.plan.table import summed_traffic
from megakor.plan.work import LINEARS
from megakor.tokenizer.train import train_tokenizer
from tests.config.commands import quickly_composed
from tests.tokenizer.conftest import documents

PARAMETERS = {"1_3b": 1_331_810_304, "3_8b": 3_809_974_272, "5_8b": 5_885_059_072, "12_8b": 12_893_603_840}


def plan(*arguments: str) -> Plan:
    return make_plan(quickly_composed("plan", *arguments))


@pytest.fixture(scope="module")
def largest() -> Plan:
    return plan("experiment=12_8b_256xa100")


@pytest.mark.parametrize(("model", "count"), PARAMETERS.items())
def test_parameters(model: str, count: int) -> None:
    parts = plan(f"model={model}").parameters
    assert sum(parts.values()) == count
    assert all(parts.values())


def test_parts_by_hand(largest: Plan) -> None:
    hidden, inner, layers, rows = 5120, 20480, 40, 30080
    assert largest.parameters == {
        "embedding": rows * hidden,
        "attention": layers * (4 * hidden * hidden + 4 * hidden),
        "feed_forward": layers * (2 * hidden * inner + hidden + inner),
        "norms": (2 * layers + 1) * 2 * hidden,
        "output": rows * hidden,
    }
    assert largest.trained == sum(largest.parameters.values())


def test_tied_parameters_count_once() -> None:
    parts = plan("model=1_3b", "model.tie_word_embeddings=true").parameters
    assert (parts["embedding"], parts["output"]) == (30080 * 2048, 0)


def test_the_run(largest: Plan) -> None:
    assert largest.dims.world_size == 256
    assert (largest.num_micro_batches, largest.num_steps) == (16, 318_528)
    assert largest.tokens == 318_528 * 256 * 2048
    assert largest.fits
    assert 0.2 < largest.time.mfu < 0.65


def test_the_quick_rule() -> None:
    """As it is told: 7 billion parameters at 32 bits are 33.6 GB."""
    assert inference_gb(7_000_000_000, 32) == pytest.approx(33.6)
    assert inference_gb(7_000_000_000, 16) == pytest.approx(16.8)


def test_cost_follows_from_the_step(largest: Plan) -> None:
    cost, hours = largest.cost, largest.time.seconds * 318_528 / 3600
    assert cost.days == pytest.approx(hours / 24)
    assert cost.gpu_hours == pytest.approx(256 * hours)
    assert cost.krw == pytest.approx(2325 * 256 * hours)
    assert cost.usd == pytest.approx(cost.krw / 1400)
    assert cost.kwh == pytest.approx(256 * hours * largest.hardware.watts / 1000)
    dearer = plan("experiment=12_8b_256xa100", "cluster.price_krw=4650", "cluster.krw_per_usd=1000")
    assert dearer.cost.krw == pytest.approx(2 * cost.krw)
    assert dearer.cost.usd == pytest.approx(dearer.cost.krw / 1000)


def test_the_reported_cost_is_the_default_price() -> None:
    """3 to 4 hundred million won, 256 A100s, 3 to 4 weeks: of the middles, 2,325 won an hour, rounded."""
    won_an_hour = 350e6 / (256 * 3.5 * 7 * 24)
    assert won_an_hour == pytest.approx(ClusterConfig().price_krw, rel=1e-3)


def test_accelerators() -> None:
    assert plan("model=1_3b").dims.world_size == 1
    assert plan("model=1_3b", "cluster.gpus=16xh100").dims.data == 16
    nodes = [plan("model=1_3b", "cluster.gpus=16xa100-80g", f"cluster.ranks_per_node={size}") for size in (4, 16)]
    assert [found.hardware.per_node for found in nodes] == [4, 16]
    assert nodes[1].time.seconds < nodes[0].time.seconds


def test_lora() -> None:
    whole = plan("model=5_8b", "train.global_batch_size=32")
    lora = plan("model=5_8b", "train.global_batch_size=32", "lora.rank=16", "lora.targets=[query_key_value,dense]")
    assert lora.parameters == whole.parameters
    assert lora.trained == 28 * 16 * (4096 + 3 * 4096 + 4096 + 4096)
    config = quickly_composed("plan", "model=5_8b", "train.global_batch_size=32", "lora.rank=16",
                              "lora.targets=[query_key_value,dense]")  # fmt: skip
    assert lora.trained == num_adapter_parameters(config.model, config.lora)
    assert lora.fullest.total < 0.3 * whole.fullest.total
    assert lora.time.model_flops < whole.time.model_flops
    assert tuple(target.value for target in LoraTarget) == LINEARS


def test_traffic_of_the_fullest_kind(largest: Plan) -> None:
    """By hand: in bf16, replicas sum the weights of a stage in fp32."""
    summed = summed_traffic(largest.traffic)
    assert summed["replicas all_reduce"] == 4 * max(stage.parameters for stage in largest.stages)
    states = 2048 * 5120 * 2
    assert summed["pipeline send_hidden_states"] == 16 * states // 4


def test_the_picture_has_every_part_to_scale(largest: Plan) -> None:
    shown = picture(largest)
    assert shown.count("<rect") == 1 + len(COLORS) + len(COLORS) * 4
    assert COLORS.keys() == largest.stages[0].parts.keys()
    for stage in largest.stages:
        assert f">{stage.total / GIB:.1f}<" in shown
        assert stage.holds in shown


REFUSED: list[tuple[list[str], str]] = [
    (["model=debug"], "model.vocab_size=null must be a number of rows, or data.tokenizer=data/tokenizer"),
    (["model=1_3b", "cluster.gpus=8xa100"], "a100 must be one of .*a100-80g.*YAML"),
    (["model=1_3b", "cluster.gpus=6xa100-80g", "parallel.tensor_parallel_size=4"],
     "tensor_parallel_size=4 .* must divide the number of processes, 6; nearest: 4 or 8"),
    (["experiment=12_8b_256xa100", "cluster.gpus=128xa100-80g"],
     "data_parallel_size=16 .* must equal the number of processes, 128; nearest: parallel.data_parallel_size=8"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "rule"), REFUSED)
def test_refused(arguments: list[str], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan(*arguments)


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    from megakor.plan.hardware import hardware_folder

    text = (
        (hardware_folder() / "a100-80g.yaml").read_text(encoding="utf-8").replace("memory_gib: 79.1", "memory_gib: 9")
    )
    own = tmp_path / "ours.yaml"
    own.write_text(text, encoding="utf-8")
    found = plan("model=1_3b", f"cluster.gpus=8x{own}")
    assert (found.hardware.name, found.fits) == ("ours", False)


def test_a_tokenizer_tells_the_vocabulary(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(documents(60)), encoding="utf-8")
    tokenizer = train_tokenizer(TrainTokenizerConfig(inputs=[str(text)], out=str(tmp_path / "t"), vocab_size=450))
    found = plan("model=debug", f"data.tokenizer={tokenizer.folder}")
    assert tokenizer.vocab_size == 450
    assert found.parameters["embedding"] == 512 * 128
