"""A run that was killed goes on as if nothing had happened; one that would go on otherwise is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from megakor.checkpoint.format import CheckpointManifest, committed
from megakor.checkpoint.reader import load_model, newest_whole, read_weights
from megakor.config.schema import ActivationCheckpointing, ExportConfig, Precision
from megakor.interop.huggingface import export
from megakor.train.metrics import read_metrics
from tests.checkpoint.pieces import snapshot
from tests.distributed.runs import (
    ADAFACTOR,
    BF16,
    PP2,
    TIED,
    Job,
    Made,
    check_same,
    configuration,
    curve,
    run_all,
    run_jobs,
    validation,
    zero,
)
from tests.ranks import run_ranks

SAVING: dict[str, Any] = {"checkpoint__interval": 5, "evaluation__interval": 12}
TP2 = {"parallel__tensor_parallel_size": 2}
SP = {"parallel__sequence_parallel": True}
CP2 = {"parallel__context_parallel_size": 2}
OFFLOAD = {"parallel__offload_optimizer": True}
CHECKPOINTING = {"train__activation_checkpointing": ActivationCheckpointing.full}
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
KILLED = {
    "dp2 zero1 fp32": {"evaluation__interval": 6},
    "dp2 zero1 bf16": BF16,
    "pp2 zero1 bf16": PP2 | BF16,
    "pp2 tied fp32": PP2 | TIED,
    "dp2 zero2 bf16": zero(2) | BF16,
    "dp2 zero0 fp32": zero(0),
    "dp2 adafactor fp32": ADAFACTOR,
    "tp2 sp bf16": TP2 | SP | BF16,
    "dp2 zero3 bf16": zero(3) | BF16,
    "cp2 bf16": CP2 | BF16,
    "dp2 zero2 offload bf16": zero(2) | OFFLOAD | BF16,
    "dp2 dropout": DROPOUT,
    "pp2 dropout": PP2 | DROPOUT,
    "tp2 sp dropout, checkpointing": TP2 | SP | DROPOUT | CHECKPOINTING,
}


@dataclass
class Killed:
    """The folder of the runs, and what went wrong in them."""

    folder: Path
    errors: dict[str, str | None]


@pytest.fixture(scope="module")
def killed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Each run three times: whole; killed in step 8; and the killed one again, in new processes."""
    folder = tmp_path_factory.mktemp("killed")
    whole = [Job(configuration(made, folder / "whole" / name, **SAVING | changes)) for name, changes in KILLED.items()]
    errors = {name: error for name, (error, _) in zip(KILLED, run_all(2, whole), strict=True)}
    again: dict[str, Job] = {}
    for index, (name, changes) in enumerate(KILLED.items()):
        if errors[name] is not None:
            continue
        config = configuration(made, folder / "killed" / name, **SAVING | changes)
        run_ranks(run_jobs, 2, [Job(config, kill=7, rank=index % 2)], killed=True)
        assert 5 <= len(curve(folder / "killed" / name)) <= 7
        again[name] = Job(config)
    saving = configuration(made, folder / "killed" / "while saving", **SAVING | KILLED["dp2 zero1 fp32"])
    run_ranks(run_jobs, 2, [Job(saving, kill_saving=10)], killed=True)
    assert [path.name for path in (folder / "killed/while saving/checkpoints").glob("*10*")] == [
        "step-00000010.writing"
    ]
    again["while saving"] = Job(saving)
    errors |= {name: error for name, (error, _) in zip(again, run_all(2, list(again.values())), strict=True)}
    return Killed(folder, errors)


@pytest.mark.parametrize("name", [*KILLED, "while saving"])
def test_bitwise(killed: Killed, name: str) -> None:
    """Dropout too: its masks depend on the step alone, and no random state is saved."""
    assert killed.errors[name] is None, killed.errors[name]
    whole = killed.folder / "whole" / ("dp2 zero1 fp32" if name == "while saving" else name)
    again = killed.folder / "killed" / name
    assert len(curve(whole)) == 12
    assert curve(again) == curve(whole)
    assert validation(again) == validation(whole)
    last, expected = newest_whole(again, contents=True), newest_whole(whole, contents=True)
    assert last is not None
    assert expected is not None
    assert last.name == "step-00000012"
    for file in expected.glob("*.safetensors"):
        assert (last / file.name).read_bytes() == file.read_bytes()
    assert not list(again.glob("checkpoints/*.writing"))


def test_dropout_is_in_the_killed_runs(killed: Killed) -> None:
    without, dropped = (curve(killed.folder / "whole" / name) for name in ("dp2 zero1 fp32", "dp2 dropout"))
    assert all(abs(row[1] - other[1]) > 1e-5 for row, other in zip(without, dropped, strict=True))


CHAINS = {"plain": {}, "tied": TIED, "adafactor": ADAFACTOR}
LINKS: list[tuple[int, dict[str, Any]]] = [
    (2, TP2),
    (2, PP2),
    (2, zero(3)),
    (4, TP2 | SP | zero(3)),
    (2, CP2),
    (2, zero(2)),
    (4, PP2 | TP2 | SP | CHECKPOINTING),
    (1, {"train__micro_batch_size": 4}),
]
"""Ranks and layout of each link; two steps each."""
STEPS = 2 * len(LINKS)


@pytest.fixture(scope="module")
def chained(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each link goes on from the one before, in processes of its own; beside it the same run on one rank."""
    folder = tmp_path_factory.mktemp("chained")
    # With Adam's usual eps, a gradient that is rounding alone would be divided by its own size.
    every = {
        "checkpoint__interval": 2,
        "train__num_steps": STEPS,
        "evaluation__interval": STEPS,
        "optimizer__eps": 1e-6,
    }
    alone = [Job(configuration(made, folder / f"{name}, one rank", **every | chain)) for name, chain in CHAINS.items()]
    for number, (world_size, link) in enumerate(LINKS, 1):
        jobs = [
            Job(configuration(made, folder / name, **every | chain | link), stop=2 * number)
            for name, chain in CHAINS.items()
        ]
        for error, _ in run_all(world_size, jobs + (alone if world_size == 1 else [])):
            if error is not None:
                pytest.fail(f"link {number}, {link}: {error}")
    return folder


def digests(run: Path) -> dict[int, str]:
    """Of the rows of each step's global batch."""
    return {record["step"]: record["batch_digest"] for record in read_metrics(run) if record["kind"] == "train"}


@pytest.mark.parametrize("name", CHAINS)
def test_resume_in_another_layout(chained: Path, name: str) -> None:
    attempts = [r["step"] for r in read_metrics(chained / name) if r["kind"] == "start"]
    assert attempts == list(range(0, STEPS, 2))
    found, expected = curve(chained / name), curve(chained / f"{name}, one rank")
    assert digests(chained / name) == digests(chained / f"{name}, one rank")
    assert [row[0] for row in found] == [row[0] for row in expected] == list(range(1, STEPS + 1))
    for row, other in zip(found, expected, strict=True):
        assert row[1] == pytest.approx(other[1], rel=1e-5)
        assert row[2] == pytest.approx(other[2], rel=3e-4 if name == "adafactor" else 1e-5)  # see test_layouts.py
    assert validation(chained / name)[-1][1:] == pytest.approx(validation(chained / f"{name}, one rank")[-1][1:], 1e-5)


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_tensor_ranks_save_the_model_of_one_rank(chained: Path, name: str) -> None:
    sharded, whole = (chained / run / "checkpoints/step-00000002" for run in (name, f"{name}, one rank"))
    kept = CheckpointManifest.load(sharded).tensors
    assert kept["weight/gpt_neox.embed_in.weight"].num_shards == 2
    model, _ = load_model(sharded)
    other, _ = load_model(whole)
    for key, parameter in model.named_parameters():
        if not key.endswith("query_key_value.bias"):  # see test_layouts.py
            torch.testing.assert_close(parameter, other.get_parameter(key), rtol=1e-4, atol=1e-6)


def test_tensor_ranks_checkpoints_are_exported(chained: Path, tmp_path: Path) -> None:
    """The folder loads in transformers with the weights of the checkpoint that tensor ranks saved."""
    sharded = chained / "plain" / "checkpoints/step-00000002"
    export(ExportConfig(run=str(sharded), out=str(tmp_path / "out"), precision=Precision.fp32, trim_vocabulary=False))
    model, weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), read_weights(sharded)
    assert torch.equal(model.get_output_embeddings().weight, weights.pop("embed_out.weight"))
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


@pytest.fixture(scope="module")
def started(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 6 of 12, with two checkpoints."""
    run = tmp_path_factory.mktemp("started") / "run"
    run_ranks(run_jobs, 1, [Job(configuration(made, run, checkpoint__interval=3), stop=6)])
    return run


def test_what_would_go_on_otherwise_is_refused(started: Path, made: Made, other: Made, tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, Any], list[str]]] = {
        "tokenizer": ({"data__train": other.train, "data__tokenizer": other.tokenizer, "data__validation": {}},
                      ["data.train=", "and must have the"]),
        "data": ({"data__train": made.heldout}, ["data.train=", "that the run began with"]),
        "order": ({"train__seed": 8, "train__sequence_length": 16},
                  ["train.seed=8 must be 7", "train.sequence_length=16 must be 32"]),
        "batch": ({"train__global_batch_size": 16}, ["train.global_batch_size=16 must be 8"]),
        "model": ({"model__hidden_size": 64, "model__tie_word_embeddings": True, "model__num_hidden_layers": 2},
                  ["model.hidden_size=64 must be 32", "model.tie_word_embeddings=True must be False",
                   "model.num_hidden_layers=2 must be 3"]),
        "optimizer": (ADAFACTOR, ["optimizer.name=adafactor must be adamw"]),
        "never": ({"checkpoint__resume": "never"}, ["run=", "checkpoint.resume=never"]),
    }  # fmt: skip
    jobs = []
    for name, (changes, _) in cases.items():
        shutil.copytree(started, tmp_path / name)
        jobs.append(Job(configuration(made, tmp_path / name, **changes)))
    [answers] = run_ranks(run_jobs, 1, jobs)
    for (name, (_, words)), (error, _) in zip(cases.items(), answers, strict=True):
        assert error is not None, name
        for word in words:
            assert word in error, (name, error)


def test_a_refused_run_leaves_its_folder_as_it_is(started: Path, made: Made, other: Made, tmp_path: Path) -> None:
    """Its configuration and tokenizer belong to its checkpoints: export and generation read them."""
    shutil.copytree(started, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    changes = {"data__train": other.train, "data__tokenizer": other.tokenizer, "data__validation": {}}
    [[(error, _)]] = run_ranks(run_jobs, 1, [Job(configuration(made, tmp_path / "run", **changes))])
    assert error is not None
    after = snapshot(tmp_path / "run")
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()


def test_what_may_change_on_a_resume(started: Path, made: Made, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path / "run")
    changes = {"train__micro_batch_size": 1, "optimizer__lr": 1e-3, "train__num_steps": 14, "train__precision": "bf16"}
    [[(error, _)]] = run_ranks(run_jobs, 1, [Job(configuration(made, tmp_path / "run", **changes))])
    assert error is None
    assert [row[0] for row in curve(tmp_path / "run")] == list(range(1, 15))


def test_another_padding_of_the_vocabulary(started: Path, made: Made, tmp_path: Path) -> None:
    """More rows, then fewer: they take no part, so the curve stays; Adafactor's means count them, so it is refused."""
    shutil.copytree(started, tmp_path / "run")
    shutil.copytree(started, tmp_path / "whole")
    whole = Job(configuration(made, tmp_path / "whole", checkpoint__interval=3))
    wide = {"checkpoint__interval": 3, "model__make_vocab_size_divisible_by": 1024}
    jobs = [
        whole,
        Job(configuration(made, tmp_path / "run", **wide), stop=9),
        Job(configuration(made, tmp_path / "run", checkpoint__interval=3, model__make_vocab_size_divisible_by=2)),
        Job(configuration(made, tmp_path / "adafactor", **ADAFACTOR), stop=3),
        Job(configuration(made, tmp_path / "adafactor", **ADAFACTOR | {"model__make_vocab_size_divisible_by": 1024})),
    ]
    jobs[3].config.checkpoint.interval = 3
    [answers] = run_ranks(run_jobs, 1, jobs)
    assert [error for error, _ in answers[:4]] == [None] * 4
    rows = [CheckpointManifest.load(folder).model["vocab_size"] for folder in committed(tmp_path / "run")]
    assert len(set(rows)) == 3
    for row, other in zip(curve(tmp_path / "run"), curve(tmp_path / "whole"), strict=True):
        assert row[1:] == pytest.approx(other[1:], rel=1e-5)
    error, _ = answers[4]
    assert error is not None
    assert "model.make_vocab_size_divisible_by=1024 must be" in error


def test_a_folder_takes_one_run_at_a_time(started: Path, made: Made, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("process 7 on 어딘가")
    job = Job(configuration(made, tmp_path / "run"))
    with FileLock(tmp_path / "run" / ".lock"):
        (tmp_path / "run" / ".lock").write_text("process 7 on 어딘가")
        before = snapshot(tmp_path / "run")
        [[(error, _)]] = run_ranks(run_jobs, 1, [job])
        assert snapshot(tmp_path / "run") == before
    assert error is not None
    assert "must be a folder that no other run is using; one is: process 7 on 어딘가" in error
    [[(error, _)]] = run_ranks(run_jobs, 1, [job])  # it is free again, though the file is there
    assert error is None


def test_a_damaged_newest_checkpoint_is_passed_over(started: Path, made: Made, tmp_path: Path) -> None:
    jobs = []
    for name in ("damaged", "all damaged", "whole", "done"):
        shutil.copytree(started, tmp_path / name)
        jobs.append(Job(configuration(made, tmp_path / name, checkpoint__interval=3)))
    for name, steps in (("damaged", (6,)), ("all damaged", (3, 6))):
        for step in steps:
            file = tmp_path / name / f"checkpoints/step-{step:08d}/rank-00000.safetensors"
            data = bytearray(file.read_bytes())
            data[-9] ^= 1
            file.write_bytes(data)
    before = snapshot(tmp_path / "all damaged" / "checkpoints")
    [answers] = run_ranks(run_jobs, 1, [*jobs, jobs[-1]])
    (error, lines), (all_error, _), (whole_error, _), *_, (done_error, done_lines) = answers
    assert error is None
    assert whole_error is None
    assert done_error is None
    assert any(line.startswith("WARNING") and "step-00000006" in line and "damaged" in line for line in lines)
    assert curve(tmp_path / "damaged") == curve(tmp_path / "whole")
    assert newest_whole(tmp_path / "damaged", contents=True) == tmp_path / "damaged/checkpoints/step-00000012"
    assert all_error is not None
    assert "must hold a whole checkpoint" in all_error
    assert snapshot(tmp_path / "all damaged" / "checkpoints") == before
    assert any("nothing to do" in line for line in done_lines)


def test_ranks_that_disagree_are_told_on_every_rank(made: Made, tmp_path: Path) -> None:
    first = configuration(made, tmp_path / "run")
    second = configuration(made, tmp_path / "run", optimizer__lr=1e-4)
    answers = run_ranks(check_same, 2, first, second)
    assert answers == ["optimizer.lr=0.0001 on rank 1 must equal rank 0's, 0.003"] * 2
