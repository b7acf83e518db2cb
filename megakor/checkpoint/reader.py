"""Reading: any range of any state tensor, whole weights, or a whole model, from a run or a checkpoint folder."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import torch

from megakor.checkpoint.format import MANIFEST, WEIGHT, CheckpointManifest, TensorEntry, committed, load_whole
from megakor.checkpoint.merged import MergedValues, Weights, base_of
from megakor.checkpoint.tensors import CHUNK, OpenFiles, allow_open_files
from megakor.config.schema import ModelConfig
from megakor.logs import get_logger
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.specs import EMBEDDING, HEAD, WHOLE, Shard, parameter_specs

log = get_logger(__name__)

VOCABULARY = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
"""Parameters with a row for each token."""


class CheckpointValues:
    """A checkpoint as a source of values: reads the bytes that are asked for and no others.

    A context manager, which closes the files. It serves the engine as `megakor.train.values.Values`; any number of
    threads may read at once.

    Args:
        folder: checkpoint folder.
        with_optimizer: whether the optimizer state counts; if not, moments start at zero, as for fine-tuning.
        vocab_size: rows of the embeddings as the reader pads them; None: as they were saved. Rows past the true
            vocabulary are masked everywhere, so those that were not saved are zero.
    """

    def __init__(self, folder: Path, with_optimizer: bool = True, vocab_size: int | None = None) -> None:
        self.folder = folder
        self.manifest = CheckpointManifest.load(folder)
        self.index = self.manifest.check_sizes(folder)
        self.with_optimizer = with_optimizer
        self.vocab_size: int = vocab_size or self.manifest.model.get("vocab_size", 0)
        self._files, self._local = OpenFiles(folder), threading.local()
        allow_open_files(len(self.manifest.files))

    def __enter__(self) -> CheckpointValues:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def optimizer_steps(self) -> int:
        return self.manifest.optimizer["steps"] if self.with_optimizer else 0

    @property
    def loss_scale(self) -> dict[str, float] | None:
        return self.manifest.optimizer["loss_scale"] if self.with_optimizer else None

    @torch.no_grad()
    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None:
        """Fill `out`, 1-D of any type on any device, with elements from `start` on; `CHUNK` of them at a time."""
        if state != WEIGHT and not self.with_optimizer:
            out.zero_()
            return
        direct = out.dtype is torch.float32 and out.is_cpu and out.is_contiguous()
        for first in range(0, out.numel(), CHUNK):
            part = out[first : first + CHUNK]
            if direct:
                self._into(part, state, name, start + first, shard)
            else:
                part.copy_(self.read(state, name, start + first, start + first + part.numel(), shard))

    def weight(self, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements [start, stop) of a flattened fp32 parameter or of a shard of it."""
        return self.read(WEIGHT, name, start, stop, shard)

    def read(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements [start, stop) of a flattened state tensor or of a shard of it, fp32, however it was cut when saved.

        Raises:
            ValueError: the checkpoint does not hold them.
        """
        values = torch.empty(stop - start, dtype=torch.float32)
        self._into(values, state, name, start, shard)
        return values

    def _into(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard) -> None:
        """`read` into a contiguous fp32 tensor on the host."""
        key, stop = f"{state}/{name}", start + out.numel()
        entry = self.manifest.tensors.get(key)
        shape = None if entry is None else self._shape(name, entry)
        if entry is None or shape is None or stop > math.prod(shard.shape(shape)):
            raise ValueError(f"{self.folder}: {key} must be there with at least {stop} elements")
        if shape != entry.shape:  # sharded along its rows, so a shard is a run of the whole
            start += shard.index * math.prod(shape) // shard.count
            there = max(0, min(out.numel(), math.prod(entry.shape) - start))
            out[there:].zero_()  # past the saved rows
            out, shard = out[:there], WHOLE
        if out.numel():
            self._cut(out, key, entry, start, shard)

    def _shape(self, name: str, entry: TensorEntry) -> list[int]:
        """A tensor's shape as the reader wants it."""
        rows = name in VOCABULARY and entry.shape[0] == self.manifest.model.get("vocab_size")
        return [self.vocab_size, *entry.shape[1:]] if rows else entry.shape

    def _cut(self, out: torch.Tensor, key: str, entry: TensorEntry, start: int, shard: Shard) -> None:
        """Elements from `start` on of a shard, from however the tensor was cut when saved."""
        saved, stop = entry.shard(0), start + out.numel()
        if saved.count == shard.count and (shard.count == 1 or saved.dim == shard.dim):
            return self._run(out, key, shard.index, start)
        if saved.count > 1 and shard.count > 1 and saved.dim != shard.dim:
            whole = torch.empty(math.prod(entry.shape), dtype=torch.float32)
            self._cut(whole, key, entry, 0, WHOLE)
            out.copy_(shard.of(whole.view(entry.shape)).flatten()[start:stop])
            return
        # Rows of the tensor as they lie in memory: sharding along the first dimension cuts the one row of all elements.
        dim = saved.dim if saved.count > 1 else shard.dim
        leading = math.prod(entry.shape[:dim])
        columns = math.prod(entry.shape) // leading
        width, saved_width = columns // shard.count, columns // saved.count
        left = width * shard.index  # of the wanted columns
        first_row, last_row = start // width, -(-stop // width)
        whole_rows = start == first_row * width and stop == last_row * width
        rows = out.view(-1, width) if whole_rows and leading > 1 else torch.empty(last_row - first_row, width)
        for index in range(saved.count):
            first, last = max(left, index * saved_width), min(left + width, (index + 1) * saved_width)
            if leading == 1:  # one row: just the wanted columns of it
                a, b = max(first, left + start), min(last, left + stop)
                if a < b:
                    self._run(out[a - left - start : b - left - start], key, index, a - index * saved_width)
            elif first < last:
                values = self._scratch((last_row - first_row) * saved_width).view(-1, saved_width)
                self._run(values.view(-1), key, index, first_row * saved_width)
                own = slice(first - index * saved_width, last - index * saved_width)
                # By numpy: torch would start a team of threads for each of ours.
                rows.numpy()[:, first - left : last - left] = values.numpy()[:, own]
        if leading > 1 and not whole_rows:
            out.copy_(rows.view(-1)[start - first_row * width : stop - first_row * width])

    def _scratch(self, size: int) -> torch.Tensor:
        """Memory of this thread for so many elements, used again: new memory costs as much as reading into it."""
        scratch: torch.Tensor | None = getattr(self._local, "scratch", None)
        if scratch is None or scratch.numel() < size:
            self._local.scratch = scratch = torch.empty(size, dtype=torch.float32)
        return scratch[:size]

    def _run(self, out: torch.Tensor, key: str, shard: int, start: int) -> None:
        """Elements from `start` on of a flattened shard as it was saved."""
        index, stop = self.index, start + out.numel()
        for row in index.overlapping(key, shard, start, stop):
            offset, begin = int(index.offset[row]), int(index.begin[row])
            first, last = max(start, offset), min(stop, offset + int(index.numel[row]))
            name = index.files[index.file[row]]
            self._files.read(name, begin + 4 * (first - offset), out[first - start : last - start])


def newest_whole(run: Path, contents: bool) -> Path | None:
    """The newest committed checkpoint of a run that is whole; damaged ones are named in the log and passed over.

    Args:
        run: run folder.
        contents: whether to compare the SHA-256 of every file too.
    """
    for folder in reversed(committed(run)):
        try:
            load_whole(folder, contents)
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


def open_weights(checkpoint: Path) -> Weights:
    """The weights of a checkpoint, without its optimizer: its own, or its base's with its adapters merged.

    Raises:
        ValueError: its files, or those of its base, are not all there.
    """
    values = CheckpointValues(checkpoint, with_optimizer=False)
    entry = values.manifest.adapters
    return values if entry is None else MergedValues(open_weights(base_of(checkpoint, entry)), values)


def check_whole(checkpoint: Path) -> None:
    """Compare the SHA-256 of every file of a checkpoint, and of its base's. ValueError where one differs."""
    manifest = CheckpointManifest.load(checkpoint)
    manifest.check_contents(checkpoint)
    if manifest.adapters is not None:
        check_whole(base_of(checkpoint, manifest.adapters))


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter, whole, fp32, by canonical name; adapters are merged."""
    found = {}
    with open_weights(checkpoint) as values:
        for spec in parameter_specs(model_config(values.manifest)):
            found[spec.name] = torch.empty(spec.shape, dtype=torch.float32)
            values.fill(found[spec.name].view(-1), WEIGHT, spec.name, 0)
    return found


def load_model(
    checkpoint: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[GPTNeoXForCausalLM, CheckpointManifest]:
    """The whole model of a checkpoint, adapters merged, in evaluation mode, and the checkpoint's manifest.

    It is loaded into host memory, and goes to `device` if one is given.
    """
    with open_weights(checkpoint) as values, torch.no_grad():
        model = GPTNeoXForCausalLM(model_config(values.manifest))
        for name, parameter in model.named_parameters():
            values.fill(parameter.view(-1), WEIGHT, name, 0)
    return model.to(device=device, dtype=dtype).eval(), values.manifest
