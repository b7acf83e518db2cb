"""Reading: any range of any state tensor, whole weights, or a whole model, from a run or a checkpoint folder."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megakor.checkpoint.format import (
    MANIFEST,
    WEIGHT,
    CheckpointManifest,
    TensorEntry,
    committed,
    piece_key,
    step_of,
)
from megakor.config.schema import ModelConfig
from megakor.logs import get_logger
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.parameters import WHOLE, Shard, parameter_specs

log = get_logger(__name__)


class CheckpointValues:
    """A checkpoint as a source of values: reads the elements that are asked for and no others.

    A context manager, which closes the files. It serves the engine as `megakor.train.engine.Values`.

    Args:
        folder: checkpoint folder.
        with_optimizer: whether the optimizer state counts; if not, moments start at zero, as for fine-tuning.
    """

    def __init__(self, folder: Path, with_optimizer: bool = True) -> None:
        self.folder = folder
        self.manifest = CheckpointManifest.load(folder)
        self.manifest.check_sizes(folder)
        self.with_optimizer = with_optimizer
        self.handles: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> CheckpointValues:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handles.clear()
        self.stack.close()

    @property
    def optimizer_steps(self) -> int:
        return self.manifest.optimizer["steps"] if self.with_optimizer else 0

    @property
    def loss_scale(self) -> dict[str, float] | None:
        return self.manifest.optimizer["loss_scale"] if self.with_optimizer else None

    def weight(self, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements [start, stop) of a flattened fp32 parameter or of a shard of it."""
        return self.read(WEIGHT, name, start, stop, shard)

    def state(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements [start, stop) of a flattened optimizer state or of a shard of it."""
        return self.read(state, name, start, stop, shard) if self.with_optimizer else torch.zeros(stop - start)

    def read(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements [start, stop) of a flattened state tensor or of a shard of it, fp32, however it was cut when saved.

        Raises:
            ValueError: the checkpoint does not hold them.
        """
        key = f"{state}/{name}"
        entry = self.manifest.tensors.get(key)
        if entry is None or stop > math.prod(shard.shape(entry.shape)):
            raise ValueError(f"{self.folder}: {key} must be there with at least {stop} elements")
        saved = entry.shard(0)
        if saved.count == shard.count and (shard.count == 1 or saved.dim == shard.dim):
            return self.run(key, entry, shard.index, start, stop)
        if saved.count > 1 and shard.count > 1 and saved.dim != shard.dim:
            whole = self.read(state, name, 0, math.prod(entry.shape))
            return shard.of(whole.view(entry.shape)).flatten()[start:stop]
        # Rows of the tensor as they lie in memory: sharding along the first dimension cuts the one row of all elements.
        dim = saved.dim if saved.count > 1 else shard.dim
        leading = math.prod(entry.shape[:dim])
        columns = math.prod(entry.shape) // leading
        width = columns // shard.count
        first_row, last_row = start // width, -(-stop // width)
        rows = torch.empty(last_row - first_row, width, dtype=torch.float32)
        left = width * shard.index  # of the wanted columns
        saved_width = columns // saved.count
        for index in range(saved.count):
            first, last = max(left, index * saved_width), min(left + width, (index + 1) * saved_width)
            if first >= last:
                continue
            if leading == 1:  # one row: just the wanted columns of it
                a, b = max(first, left + start), min(last, left + stop)
                if a < b:
                    values = self.run(key, entry, index, a - index * saved_width, b - index * saved_width)
                    rows[0, a - left : b - left] = values
                continue
            values = self.run(key, entry, index, first_row * saved_width, last_row * saved_width)
            taken = values.view(-1, saved_width)[:, first - index * saved_width : last - index * saved_width]
            rows[:, first - left : last - left] = taken
        return rows.flatten()[start - first_row * width : stop - first_row * width]

    def run(self, key: str, entry: TensorEntry, shard: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened shard as it was saved."""
        result = torch.empty(stop - start, dtype=torch.float32)
        for file, index, offset, numel in entry.pieces:
            first, last = max(start, offset), min(stop, offset + numel)
            if index == shard and first < last:
                piece = self.open(file).get_slice(piece_key(key, entry.num_shards, shard, offset))
                result[first - start : last - start] = piece[first - offset : last - offset]
        return result

    def open(self, file: str) -> Any:
        if file not in self.handles:
            try:
                self.handles[file] = self.stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{self.folder / file}: damaged ({error}); it must be a safetensors file") from None
        return self.handles[file]


def newest_whole(run: Path, contents: bool) -> Path | None:
    """The newest committed checkpoint of a run that is whole; damaged ones are named in the log and passed over.

    Args:
        run: run folder.
        contents: whether to compare the SHA-256 of every file too.
    """
    for folder in reversed(committed(run)):
        try:
            manifest = CheckpointManifest.load(folder)
            if manifest.step != step_of(folder):
                raise ValueError(f"{folder}: step={manifest.step} in its manifest must be that of its name")
            manifest.check_contents(folder) if contents else manifest.check_sizes(folder)
            return folder
        except ValueError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest whole one of a run folder."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"run={path} must be a run folder or a checkpoint folder")
    found = newest_whole(path, contents=False)
    if found is None:
        raise ValueError(f"run={path} must hold at least one whole checkpoint")
    return found


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in."""
    return checkpoint.parent.parent


def model_config(manifest: CheckpointManifest) -> ModelConfig:
    """The architecture of a checkpoint."""
    return ModelConfig(**manifest.model)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter, whole, fp32, by canonical name."""
    with CheckpointValues(checkpoint) as values:
        specs = parameter_specs(model_config(values.manifest))
        return {spec.name: values.weight(spec.name, 0, math.prod(spec.shape)).view(spec.shape) for spec in specs}


def load_model(
    checkpoint: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[GPTNeoXForCausalLM, CheckpointManifest]:
    """The whole model of a checkpoint, in evaluation mode, and the checkpoint's manifest.

    It is loaded into host memory, and goes to `device` if one is given.
    """
    with CheckpointValues(checkpoint) as values, torch.no_grad():
        model = GPTNeoXForCausalLM(model_config(values.manifest))
        for name, parameter in model.named_parameters():
            parameter.copy_(values.weight(name, 0, parameter.numel()).view(parameter.shape))
    return model.to(device=device, dtype=dtype).eval(), values.manifest
