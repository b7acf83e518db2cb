"""Every key of GPT-NeoX's that is known, and what becomes of it."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megakor.config.compose import field_type
from megakor.config.schema import ModelConfig, PretrainConfig
from megakor.interop.neox_config import Row, convert, dropped, experiment_of, known, read_files, table
from megakor.interop.neox_values import CONVERSIONS
from megakor.model.specs import num_parameters
from tests.interop.neox_files import MODEL, PLACES, SMALL, model_file


def rows_of(world_size: int | None = None, **keys: Any) -> dict[str, Row]:
    """The rows of the small configuration with these keys, two underscores for a dot."""
    given = SMALL | {key.replace("__", "."): value for key, value in keys.items()}
    return {row.key: row for row in convert(given, world_size)}


def ours(world_size: int | None = None, **keys: Any) -> dict[str, Any]:
    """Our values of it, by dotted keys; ValueError where it cannot be carried over."""
    rows = list(rows_of(world_size, **keys).values())
    experiment_of(rows)
    return {key: value for row in rows for key, value in row.becomes.items()}


def refusal(world_size: int | None = None, **keys: Any) -> str:
    with pytest.raises(ValueError, match=" must ") as raised:
        ours(world_size, **keys)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------- the table


def test_a_key_has_one_fate() -> None:
    parts = [*table()["mapped"], *table()["deepspeed"], *table()["changed"], *table()["fixed"]]
    parts += [key for group in table()["dropped"] for key in group["keys"]]
    assert len(parts) == len(set(parts)) == len(known()) > 390
    assert set(table()["defaults"]) | set(table()["required"]) <= known()
    assert set(table()["changed"]) == set(CONVERSIONS)
    assert all(group["why"] and group["why"] == group["why"].strip() for group in table()["dropped"])


def test_deepspeeds_settings_of_zero_are_known() -> None:
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert {f"zero_optimization.{name}" for name in names} <= known()
    passed = {key.partition(".")[2] for key in table()["deepspeed"] if key.startswith("zero_optimization.")}
    assert passed <= names


SAMPLES = {int: 3, float: 0.25, bool: True, str: "말뭉치"}


@pytest.mark.parametrize("key", table()["mapped"])
def test_mapped_keys(key: str) -> None:
    target = table()["mapped"][key]
    kind = field_type(PretrainConfig, target)
    kind = next(k for k in (*typing.get_args(kind), kind) if k in SAMPLES)
    row = {row.key: row for row in convert(SMALL | {key: SAMPLES[kind]})}[key]
    assert (row.outcome, row.value, row.becomes) == ("mapped", SAMPLES[kind], {target: SAMPLES[kind]})


@pytest.mark.parametrize("key", table()["deepspeed"])
def test_deepspeeds_own_keys(key: str) -> None:
    rows = convert(SMALL | {key: 5})
    assert {row.key: row.becomes for row in rows}[key] == {f"deepspeed.{key}": 5}
    section = experiment_of(rows)["deepspeed"]
    for part in key.split("."):
        section = section[part]
    assert section == 5


@pytest.mark.parametrize("key", table()["fixed"])
def test_fixed_keys(key: str) -> None:
    for legal in table()["fixed"][key]["only"]:
        row = {row.key: row for row in convert(SMALL | {key: legal})}[key]
        assert (row.outcome, row.becomes) == ("dropped", {})
        assert row.why == f"always so: {table()['fixed'][key]['why']}"
    other = "something else"
    row = {row.key: row for row in convert(SMALL | {key: other})}[key]
    assert (row.outcome, row.becomes) == ("refused", {})
    with pytest.raises(ValueError, match=rf"^{key}={other} must "):
        experiment_of([row])


@pytest.mark.parametrize("key", dropped())
def test_dropped_keys_are_told(key: str) -> None:
    before = {row.key: row.becomes for row in convert(SMALL)}
    rows = {row.key: row for row in convert(SMALL | {key: 7})}
    assert (rows[key].outcome, rows[key].value, rows[key].why) == ("dropped", 7, dropped()[key])
    assert {name: row.becomes for name, row in rows.items() if name != key} == before


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "intermediate_size": ({"intermediate_size": 200}, {"model.intermediate_size": 200}),
    "expansion_factor": ({"expansion_factor": 2.5}, {"model.intermediate_size": 160}),
    "mlp_multiple_of": ({"mlp_multiple_of": 40}, {"model.intermediate_size": 320}),
    "no_weight_tying": ({"no_weight_tying": True}, {"model.tie_word_embeddings": False}),
    "make_vocab_size_divisible_by": (
        {"make_vocab_size_divisible_by": 64, "model_parallel_size": 2}, {"model.make_vocab_size_divisible_by": 128}
    ),
    "init_method": ({"init_method": "small_init"}, {"model.initializer_range": 0.0790569415}),  # sqrt(2 / (5 × 64))
    "init_method_std": (
        {"init_method_std": 0.04, "init_method": "scaled_normal"}, {"model.initializer_range": 0.02}
    ),
    "num_kv_heads": ({"num_kv_heads": 4}, {}),
    "attention_config": ({"attention_config": [[["flash", "global"], 1]]}, {}),
    "train_batch_size": ({"train_batch_size": 16}, {"train.global_batch_size": 16, "train.micro_batch_size": 2}),
    "train_micro_batch_size_per_gpu": (
        {"train_micro_batch_size_per_gpu": 4, "train_batch_size": None, "global_num_gpus": 6},
        {"train.global_batch_size": 24, "train.micro_batch_size": 4},
    ),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 3, "train_batch_size": None, "global_num_gpus": 6},
        {"train.global_batch_size": 36, "train.micro_batch_size": 2},
    ),
    "global_num_gpus": (
        {"global_num_gpus": 16, "train_batch_size": None},
        {"train.global_batch_size": 32, "train.micro_batch_size": 2},
    ),
    "precision": ({"precision": "bfloat16"}, {"train.precision": "bf16"}),
    "fp16.enabled": ({"fp16.enabled": True}, {"train.precision": "fp16"}),
    "bf16.enabled": ({"bf16.enabled": True}, {"train.precision": "bf16"}),
    "optimizer.type": ({"optimizer.type": "cpu_Adam"}, {"optimizer.name": "adamw"}),
    "optimizer.params.betas": (
        {"optimizer.params.betas": [0.8, 0.9]}, {"optimizer.beta1": 0.8, "optimizer.beta2": 0.9}
    ),
    "lr_decay_style": ({"lr_decay_style": "Cosine"}, {"schedule.name": "cosine"}),
    "min_lr": ({"min_lr": 0.0001}, {"schedule.min_lr_ratio": 0.1}),
    "warmup": (
        {"warmup": 0.02, "lr_decay_iters": 50, "lr_decay_style": "constant"}, {"schedule.warmup_ratio": 0.01}
    ),
    "lr_decay_iters": ({"lr_decay_iters": 100}, {}),
    "lr_decay_fraction": ({"lr_decay_fraction": 1.0}, {}),
    "checkpoint_activations": ({"checkpoint_activations": True}, {"train.activation_checkpointing": "full"}),
    "keep_last_n_checkpoints": ({"keep_last_n_checkpoints": 4}, {"checkpoint.keep_last": 4}),
    "checkpoint_factor": ({"checkpoint_factor": 500.0}, {"checkpoint.interval": 500}),
    "use_wandb": ({"use_wandb": True}, {"logging.wandb": "online"}),
    "pipe_parallel_size": ({"pipe_parallel_size": 0}, {"parallel.pipeline_parallel_size": 1}),
    "model_parallel_size": ({"model_parallel_size": 2}, {"parallel.tensor_parallel_size": 2}),
    "pipe_partition_method": (
        {"pipe_partition_method": "type:transformer|mlp"}, {"parallel.pipeline_partition": "type:Block"}
    ),
    "sequence_parallel": (
        {"sequence_parallel": True, "model_parallel_size": 2}, {"parallel.sequence_parallel": True}
    ),
    "zero_optimization.stage": ({"zero_optimization.stage": 0}, {"parallel.zero_stage": 1}),
    "zero_optimization.cpu_offload": ({"zero_optimization.cpu_offload": True}, {"parallel.offload_optimizer": True}),
    "zero_optimization.cpu_offload_params": (
        {"zero_optimization.cpu_offload_params": True, "zero_optimization.stage": 3},
        {"parallel.offload_parameters": True},
    ),
    "zero_optimization.cpu_offload_param": (
        {"zero_optimization.cpu_offload_param": False}, {"parallel.offload_parameters": False}
    ),
    "zero_optimization.offload_optimizer": (
        {"zero_optimization.offload_optimizer": {"device": "cpu", "pin_memory": True}},
        {"parallel.offload_optimizer": True},
    ),
    "zero_optimization.offload_param": (
        {"zero_optimization.offload_param": {"device": "cpu"}, "zero_optimization.stage": 3},
        {"parallel.offload_parameters": True},
    ),
    "deepspeed_extra_args": (
        {"deepspeed_extra_args": {"comms_logger": {"enabled": True}}}, {"deepspeed.comms_logger": {"enabled": True}}
    ),
    "data_path": ({"data_path": "/자료/글_text_document"}, {"data.train": "/자료/글_text_document"}),
    "train_data_paths": (
        {"train_data_paths": ["/a/글", "/b/글", "/c/wiki"]},
        {"data.sources": {"글": "/a/글", "글 2": "/b/글", "wiki": "/c/wiki"},
         "data.weights": {"글": 1.0, "글 2": 1.0, "wiki": 1.0}},
    ),
    "train_data_weights": (
        {"train_data_weights": [1, 3.5], "train_data_paths": ["/a/글", "/c/wiki"]},
        {"data.sources": {"글": "/a/글", "wiki": "/c/wiki"}, "data.weights": {"글": 1, "wiki": 3.5}},
    ),
    "num_nodes": ({"num_nodes": 4}, {"cluster.num_nodes": 4}),
    "hostfile": ({"hostfile": "/호스트"}, {"cluster.hostfile": "/호스트", "cluster.kind": "deepspeed"}),
    "launcher": ({"launcher": "openmpi"}, {"cluster.kind": "openmpi"}),
    "deepspeed_slurm": ({"deepspeed_slurm": True, "launcher": "pdsh"}, {"cluster.kind": "slurm"}),
    "deepspeed_mpi": ({"deepspeed_mpi": True}, {"cluster.kind": "openmpi"}),
    "comment": ({"comment": "우리 것"}, {"cluster.slurm.options": ["--comment=우리 것"]}),
    "slurm_comment": ({"slurm_comment": "neox"}, {"cluster.slurm.options": ["--comment=neox"]}),
}  # fmt: skip


def test_every_changed_key_has_a_case() -> None:
    assert set(CHANGED) == set(table()["changed"])


@pytest.mark.parametrize("key", CHANGED)
def test_changed_keys(key: str) -> None:
    keys, expected = CHANGED[key]
    rows = convert(SMALL | keys)
    row = {row.key: row for row in rows}[key]
    assert row.becomes == expected
    same = list(expected.values()) == [keys[key]]
    assert row.outcome == ("mapped" if same else "changed" if expected else "dropped")
    assert row.why == table()["changed"][key]
    experiment_of(rows)


# ----------------------------------------------------------------------------------- values that decide something


@pytest.mark.parametrize(
    ("method", "std"),
    [("normal", 0.02), ("scaled_normal", 0.02 / math.sqrt(4)), ("single_residual_scaled_normal", 0.02 / math.sqrt(2)),
     ("small_init", math.sqrt(2 / 320)), ("wang_init", 2 / 2 / 8)],
)  # fmt: skip
def test_spreads_of_first_weights(method: str, std: float) -> None:
    assert ours(init_method=method)["model.initializer_range"] == pytest.approx(std, rel=1e-9)


def test_the_defaults_are_gpt_neoxs() -> None:
    found = ours()
    assert found["model.rotary_pct"] == 1.0
    assert found["model.use_parallel_residual"] is False
    assert found["model.tie_word_embeddings"] is True
    assert found["model.intermediate_size"] == 256
    assert (found["optimizer.beta1"], found["optimizer.beta2"]) == (0.9, 0.999)
    assert (found["schedule.name"], found["schedule.min_lr_ratio"], found["schedule.warmup_ratio"]) == (
        "linear",
        0,
        0.01,
    )
    assert (found["train.precision"], found["parallel.zero_stage"]) == ("fp32", 1)
    assert (found["checkpoint.keep_last"], found["logging.interval"], found["logging.wandb"]) == (0, 100, "disabled")
    assert all(row.default for row in rows_of().values() if row.key not in SMALL)


def test_positions_are_learned_by_default() -> None:
    rows = convert({key: value for key, value in SMALL.items() if key != "pos_emb"})
    with pytest.raises(ValueError, match=r"^pos_emb \(the default\)=learned must be rotary: positions are rotary$"):
        experiment_of(rows)


def test_null_is_the_default() -> None:
    rows = rows_of(rotary_pct=None, moe_num_experts=None, num_kv_heads=None)
    assert rows["rotary_pct"] == Row("rotary_pct", 1.0, "mapped", {"model.rotary_pct": 1.0}, default=True)
    assert {rows[key].outcome for key in ("moe_num_experts", "num_kv_heads")} == {"dropped"}
    assert ours(intermediate_size=None)["model.intermediate_size"] == 256


def test_sections_that_are_off() -> None:
    assert rows_of(curriculum_learning={"enabled": False})["curriculum_learning"].outcome == "dropped"
    assert rows_of(amp={"enabled": True})["amp"].outcome == "refused"
    assert rows_of(soft_prompt_tuning={"num_tokens": 8})["soft_prompt_tuning"].outcome == "refused"


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ({"global_num_gpus": 4}, (8, 2)),
        ({"train_micro_batch_size_per_gpu": None, "global_num_gpus": 4}, (8, 2)),
        ({"train_batch_size": None, "num_nodes": 2, "num_gpus": 8}, (32, 2)),
        ({"train_batch_size": None, "num_nodes": 2, "num_gpus": 8, "pipe_parallel_size": 2, "model_parallel_size": 2},
         (8, 2)),
        ({"train_batch_size": None, "gradient_accumulation_steps": 5, "global_num_gpus": 1}, (10, 2)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 4, "global_num_gpus": 8}, (64, 2)),
    ],
)  # fmt: skip
def test_batch_sizes(keys: dict[str, Any], sizes: tuple[int, int]) -> None:
    found = ours(**keys)
    assert (found["train.global_batch_size"], found["train.micro_batch_size"]) == sizes


def test_the_number_of_gpus_can_be_told() -> None:
    assert ours(6, train_batch_size=None, global_num_gpus=4)["train.global_batch_size"] == 12


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"train_batch_size": None},
         "train_micro_batch_size_per_gpu=2 must come with the number of GPUs, which GPT-NeoX counts at a start: "
         "world_size="),
        ({"global_num_gpus": 3}, "must make train_batch_size=8 of train_micro_batch_size_per_gpu × "
                                 "gradient_accumulation_steps × replicas: 2 × 1 × 3"),
        ({"train_batch_size": None, "global_num_gpus": 3, "model_parallel_size": 2},
         "must come with a number of GPUs that the 2 ranks of a replica divide, not 3"),
        ({"train_batch_size": None, "train_micro_batch_size_per_gpu": None},
         "train_micro_batch_size_per_gpu (the default)=None must come with train_batch_size or"),
        ({"precision": "fp16", "bf16__enabled": True},
         "must agree with precision, fp16 and bf16, which ask for bf16 and fp16"),
        ({"fp16__enabled": "yes"}, "fp16.enabled=yes must come with true or false as fp16.enabled, not 'yes'"),
        ({"optimizer__type": "lion"}, "optimizer.type=lion must be one of adam, cpu_adam, cpu_torch_adam"),
        ({"optimizer__params__betas": 0.9}, "optimizer.params.betas=0.9 must be two numbers"),
        ({"lr_decay_style": "exponential"}, "lr_decay_style=exponential must be one of cosine, linear, constant"),
        ({"lr_decay_iters": 90},
         "lr_decay_iters=90 must lead to train_iters=100, not 90: a schedule ends with its run"),
        ({"lr_decay_fraction": 0.5}, "lr_decay_fraction=0.5 must lead to train_iters=100, not 50"),
        ({"min_lr": "low"}, "min_lr=low must come with a number as min_lr, not 'low'"),
        ({"hidden_size": 64.5}, "must come with a whole number as hidden_size, not 64.5"),
        ({"init_method": "xavier_normal"}, "init_method=xavier_normal must be one of normal, scaled_normal"),
        ({"intermediate_size": 96, "expansion_factor": 2}, "must be one of intermediate_size and expansion_factor"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 must be num_attention_heads=4"),
        ({"attention_config": [[["local", "global"], "all"]]}, "must name flash or global only"),
        ({"attention_config": ["flash", "mamba"]}, "must name flash or global only"),
        ({"attention_config": 3}, "attention_config=3 must name flash or global only"),
        ({"pipe_partition_method": "type:mlp"}, "pipe_partition_method=type:mlp must be one of parameters, uniform"),
        ({"zero_optimization__offload_optimizer": {"device": "nvme"}}, "must name the device cpu or none"),
        ({"launcher": "mvapich"}, "launcher=mvapich must be one of pdsh, openmpi, slurm"),
        ({"train_data_paths": ["a", "b"], "train_data_weights": [1]}, "must be as many paths as train_data_weights"),
        ({"train_data_paths": ["a", "b"], "data_path": "c"}, "must come without data_path"),
        # rules of ours that GPT-NeoX's values break
        ({"num_attention_heads": 5}, "model.hidden_size=64 must be divisible by model.num_attention_heads=5"),
        ({"deepspeed_extra_args": {"bf16": {"enabled": True}}},
         "must be left out: megakor sets it from train.precision"),
        ({"pipe_parallel_size": 2, "zero_optimization__stage": 2}, "parallel.zero_stage=2 must be 1 with"),
        ({"seed": "모름"}, "seed=모름 must be as train.seed is: Value '모름' of type 'str' could not be converted"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over(keys: dict[str, Any], line: str) -> None:
    told = refusal(**keys)
    assert line in told
    assert "\n" not in told


def test_everything_that_is_refused_is_told_at_once() -> None:
    told = refusal(norm="rmsnorm", activation="swiglu", num_kv_heads=1, lr_decay_style="exponential")
    assert told.count(" must ") == 4


def test_a_single_source_has_no_name() -> None:
    found = ours(train_data_paths=["/a/글"], train_data_weights=[3.0])
    assert found["data.train"] == "/a/글"
    assert "data.sources" not in found


def test_factors_that_multiply_are_no_interval() -> None:
    rows = rows_of(checkpoint_factor=2, checkpoint_scale="log")
    assert (rows["checkpoint_factor"].outcome, rows["checkpoint_scale"].outcome) == ("dropped", "dropped")


def test_text_that_is_a_number() -> None:
    """YAML 1.1 takes 1e-5 for text."""
    assert ours(optimizer__params__lr="1e-3", min_lr="1e-5")["schedule.min_lr_ratio"] == 0.01


def test_the_size_of_gpt_neox_20b() -> None:
    """Its model card: 44 layers, 6,144 wide, 64 heads, 50,257 tokens in 50,432 rows, two tensor ranks."""
    found = ours(
        num_layers=44, hidden_size=6144, num_attention_heads=64, rotary_pct=0.25, no_weight_tying=True,
        gpt_j_residual=True, model_parallel_size=2, pipe_parallel_size=4,
    )  # fmt: skip
    multiple = found["model.make_vocab_size_divisible_by"]
    model = ModelConfig(
        hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
        intermediate_size=found["model.intermediate_size"], vocab_size=-(-50257 // multiple) * multiple,
    )  # fmt: skip
    assert num_parameters(model) == 20_554_567_680


# ------------------------------------------------------------------------------------------------------ the files


def written(folder: Path, **files: str) -> list[str]:
    paths = []
    for name, text in files.items():
        path = folder / f"{name}.yml"
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


def test_files_are_merged_in_their_order(tmp_path: Path) -> None:
    paths = written(tmp_path, 모델=model_file("1_3b_polyglot"), 자리=PLACES)
    keys = list(read_files(paths))
    assert keys[0] == "pipe_parallel_size"
    assert keys[-1] == "checkpoint_factor"
    assert keys.index("bf16.enabled") < keys.index("data_path") < keys.index("save")
    assert next(iter(read_files(paths[::-1]))) == "data_path"
    assert [row.key for row in convert(read_files(paths)) if not row.default] == keys


def test_sections_are_dotted_as_far_as_keys_are_known(tmp_path: Path) -> None:
    text = '{"optimizer": {"type": "Adam", "params": {"lr": 1.0e-3}}, "comms_logger": {"enabled": true}, "fp16": null}'
    assert read_files(written(tmp_path, a=text)) == {
        "optimizer.type": "Adam",
        "optimizer.params.lr": 0.001,
        "comms_logger": {"enabled": True},
    }


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a": "seed: 1", "b": "seed: 2"}, r"^seed must stand in one file only, not in \S+a.yml and in \S+b.yml$"),
        ({"a": "num-layers: 1", "b": "num_layers: 2"}, r"^num_layers must stand in one file only"),
        ({"a": "num-layers: 1\nnum_layers: 2"}, r"a.yml must have num_layers once, with dashes or with underscores$"),
        ({"a": "seed: 1\nseed: 2"}, r"a.yml must be YAML: line 2: seed stands twice$"),
        ({"a": "{seed: 1, optimizer: {type: a, type: b}}"}, r"must be YAML: line 1: type stands twice$"),
        ({"a": "{seed: 1"}, r"a.yml must be YAML: line \d+: "),
        ({"a": "- 1"}, r"a.yml must hold keys and values"),
        ({"a": ""}, r"a.yml must hold keys and values"),
        ({"a": "!!python/object:os.system {}"}, r"a.yml must be YAML: line 1: could not determine a constructor"),
        ({"a": "optimizer: Adam"}, r"^optimizer=Adam must be a section of keys$"),
        ({"a": "hiden-size: 1"}, r"^unknown hiden_size \(nearest: hidden_size, head_size\): must be keys of GPT-NeoX"),
        ({"a": "zzz: 1\nfp16: {enable: true}"},
         r"^unknown zzz, fp16.enable \(nearest: fp16.enabled.*\): must be keys of GPT-NeoX's configuration$"),
    ],
)  # fmt: skip
def test_files_that_are_not_read(tmp_path: Path, files: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read_files(written(tmp_path, **files))


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_bytes("save: 저장".encode("euc-kr"))
    with pytest.raises(ValueError, match=r"a.yml must be text in UTF-8"):
        read_files([str(tmp_path / "a.yml")])


def test_what_gpt_neox_needs_is_needed() -> None:
    given = {key: value for key, value in SMALL.items() if key not in ("hidden_size", "train_iters")}
    with pytest.raises(
        ValueError, match=r"^hidden_size, train_iters must be given; path=\[a.yml,b.yml\] takes several"
    ):
        convert(given)


def test_the_examples_are_in_braces() -> None:
    assert MODEL.count("{{") == MODEL.count("}}") == 5
