"""A checkpoint of weights alone, from a source that is read one tensor at a time: what an import writes.

    parameter ─► values, fp32 ─► rank-00000.safetensors ─► table, manifest, rename

It has no optimizer state and no data state, so fine-tuning starts from it and no run goes on from it. One process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from megakor.checkpoint.format import ASIDE, WEIGHT, CheckpointManifest, piece_key, step_folder
from megakor.checkpoint.pieces import Held
from megakor.checkpoint.reader import CheckpointValues, model_config
from megakor.checkpoint.save import Written, commit, make_empty
from megakor.checkpoint.tensors import write_values
from megakor.files import share
from megakor.model.specs import parameter_specs

NAME = "rank-00000.safetensors"

Read = Callable[[str], torch.Tensor]
"""A parameter by its canonical name: whole, fp32, with its rows padded."""


def save_weights(run: Path, manifest: CheckpointManifest, read: Read) -> Path:
    """Write a checkpoint of `manifest.step` and make it the run's latest. Its folder.

    Host memory: three tensors.

    Args:
        manifest: without optimizer, files and tensors.
        read: called once for every parameter.

    Raises:
        OSError: it cannot be written; there is no such checkpoint then.
    """
    assert manifest.weights_alone
    specs = parameter_specs(model_config(manifest))
    folder = step_folder(run, manifest.step)
    aside = folder.with_name(folder.name + ASIDE)
    make_empty(aside)
    sizes = [(piece_key(f"{WEIGHT}/{spec.name}", 1, 0, 0), math.prod(spec.shape)) for spec in specs]
    entry, begins = write_values(aside / NAME, sizes, (read(spec.name).flatten() for spec in specs), 1)
    share(aside / NAME)
    held = [
        Held(f"{WEIGHT}/{spec.name}", spec.shape, 0, 1, 0, 0, numel, begin)
        for spec, (_, numel), begin in zip(specs, sizes, begins, strict=True)
    ]
    commit(aside, folder, manifest, [Written(NAME, entry, held)])
    return folder


def compare_weights(folder: Path, read: Read) -> None:
    """Raise ValueError unless every weight of a checkpoint is its source's, bit for bit. Host memory: three tensors."""
    with CheckpointValues(folder, with_optimizer=False) as values:
        for spec in parameter_specs(model_config(values.manifest)):
            written = values.weight(spec.name, 0, math.prod(spec.shape))
            if not torch.equal(written.view(torch.int32), read(spec.name).flatten().view(torch.int32)):
                raise ValueError(f"{folder}: {spec.name} must be its source's, bit for bit; it was written otherwise")
