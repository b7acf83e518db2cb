"""The weights in a Hugging Face folder: safetensors files go in, fp32 tensors come out, one at a time.

All headers are read and checked against the architecture before the first value is. Files of any other format are never
opened: what torch.save writes is a pickle, and reading a pickle can run code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open

from megakor.config.rules import require
from megakor.config.schema import ModelConfig
from megakor.model.specs import EMBEDDING, HEAD, ParameterSpec, parameter_specs

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HEAD_NAMES = {"lm_head.weight": f"{HEAD}.weight"}
"""What newer versions of transformers call it. Their files keep the older name, but other writers may not."""
BUFFERS = re.compile(
    r"gpt_neox\.(rotary_emb\.inv_freq|layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq))"
)
"""Masks and rotary frequencies that older versions saved with the weights; they are computed, and not read."""
BLOCK = re.compile(r"gpt_neox\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        key: its name there.
        dtype: in safetensors' words.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class SourceWeights:
    """The parameters of a model by canonical name, as a folder's files hold them.

    Args:
        folder: Hugging Face folder.
        model: its architecture, `vocab_size` as in its `config.json`.

    Attributes:
        files: that hold weights.
        stored: every parameter, each once.

    Raises:
        ValueError: a file is no whole safetensors file, or a tensor is missing, unknown, there twice, or of another
            shape or type than the architecture's.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        named = weight_files(folder)
        self.files = list(named)
        self.stored: dict[str, Stored] = {}
        for path, names in named.items():
            there = tensors_of(path)
            if names is not None and (different := sorted(names ^ {tensor.key for tensor in there})):
                found = "is not there" if different[0] in names else "is not in the index"
                raise ValueError(f"{path}: tensor {different[0]} {found}; {INDEX_FILE} must name a file's tensors")
            for tensor in there:
                self._add(tensor)
        head = self.stored.pop(f"{HEAD}.weight", None) if model.tie_word_embeddings else None
        self._check(folder, model)
        if head is not None and not torch.equal(read(head), self.read(f"{EMBEDDING}.weight")):
            raise ValueError(
                f"{head.path}: tensor {head.key} must equal {EMBEDDING}.weight, or be left out, with "
                "tie_word_embeddings=True"
            )

    def _add(self, tensor: Stored) -> None:
        name = HEAD_NAMES.get(tensor.key, tensor.key)
        if BUFFERS.fullmatch(name):
            return
        if name in self.stored:
            raise ValueError(f"{tensor.path}: tensor {tensor.key} must be there once; {self.stored[name].path} has it")
        self.stored[name] = tensor

    def _check(self, folder: Path, model: ModelConfig) -> None:
        """Raise unless the tensors are those of the architecture."""
        blocks = {int(found[1]) for name in self.stored if (found := BLOCK.match(name))}
        rule = f"be {len(blocks)}, the number of blocks in the files of {folder}"
        require(model.num_hidden_layers == len(blocks), "num_hidden_layers", model.num_hidden_layers, rule)
        specs = {spec.name: spec for spec in parameter_specs(model)}
        for name in sorted(specs.keys() - self.stored.keys()):
            raise ValueError(
                f"{folder}: tensor {name} {list(specs[name].shape)} must be in one of its files; none has it"
            )
        for name in sorted(self.stored.keys() - specs.keys()):
            tensor = self.stored[name]
            raise ValueError(f"{tensor.path}: tensor {tensor.key} must be one of the architecture's, and is unknown")
        for name, tensor in self.stored.items():
            check_tensor(tensor, specs[name])

    @property
    def dtypes(self) -> str:
        """The types of the stored values, in torch's words."""
        return ", ".join(sorted({DTYPES[tensor.dtype] for tensor in self.stored.values()}))

    def read(self, name: str) -> torch.Tensor:
        """A parameter, whole, fp32. ValueError where it holds values that are not finite numbers."""
        tensor = self.stored[name]
        values = read(tensor)
        if not torch.isfinite(values).all():
            raise ValueError(f"{tensor.path}: tensor {tensor.key} must hold finite numbers alone")
        return values


def check_tensor(tensor: Stored, spec: ParameterSpec) -> None:
    """Raise unless a stored tensor has the parameter's shape and a type of ours."""
    where = f"{tensor.path}: tensor {tensor.key}"
    if tensor.shape != spec.shape:
        raise ValueError(f"{where} of shape {list(tensor.shape)} must be of {list(spec.shape)}, as config.json has it")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where} of type {tensor.dtype} must be of {', '.join(DTYPES)}")


def read(tensor: Stored) -> torch.Tensor:
    """The values, fp32: exactly those of the file, whatever their type there.

    The file is opened anew, so that no more of it than this tensor stays mapped.
    """
    with safe_open(tensor.path, "pt") as file:
        return file.get_tensor(tensor.key).float()


def tensors_of(path: Path) -> list[Stored]:
    """What a file's header tells. ValueError when it is no whole safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # which is all that older versions can iterate over
            slices = {key: file.get_slice(key) for key in names}
            return [Stored(path, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]
    except SafetensorError as error:
        rule = "must be a whole safetensors file; files of other formats are not read"
        raise ValueError(f"{path}: {error}; {rule}") from None


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold weights, and the tensors that the index wants in each; None: there is no index.

    As in transformers, a single file goes before an index.

    Raises:
        ValueError: there is none, or the index names what it must not.
    """
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    index = folder / INDEX_FILE
    if not index.is_file():
        refuse(folder)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {folder / name: set() for name in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: damaged ({error!r}); it must map tensors to files under weight_map") from None
    for key, name in weight_map.items():
        where = f"{index}: weight_map.{key}={name}"
        if Path(name).name != name:
            raise ValueError(f"{where} must be a file of the folder itself")
        if not name.endswith(SUFFIX):
            raise ValueError(f"{where} must be a {SUFFIX} file" + (f"; {unsafe(name)}" if is_pickle(name) else ""))
        if not (folder / name).is_file():
            raise ValueError(f"{where} must be there")
        tensors = files[folder / name]
        assert tensors is not None
        tensors.add(key)
    if not files:
        raise ValueError(f"{index}: weight_map must name at least one file")
    return files


def refuse(folder: Path) -> NoReturn:
    """Raise ValueError about a folder without safetensors; what it has instead is named."""
    rule = f"path={folder} must hold {SINGLE_FILE} or {INDEX_FILE}"
    pickles = sorted(path.name for path in folder.iterdir() if is_pickle(path.name))
    raise ValueError(f"{rule}; {unsafe(pickles[0])}" if pickles else f"{rule}, and has neither")


def is_pickle(name: str) -> bool:
    """Whether a file is one of torch.save's, by its name."""
    return name.endswith(PICKLES)


def unsafe(name: str) -> str:
    """Why such a file is not read, and what helps."""
    return (
        f"{name} is not opened: it is a pickle, and reading a pickle can run code. On a machine where it is trusted, "
        "transformers converts it: model.save_pretrained(FOLDER, safe_serialization=True)"
    )
