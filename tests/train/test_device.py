from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakor import logs
from megakor.config.schema import Precision
from megakor.model.documents import Attending, all_at_once, one_by_one
from megakor.train import device
from tests.config.commands import PRETRAIN, command


def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_cpu", lambda: True)
    with pytest.raises(ValueError, match=r"train\.precision=fp16 must be bf16 or fp32 on a CPU"):
        device.check_precision(Precision.fp16)
    device.check_precision(Precision.fp32)


def test_fp16_elsewhere_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    device.check_precision(Precision.fp16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can train in fp16")
def test_fp16_is_one_line_at_the_command_line() -> None:
    ended = command("-m", "megakor", "pretrain", *PRETRAIN, "train.precision=fp16")
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if "real_accelerator" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("megakor pretrain: error: train.precision=fp16 must be bf16 or fp32 on a CPU")


@pytest.mark.parametrize(
    ("kind", "capability", "version", "precision", "expected"),
    [
        ("cuda:0", (8, 0), (2, 13), Precision.bf16, all_at_once),
        ("cuda:0", (9, 0), (2, 14), Precision.fp16, all_at_once),
        ("cuda:0", (9, 0), (2, 13), Precision.fp32, one_by_one),
        ("cuda:0", (7, 5), (2, 13), Precision.fp16, one_by_one),
        ("cuda:0", (9, 0), (2, 12), Precision.bf16, one_by_one),
        ("xpu:0", (9, 0), (2, 13), Precision.bf16, one_by_one),
        ("cpu", (9, 0), (2, 13), Precision.bf16, one_by_one),
    ],
)
def test_documents_attend_at_once_where_the_kernel_is(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capability: tuple[int, int],
    version: tuple[int, int],
    precision: Precision,
    expected: Attending,
) -> None:
    monkeypatch.setattr(device, "device", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(f"{version[0]}.{version[1]}.0"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(get_device_capability=lambda: capability))
    assert device.attending(precision) is expected
    chosen: Any = device.attending(precision, compiled=True)
    if expected is all_at_once:
        assert chosen.func is all_at_once
        chosen = chosen.keywords["otherwise"]
    assert chosen._torchdynamo_disable
    assert chosen.__wrapped__ is one_by_one


def test_ranks_under_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own names are heeded where the usual ones are not set; the log knows the rank as well."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # remembered, so that what is set here is gone afterwards
        monkeypatch.delenv(name)
    for name, value in {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert logs.rank() == 5
    assert not device.take_place()
    assert [os.environ[name] for name in names[:4]] == ["5", "8", "1", "4"]
    assert device.local_world_size() == 4
