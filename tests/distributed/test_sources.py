"""Pretraining from all that it can read: mixtures, other makers' shards, elsewhere, a dataset; and its ledger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megakor.checkpoint.format import CheckpointManifest
from megakor.config.schema import EvaluateConfig, PretrainConfig, TraceConfig
from megakor.data.indexed import IndexedReader, IndexedWriter
from megakor.data.source import Source
from megakor.evaluate.bits_per_byte import evaluate
from megakor.trace.trace import trace
from megakor.train.metrics import read_metrics
from tests.data.conftest import KEYS
from tests.data.faulty import s3_server
from tests.distributed.runs import Job, Made, configuration, curve, run_job, run_jobs, validation
from tests.ranks import run_ranks

MIXED = {"data__train": None, "data__weights": {"글": 3.0, "다른 글": 1.0}, "train__batch_sizes": {20: 4},
         "train__sequence_lengths": {30: 16}, "data__separate_documents": True, "train__num_steps": 6,
         "checkpoint__interval": 3, "evaluation__interval": 6}  # fmt: skip


def run_over(address: str, jobs: list[Job]) -> list[Any]:
    """The jobs, with the keys of an S3 server at an address."""
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address}
    return run_jobs(jobs)


@pytest.fixture(scope="module")
def other_makers(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out shards again, as one Megatron pair without a manifest."""
    prefix = tmp_path_factory.mktemp("pair") / "text_document"
    writer = IndexedWriter(prefix, np.dtype(Source(made.heldout).manifest.dtype))
    for entry in Source(made.heldout).manifest.shards:
        reader = IndexedReader(Path(made.heldout) / entry.prefix)
        for number in range(len(reader)):
            writer.add_document(reader[number])
    writer.close()
    return prefix


def test_one_curve_from_here_and_from_s3_and_its_ledger(
    made: Made, other_makers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixture with documents kept apart and batches and rows that grow, on one rank and on two."""
    pytest.importorskip("moto")
    import fsspec

    with s3_server() as (address, faults), pytest.MonkeyPatch.context() as patch:
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(key, value)
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("shards")
        for name, folder in (("train", made.train), ("held", made.heldout)):
            files.pipe({f"shards/{name}/{path.name}": path.read_bytes() for path in Path(folder).iterdir()})
        faults.failing = 0.05
        here = {**MIXED, "data__sources": {"글": made.train, "다른 글": str(other_makers)}}
        there = {**MIXED, "data__sources": {"글": "s3://shards/train", "다른 글": str(other_makers)},
                 "data__cache": str(tmp_path / "cache")}  # fmt: skip
        ((local,),) = run_ranks(run_over, 1, address, [Job(configuration(made, tmp_path / "here", **here))])
        jobs = [Job(configuration(made, tmp_path / "there", **there), stop=3)]
        (first,), _ = run_ranks(run_over, 2, address, jobs)
        ((second,),) = run_ranks(run_over, 1, address, [Job(configuration(made, tmp_path / "there", **there))])
        evaluation = EvaluateConfig(
            run=str(tmp_path / "here"), heldout="s3://shards/held", train="s3://shards/train", micro_batch_size=2,
            cache=str(tmp_path / "another cache"),
        )  # fmt: skip
        figures = evaluate(evaluation)
    assert [local[0], first[0], second[0]] == [None, None, None]
    assert validation(tmp_path / "there")[-1][1:] == pytest.approx(validation(tmp_path / "here")[-1][1:], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(validation(tmp_path / "here")[-1][2], rel=1e-5)
    expected, found = curve(tmp_path / "here"), curve(tmp_path / "there")
    assert [row[0] for row in found] == list(range(1, 7))
    for row, other in zip(found, expected, strict=True):
        assert row[1:] == pytest.approx(other[1:], rel=1e-5)
    tokens = [record["tokens"] for record in read_metrics(tmp_path / "here") if record["kind"] == "train"]
    assert tokens == [32 * size for size in (4, 8, 12, 16, 20, 28)]  # five steps of 4 samples, then of 8
    trace(TraceConfig(run=str(tmp_path / "here"), step=6, format="json"))
    passages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {passage["row"] for passage in passages} == set(range(8))
    assert {passage["source"] for passage in passages} == {"글", "다른 글"}
    assert all((passage["document"] is None) is (passage["source"] == "다른 글") for passage in passages)


def test_a_dataset_as_it_is_read(made: Made, tmp_path: Path) -> None:
    """On one rank, and stopped and gone on with on two."""
    texts = [f"{number}번째 글은 짧다. " * 6 for number in range(60)]
    records = tmp_path / "글.jsonl"
    records.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    changes = {
        "data__train": None, "data__dataset": {"path": "json", "data_files": str(records), "split": "train"},
        "train__num_steps": 4, "checkpoint__interval": 2, "evaluation__interval": 0,
    }  # fmt: skip
    whole, parts = (Job(configuration(made, tmp_path / name, **changes)) for name in ("whole", "parts"))
    stopped = Job(configuration(made, tmp_path / "parts", **changes), stop=2)
    ((first,), _) = run_ranks(run_over, 2, "http://unused", [stopped])
    ((one, second),) = run_ranks(run_over, 1, "http://unused", [whole, parts])
    assert [first[0], one[0], second[0]] == [None, None, None]
    for row, other in zip(curve(tmp_path / "parts"), curve(tmp_path / "whole"), strict=True):
        assert row[1:] == pytest.approx(other[1:], rel=1e-5)
    saved = CheckpointManifest.load(tmp_path / "whole" / "checkpoints" / "step-00000004")
    assert saved.data["data.dataset"]["path"] == "json"
    with pytest.raises(ValueError, match=r"the steps of data\.dataset cannot be traced"):
        trace(TraceConfig(run=str(tmp_path / "whole"), step=1))


def run_elsewhere(config: PretrainConfig, other: str) -> tuple[str | None, list[str]]:
    """A run whose rank 1 finds other shards under the same path, as on a node with a disk of its own."""
    if dist.get_rank() == 1:
        config.data.train = other
    return run_job(Job(config))


def test_ranks_with_other_shards_are_refused(made: Made, tmp_path: Path) -> None:
    answers = run_ranks(run_elsewhere, 2, configuration(made, tmp_path / "run", data__validation={}), made.heldout)
    errors = {error for error, _ in answers}
    assert len(errors) == 1
    (error,) = errors
    assert error is not None
    assert "data.train=" in error
    assert "on rank 1 must equal rank 0's" in error
