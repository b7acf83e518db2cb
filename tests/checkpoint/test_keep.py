"""Which checkpoints stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megakor.checkpoint.format import CheckpointManifest, committed
from megakor.checkpoint.keep import Keep, prune
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


def test_a_removal_that_is_cut_off_leaves_no_damaged_checkpoint(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun to be removed bears no checkpoint's name any more, and goes with the next save."""
    for step in (5, 10):
        save_checkpoint(tmp_path, manifest(step), whole_pieces())

    def cut_off(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            next(folder.glob("*.safetensors")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megakor.checkpoint.keep.shutil.rmtree", cut_off)
        prune(tmp_path, 10, Keep(last=1))
    assert [folder.name for folder in committed(tmp_path)] == ["step-00000010"]
    save_checkpoint(tmp_path, manifest(15), whole_pieces())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest", "step-00000010", "step-00000015",
    ]  # fmt: skip
