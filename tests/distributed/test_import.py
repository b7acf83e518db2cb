"""A model that transformers wrote is imported, tuned on two ranks, exported, and loaded by transformers again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakor import pretrain
from megakor.checkpoint.format import step_folder
from megakor.checkpoint.reader import read_weights
from megakor.config.checks import check
from megakor.config.schema import (
    CheckpointConfig,
    ExportConfig,
    ImportModelConfig,
    InstructConfig,
    LoggingConfig,
    LoraConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
    TrainConfig,
    WandbMode,
)
from megakor.instruct import __main__ as instruct
from megakor.interop.huggingface import export
from megakor.interop.import_model import import_model
from megakor.tokenizer.tokenizer import Tokenizer
from tests.distributed.runs import Made, configuration, layout_of_group
from tests.interop.hf_models import write_model
from tests.ranks import run_ranks


def tuning(folder: Path, name: str, parallel: ParallelConfig, rank: int) -> InstructConfig:
    """Two steps from the imported run."""
    config = InstructConfig(
        name=name,
        run=str(folder / name),
        base=str(folder / "run"),
        tokenizer=str(folder / "run" / "tokenizer"),
        pairs=PairsConfig(files=[str(folder / "pairs.jsonl")]),
        lora=LoraConfig(rank=rank),
        parallel=parallel,
        train=TrainConfig(
            num_steps=2, global_batch_size=4, micro_batch_size=2, sequence_length=64, precision=Precision.fp32
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(),
        checkpoint=CheckpointConfig(interval=100),
        logging=LoggingConfig(wandb=WandbMode.disabled, peak_tflops=0.1),
    )
    check(config)
    return config


def tune(folder: Path, made: Made) -> list[str]:
    """Both ranks: all parameters, cut over tensor ranks; then adapters under ZeRO-3. What is refused is returned."""
    instruct.process_group = pretrain.process_group = layout_of_group  # type: ignore[assignment]
    instruct.run(tuning(folder, "all", ParallelConfig(tensor_parallel_size=2), rank=0))
    instruct.run(tuning(folder, "adapters", ParallelConfig(zero_stage=3), rank=2))
    told = []
    for refused in (
        lambda: pretrain.run(configuration(made, folder / "run")),
        lambda: instruct.run(tuning(folder, "run", ParallelConfig(), rank=0)),
    ):
        try:
            refused()
        except ValueError as error:
            told.append(str(error))
    return told


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, made: Made) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("가져온")
    tokenizer = Tokenizer.load(made.tokenizer)
    write_model(folder / "hf", tokenizer, vocab_size=tokenizer.vocab_size + 1, max_shard_size="100KB")
    import_model(ImportModelConfig(str(folder / "hf"), str(folder / "run"), made.tokenizer))
    pairs = [{"instruction": f"{number} 다음은?", "input": "", "output": f"{number + 1}"} for number in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs), encoding="utf-8")
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    told, _ = run_ranks(tune, 2, folder, made)
    after = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    return folder, told


@pytest.mark.parametrize("name", ["all", "adapters"])
def test_from_transformers_to_transformers(name: str, tuned: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = tuned
    figures: dict[str, Any] = export(ExportConfig(str(folder / name), str(tmp_path / "out")))
    assert figures["step"] == 2
    first, last = (AutoModelForCausalLM.from_pretrained(path, local_files_only=True).state_dict()
                   for path in (folder / "hf", tmp_path / "out"))  # fmt: skip
    assert first.keys() == last.keys()
    trained = {key for key, values in last.items() if not torch.equal(values, first[key][: len(values)])}
    if name == "adapters":
        assert trained == {key for key in last if key.endswith("query_key_value.weight")}
    else:
        assert trained == set(last)
    assert all((last[key] - first[key][: len(last[key])]).abs().max() < 0.01 for key in last)


def test_no_run_goes_on_from_weights_alone(tuned: tuple[Path, list[str]]) -> None:
    folder, (pretraining, tuning_there) = tuned
    assert pretraining == (
        f"run={folder / 'run'} must be a folder of its own: its checkpoint of step 0 holds an imported model's "
        f"weights alone, which instruct takes as base={folder / 'run'}"
    )
    assert tuning_there == f"run={folder / 'run'} must be another folder than base={folder / 'run'}"
    assert len(read_weights(step_folder(folder / "run", 0))) == 28
