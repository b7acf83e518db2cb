from __future__ import annotations

import pytest
import torch

from megakor.config.schema import Precision
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
