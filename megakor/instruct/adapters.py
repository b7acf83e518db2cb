"""What a run of adapters belongs to: told in every checkpoint, and compared when the run goes on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megakor.checkpoint.format import MANIFEST, AdapterEntry, CheckpointManifest
from megakor.config.schema import InstructConfig, LoraConfig
from megakor.files import sha256_of


def adapter_entry(lora: LoraConfig, base: Path, base_step: int) -> AdapterEntry:
    """What checkpoints tell of adapters of a checkpoint's model.

    Args:
        base: the checkpoint's folder.
    """
    targets = sorted(target.value for target in lora.targets)
    return AdapterEntry(lora.rank, lora.alpha, targets, str(base), base_step, sha256_of(base / MANIFEST))


def check_adapters(manifest: CheckpointManifest, config: InstructConfig, ours: AdapterEntry | None) -> None:
    """Raise unless a run goes on with the adapters that its checkpoint has, on the base that they were trained on.

    The base may lie elsewhere by now.
    """
    theirs = manifest.adapters
    goes_on = f"the run goes on from its checkpoint of step {manifest.step}"
    if ours is None or theirs is None:
        if ours is not theirs:
            rank = 0 if theirs is None else theirs.rank
            raise ValueError(f"lora.rank={config.lora.rank} must be {rank}: {goes_on}")
        return
    mine, saved = asdict(ours), asdict(theirs)
    differences = [
        f"lora.{name}={mine[name]} must be {saved[name]}"
        for name in ("rank", "alpha", "targets")
        if mine[name] != saved[name]
    ]
    if ours.base_sha256 != theirs.base_sha256:
        differences.append(
            f"base={config.base} (step {ours.base_step}) must be the checkpoint that the adapters were trained on, "
            f"{theirs.base} (step {theirs.base_step})"
        )
    if differences:
        raise ValueError("; ".join(differences) + f": {goes_on}")
