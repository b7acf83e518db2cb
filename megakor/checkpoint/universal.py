"""DeepSpeed's universal checkpoint: written from ours, for engines of DeepSpeed's own.

    OUT/latest_universal                                       "global_step100"
    OUT/global_step100/mp_rank_00_model_states.pt              counters; no weights
                       zero/optimizer_state.pt                 groups without settings
                       zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt  whole tensors, fp32
                       zero/NAME/step.pt                       updates done

`NAME` is a parameter's canonical name, which is what `megakor.model.gpt_neox.GPTNeoXForCausalLM` calls it, and so what
DeepSpeed's plain engine looks for. An engine with `"checkpoint": {"load_universal": true}` loads the folder by
`load_checkpoint(OUT)`. The files are torch.save's, with tensors and plain values alone in them; they are written one
tensor at a time. DeepSpeed need not be installed. The format is that of deepspeed/checkpoint/ds_to_universal.py, and
Lian et al. 2024 (arXiv:2406.18820) describe it.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from megakor.checkpoint.format import WEIGHT, CheckpointManifest
from megakor.checkpoint.reader import VOCABULARY, CheckpointValues, model_config, resolve
from megakor.config.schema import ExportUniversalConfig, OptimizerName
from megakor.files import check_new, check_space, sync
from megakor.logs import Progress, get_logger, progress
from megakor.model.specs import ParameterSpec, num_parameters, parameter_specs

DEEPSPEED_VERSION = "0.19.8"
"""Whose loader was read and tried."""
FORMAT_VERSION = 0.4
STATES = {"fp32": WEIGHT, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""DeepSpeed's names of the states, and ours."""
LATEST_UNIVERSAL = "latest_universal"
BYTES_A_PARAMETER = 12

log = get_logger(__name__)


def export_universal(config: ExportUniversalConfig) -> None:
    """Write a checkpoint of AdamW in DeepSpeed's universal format. One process; host memory: a tensor and 64 MiB.

    Raises:
        ValueError: the checkpoint is not whole, holds weights or adapters alone, its optimizer is not AdamW, or `out`
            holds something.
        OSError: the folder cannot be written; nothing is left of it.
    """
    checkpoint = resolve(config.run)
    out = Path(config.out).absolute()
    check_new("out", out)
    manifest = CheckpointManifest.load(checkpoint)
    if manifest.weights_alone:
        raise ValueError(
            f"run={config.run} must be a run that trained: {checkpoint} has weights and no optimizer state"
        )
    name = manifest.optimizer["name"]
    if name != OptimizerName.adamw.value:
        rule = f"must be {OptimizerName.adamw.value}: DeepSpeed's universal format has no place for its moments"
        raise ValueError(f"{checkpoint}: optimizer.name={name} {rule}")
    if manifest.adapters is not None:
        rule = "must be a run that trained all parameters; megakor export writes adapters merged into their base"
        raise ValueError(f"run={config.run} {rule}")
    check_space("out", out, BYTES_A_PARAMETER * num_parameters(model_config(manifest)))
    manifest.check_contents(checkpoint)
    aside = out.with_name(f".{out.name}.partial")
    if aside.exists():
        shutil.rmtree(aside)  # left by an export that was killed
    try:
        folder = aside / f"global_step{manifest.step}"
        (folder / "zero").mkdir(parents=True)
        with CheckpointValues(checkpoint) as values:
            write_tensors(folder / "zero", values)
        save(optimizer_state(manifest), folder / "zero" / "optimizer_state.pt")
        save(model_states(manifest), folder / "mp_rank_00_model_states.pt")
        (aside / LATEST_UNIVERSAL).write_text(folder.name, encoding="utf-8")
        for path in (aside / LATEST_UNIVERSAL, folder / "zero", folder, aside):
            sync(path)
        os.rename(aside, out)  # an empty folder gives way
        sync(out.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        raise OSError(f"out={config.out}: {error}; nothing was exported") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("export-universal: %s -> %s", checkpoint, out / folder.name)


def write_tensors(folder: Path, values: CheckpointValues) -> None:
    """A folder for each parameter: its value, its moments, the updates done."""
    specs = parameter_specs(model_config(values.manifest))
    total = sum(BYTES_A_PARAMETER * torch.Size(spec.shape).numel() for spec in specs)
    bar: Progress[None] = progress(total=total, unit="B", description="export")
    with bar:
        for spec in specs:
            own = folder / spec.name
            own.mkdir()
            for state, ours in STATES.items():
                tensor = torch.empty(spec.shape, dtype=torch.float32)
                values.fill(tensor.view(-1), ours, spec.name, 0)
                save({"param": tensor, **cut(spec, values.manifest)}, own / f"{state}.pt")
                bar.update(4 * tensor.numel())
            save(num_updates(values.manifest), own / "step.pt")
            sync(own)


def cut(spec: ParameterSpec, manifest: CheckpointManifest) -> dict[str, Any]:
    """How an engine with tensor ranks cuts a parameter, and whether it may pad its rows."""
    vocabulary = spec.name in VOCABULARY and spec.shape[0] == manifest.model["vocab_size"]
    return {"cat_dim": spec.shard_dim or 0, **({"vocab_tensor": True} if vocabulary else {})}


def num_updates(manifest: CheckpointManifest) -> torch.Tensor:
    """The optimizer's count of updates as torch's AdamW holds it: fewer than steps where fp16 has skipped some."""
    return torch.tensor(float(manifest.optimizer["steps"]), dtype=torch.float32)


def optimizer_state(manifest: CheckpointManifest) -> dict[str, Any]:
    """What an engine's ZeRO optimizer is to take over besides tensors: nothing but the fact that there are groups.

    DeepSpeed's loader gives its groups the settings of those here, by their position. A group without settings keeps
    those of the engine's own configuration, whatever the groups are. It goes through as many groups as are here, so
    there are as many as an engine can have.
    """
    groups: list[dict[str, Any]] = [{"params": []} for _ in parameter_specs(model_config(manifest))]
    return {"ds_version": DEEPSPEED_VERSION, "param_groups": groups}


def model_states(manifest: CheckpointManifest) -> dict[str, Any]:
    """Counters that DeepSpeed's engine takes over, and under `megakor` what comes back as client state."""
    updates = int(manifest.optimizer["steps"])
    specs = parameter_specs(model_config(manifest))
    return {
        "module": {},  # the loader takes the weights from zero/
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{spec.name: torch.Size(spec.shape) for spec in specs}],
        "lr_scheduler": {"last_batch_iteration": updates - 1},
        "data_sampler": None,
        "random_ltd": None,
        "global_steps": manifest.step,
        "skipped_steps": manifest.step - updates,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": DEEPSPEED_VERSION,
        "universal_checkpoint_info": {
            "universal_checkpoint_version": FORMAT_VERSION,
            "original_vocab_size": manifest.num_tokens,
            "padded_vocab_size": manifest.model["vocab_size"],
        },
        "megakor": {
            "step": manifest.step,
            "num_tokens": manifest.num_tokens,
            "model": manifest.model,
            "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
            "optimizer": manifest.optimizer,
            "data": manifest.data,
            "train": manifest.train,
        },
    }


def save(content: Any, path: Path) -> None:
    """Write a file of torch's and sync it."""
    torch.save(content, path)
    sync(path)
