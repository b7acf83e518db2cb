"""Which checkpoints stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megakor.checkpoint.format import CheckpointManifest, committed
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.save import save_checkpoint
from tests.checkpoint.pieces import manifest, whole_pieces


def saved(
    *steps: int, restarts: tuple[int, ...] = (), losses: dict[int, float] | None = None
) -> list[CheckpointManifest]:
    return [
        replace(
            manifest(step), kept=step not in restarts,
            validation={"held": losses[step]} if losses and step in losses else {},
        )
        for step in steps
    ]  # fmt: skip


@pytest.mark.parametrize(("keep", "manifests", "gone"), [
    (Keep(), saved(1, 2, 3), []),
    (Keep(last=2), saved(1, 2, 3, 4), [1, 2]),
    (Keep(last=1, every=10), saved(5, 10, 15, 20, 25), [5, 15]),
    (Keep(last=1, best="held"), saved(1, 2, 3, losses={1: 3.0, 2: 2.5, 3: 2.6}), [1]),
    (Keep(last=1, best="held"), saved(1, 2, 3, losses={1: 2.5, 2: 2.5, 3: 2.6}), [2]),
    (Keep(last=1, best="held"), saved(1, 2, 3), [1, 2]),
    (Keep(last=2), saved(10, 12, 14, 20, 22, restarts=(12, 14, 22)), [12, 14]),
    (Keep(), saved(10, 12, 14, restarts=(12, 14)), [12]),
    (Keep(last=1), saved(12, 14, restarts=(12, 14)), [12]),
    (Keep(last=1, every=4), saved(4, 8, 12, 16, restarts=(8, 12)), [8, 12]),
])  # fmt: skip
def test_rule(keep: Keep, manifests: list[CheckpointManifest], gone: list[int]) -> None:
    assert keep.goes(manifests) == gone


def test_a_restart_is_replaced_on_the_disk(tmp_path: Path, alone: None) -> None:
    for step in (2, 4, 6, 8, 10, 12):
        kept = replace(manifest(step), kept=step % 5 == 0, validation={"held": float(step)})
        save_checkpoint(tmp_path, kept, whole_pieces(), Keep(last=2, best="held"))
        names = [folder.name for folder in committed(tmp_path)]
        assert f"step-{step:08d}" == names[-1]
    # 2 has the lowest loss; of the restarts the last one is left.
    assert names == ["step-00000002", "step-00000010", "step-00000012"]
