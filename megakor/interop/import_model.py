"""Import: a Hugging Face folder of a GPT-NeoX model goes in, a run folder comes out, as a base for `megakor instruct`.

    config.json ────────► architecture ┐
    *.safetensors headers ─────────────┴► agree ─► weights, one at a time ─► RUN/checkpoints/step-00000000
    tokenizer of ours ─────────────────────────────────────────────────────► RUN/tokenizer

The run is written aside, compared with its source bit for bit and renamed, so it is whole and checked, or absent.
Nothing in the folder is run, and no pickle is opened.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.reader import VOCABULARY
from megakor.checkpoint.weights import compare_weights, save_weights
from megakor.config.resolved import plain
from megakor.config.schema import ImportModelConfig, ModelConfig
from megakor.files import check_new, check_space, sha256_of
from megakor.instruct.template import FILE as CHAT_TEMPLATE
from megakor.instruct.template import chat_template
from megakor.interop.config_json import CONFIG_FILE, read_architecture
from megakor.interop.folder import written_aside
from megakor.interop.source_weights import SourceWeights
from megakor.interop.tokenizer_files import copy_own_files
from megakor.logs import Progress, get_logger, progress
from megakor.model.specs import num_parameters, resolve_vocabulary
from megakor.tokenizer.tokenizer import Tokenizer

CONFIG = "config.yaml"

log = get_logger(__name__)


def import_model(config: ImportModelConfig) -> None:
    """Write the run folder. One process.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: `run` holds something, the folder holds no such model in safetensors, our model would compute
            something else, or the tokenizer is not one of ours with as many tokens as the embedding has rows at most.
        OSError: the run cannot be written; nothing is left of it.
    """
    folder, run = Path(config.path).absolute(), Path(config.run).absolute()
    check_new("run", run)
    source_model, content = read_architecture(folder)
    weights = SourceWeights(folder, source_model)
    tokenizer = load_tokenizer(config, folder)
    model = fitted(source_model, tokenizer)
    warn_of_other_tokenizer(content, tokenizer)
    size = 4 * num_parameters(model)
    check_space("run", run, size)
    sources = [folder / CONFIG_FILE, *weights.files]
    bar: Progress[None] = progress(
        total=sum(path.stat().st_size for path in sources) + 2 * size, unit="B", description="import"
    )
    log.info("import-model: %s -> %s", folder, run)
    with written_aside(run, key="run", replaces=False) as aside, bar:

        def read(name: str) -> torch.Tensor:
            values = weights.read(name)
            if name in VOCABULARY:
                assert model.vocab_size is not None
                values = functional.pad(values, (0, 0, 0, model.vocab_size - len(values)))
            bar.update(4 * values.numel())
            return values

        imported = {
            "path": str(folder),
            "dtype": weights.dtypes,
            "tokenizer": str(tokenizer.folder.absolute()),
            "files": {path.name: sha256_of(path, bar.update) for path in sources},
        }
        manifest = CheckpointManifest(
            step=0,
            num_tokens=tokenizer.vocab_size,
            model=plain(model),
            tokenizer_fingerprint=tokenizer.fingerprint,
            optimizer={},
            data={},
            train={"imported": imported},
        )
        checkpoint = save_weights(aside, manifest, read)
        compare_weights(checkpoint, read)
        copy_tokenizer(tokenizer.folder, folder, aside / "tokenizer")
        text = yaml.safe_dump(manifest.train, allow_unicode=True, sort_keys=False)
        (aside / CONFIG).write_text(text, encoding="utf-8")
    log.info(
        "import-model: %s parameters of %s, every one compared with its source; embedding rows %s -> %s",
        f"{num_parameters(source_model):,}",
        weights.dtypes,
        f"{source_model.vocab_size:,}",
        f"{model.vocab_size:,}",
    )


def load_tokenizer(config: ImportModelConfig, folder: Path) -> Tokenizer:
    """The tokenizer that the configuration names, or the folder's own. ValueError where that is none of ours."""
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    try:
        return Tokenizer.load(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"tokenizer=null must be the folder of a tokenizer of megakor's: path={folder} has none of its own "
            f"({error}). Tokenizers of other kinds, such as byte-level BPE, are not supported"
        ) from None


def fitted(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The architecture with the rows of its embedding rounded up, so that tensor ranks divide them.

    Raises:
        ValueError: the tokenizer has more tokens than there are rows.
    """
    try:
        rows = resolve_vocabulary(model, tokenizer.vocab_size).vocab_size
    except ValueError as error:
        raise ValueError(f"tokenizer={tokenizer.folder}: {error}") from None
    assert rows is not None
    multiple = model.make_vocab_size_divisible_by
    return dataclasses.replace(model, vocab_size=math.ceil(rows / multiple) * multiple)


def warn_of_other_tokenizer(content: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Say so where the end of text is another than the model's: nothing else tells which tokenizer it learnt with."""
    end = content.get("eos_token_id")
    if end is not None and tokenizer.eod_id not in (end if isinstance(end, list) else [end]):
        log.warning(
            "%s: eos_token_id=%s is not %s, the end of text in tokenizer=%s; is it the one the model was trained with?",
            CONFIG_FILE, end, tokenizer.eod_id, tokenizer.folder,
        )  # fmt: skip


def copy_tokenizer(tokenizer: Path, folder: Path, out: Path) -> None:
    """Copy the tokenizer, and the chat template where the model came with ours."""
    out.mkdir()
    copy_own_files(tokenizer, out)
    template = folder / CHAT_TEMPLATE
    if template.is_file() and template.read_bytes() == chat_template().encode():
        shutil.copyfile(template, out / CHAT_TEMPLATE)
