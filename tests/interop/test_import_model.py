"""`megakor import-model`: what transformers wrote is a run of ours, to the bit, and every verb takes it as one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from megakor.checkpoint import save as saving
from megakor.checkpoint import weights as weights_module
from megakor.checkpoint.__main__ import run as act
from megakor.checkpoint.format import CheckpointManifest, step_folder
from megakor.checkpoint.reader import load_model, model_config, read_weights, resolve
from megakor.config.compose import main
from megakor.config.schema import (
    EvaluateConfig,
    ExportConfig,
    ExportUniversalConfig,
    GenerateConfig,
    ImportModelConfig,
    Precision,
    ReportConfig,
    ShardConfig,
    TraceConfig,
)
from megakor.data.build import build_shards
from megakor.evaluate.bits_per_byte import evaluate
from megakor.files import sha256_of
from megakor.generate.speaker import Speaker
from megakor.import_model import run as import_run
from megakor.instruct.template import chat_template
from megakor.interop.huggingface import export
from megakor.interop.import_model import import_model
from megakor.logs import get_logger
from megakor.model.specs import num_parameters
from megakor.report.__main__ import run as report
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.trace.__main__ import run as trace
from tests.interop.conftest import MODEL, write_run
from tests.interop.hf_models import edit_config, edit_weights, write_model

HEAD_AND_EMBEDDING = ("embed_out.weight", "gpt_neox.embed_in.weight")


def import_into(run: Path, path: Path, tokenizer: Tokenizer | None) -> Path:
    """The checkpoint that an import writes."""
    import_model(ImportModelConfig(str(path), str(run), None if tokenizer is None else str(tokenizer.folder)))
    return resolve(run)


def state_of(model: GPTNeoXForCausalLM) -> dict[str, torch.Tensor]:
    """Its parameters by canonical name, fp32."""
    named = {name.replace("lm_head.", "embed_out."): value.float() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del named["embed_out.weight"]
    return named


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FULL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "sequential": {"use_parallel_residual": False, "layer_norm_eps": 1e-2},
    "no biases": {"attention_bias": False, "intermediate_size": 48},
    "tied": {"tie_word_embeddings": True, "num_attention_heads": 4},
    "rotary": {"rope_parameters": FULL, "max_position_embeddings": 128},
    "shards": {"max_shard_size": "40KB", "num_hidden_layers": 3},
    "bf16 tied": {"dtype": torch.bfloat16, "tie_word_embeddings": True},
    "fp16 shards": {"dtype": torch.float16, "max_shard_size": "40KB", "use_parallel_residual": False},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_logits_and_weights_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path, bpe: Tokenizer) -> None:
    theirs = write_model(tmp_path / "모델", bpe, **changes)
    assert ("max_shard_size" in changes) == (tmp_path / "모델" / "model.safetensors.index.json").is_file()
    checkpoint = import_into(tmp_path / "run", tmp_path / "모델", bpe)
    assert names_in(tmp_path) == ["run", "모델"]
    found, expected = read_weights(checkpoint), state_of(theirs)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        rows = found[name][: len(values)]
        assert torch.equal(rows.view(torch.int32), values.contiguous().view(torch.int32)), name
        assert len(found[name]) == (1408 if name in HEAD_AND_EMBEDDING else len(values))
        assert not found[name][len(values) :].any()
    ours, manifest = load_model(checkpoint)
    assert manifest.num_tokens == bpe.vocab_size == 1400
    input_ids = torch.randint(bpe.vocab_size, (2, 90), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "모델", local_files_only=True, dtype=torch.float32)
        logits = loaded(input_ids).logits
        difference = (ours(input_ids)[..., : bpe.vocab_size] - logits).abs().max()
    assert logits.std() > 0.1
    assert difference < 2e-5


def test_settings_show_in_the_logits(tmp_path: Path, bpe: Tokenizer) -> None:
    """The comparison above can fail: another value of each setting gives other logits."""
    write_model(tmp_path / "hf", bpe)
    input_ids = torch.arange(60).view(1, -1)

    def logits(**changes: Any) -> torch.Tensor:
        edit_config(tmp_path / "hf", **changes)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        model, _ = load_model(import_into(tmp_path / "run", tmp_path / "hf", bpe))
        with torch.inference_mode():
            return model(input_ids)

    first = logits()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    for changes in (
        {"layer_norm_eps": 1e-3},
        {"use_parallel_residual": False, "layer_norm_eps": 1e-5},
        {"num_attention_heads": 4, "use_parallel_residual": True},
        {"rope_parameters": {**rope, "rope_theta": 9000.0}, "num_attention_heads": 2},
        {"rope_parameters": {**rope, "partial_rotary_factor": 0.5}},
    ):
        assert (logits(**changes) - first).abs().max() > 1e-3, changes
    assert torch.equal(logits(rope_parameters=rope), first)


# --------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("tied", [False, True])
def test_export_comes_back_to_the_bit(tied: bool, tmp_path: Path, bpe: Tokenizer) -> None:
    source = write_run(tmp_path / "first", bpe, replace(MODEL, tie_word_embeddings=tied, layer_norm_eps=1e-4))
    (tmp_path / "first" / "tokenizer" / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    export(ExportConfig(str(tmp_path / "first"), str(tmp_path / "hf"), trim_vocabulary=False))
    checkpoint = import_into(tmp_path / "second", tmp_path / "hf", None)
    before, after = read_weights(source), read_weights(checkpoint)
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    assert model_config(CheckpointManifest.load(checkpoint)) == model_config(CheckpointManifest.load(source))
    assert names_in(tmp_path / "second" / "tokenizer") == names_in(tmp_path / "first" / "tokenizer")
    assert Speaker.load(tmp_path / "second").answers
    for trim, out in ((False, "again"), (True, "trimmed")):
        export(ExportConfig(str(tmp_path / "second"), str(tmp_path / out), trim_vocabulary=trim))
    files = ("model.safetensors", "config.json", "tokenizer.model", "tokenizer.json", "generation_config.json")
    for name in files:
        assert sha256_of(tmp_path / "again" / name) == sha256_of(tmp_path / "hf" / name)
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "imported into megakor" in card
    assert "trained with megakor" not in card
    assert "Measured by the run" not in card
    trimmed = import_into(tmp_path / "third", tmp_path / "trimmed", None)
    embedding = read_weights(trimmed)["gpt_neox.embed_in.weight"]
    assert len(embedding) == 1408
    assert torch.equal(embedding[:1400], before["gpt_neox.embed_in.weight"][:1400])
    assert not embedding[1400:].any()


def test_a_half_precision_export_comes_back_as_it_is(run: Path, tmp_path: Path) -> None:
    export(ExportConfig(str(run), str(tmp_path / "hf"), precision=Precision.bf16))
    found = read_weights(import_into(tmp_path / "back", tmp_path / "hf", None))
    for name, values in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(found[name][: len(values)], values.float())


# ------------------------------------------------------------------------------------------ a run like any other


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    write_model(folder / "hf", bpe, max_shard_size="150KB")
    import_into(folder / "run", folder / "hf", bpe)
    return folder / "run"


def test_where_it_came_from(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = imported.parent / "hf"
    main("checkpoint list", act, [f"run={imported}", "format=json"])
    (line,) = capsys.readouterr().out.splitlines()
    entry = json.loads(line)
    assert (entry["step"], entry["damaged"], entry["latest"], entry["layout"]) == (0, None, True, None)
    assert entry["imported"] == str(hf)
    main("checkpoint list", act, [f"run={imported}"])
    assert "imported from" in capsys.readouterr().out
    manifest = CheckpointManifest.load(resolve(imported))
    source = manifest.train["imported"]
    assert source["dtype"] == "float32"
    assert source["files"] == {p.name: sha256_of(p) for p in [hf / "config.json", *hf.glob("*.safetensors")]}
    assert "imported:" in (imported / "config.yaml").read_text(encoding="utf-8")
    assert len({path.stat().st_mode for path in resolve(imported).iterdir()}) == 1


def test_the_verbs_of_checkpoints(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("checkpoint verify", act, [f"run={imported}"])
    assert capsys.readouterr().out.startswith("whole: ")
    main("checkpoint prune", act, [f"run={imported}", "keep_last=1"])
    assert "removed 0 folders" in capsys.readouterr().out
    with pytest.raises(ValueError, match="run=.* must be a run that trained: .*step-00000000 has weights and no optim"):
        act(ExportUniversalConfig(str(imported), str(tmp_path / "out")))
    with pytest.raises(ValueError, match="run=.* must be a pretraining run"):
        trace(TraceConfig(str(imported), step=1))
    with pytest.raises(ValueError, match="must have logged at least one training step"):
        report(ReportConfig(str(imported)))


def test_generate_and_evaluate(imported: Path, bpe: Tokenizer, corpus_file: Path, tmp_path: Path) -> None:
    speaker = Speaker.load(imported)
    (text,) = speaker.generate(GenerateConfig(str(imported), prompt="옛날 옛적에", max_new_tokens=3))
    assert isinstance(text, str)
    with pytest.raises(ValueError, match="must go to an instruction-tuned run"):
        speaker.generate(GenerateConfig(str(imported), question="누구세요?"))
    short = tmp_path / "short.txt"
    short.write_text("\n".join(corpus_file.read_text(encoding="utf-8").split("\n")[:20]), encoding="utf-8")
    build_shards(ShardConfig([str(short)], str(bpe.folder), str(tmp_path / "held"), num_workers=1), bpe)
    figures = evaluate(EvaluateConfig(str(imported), str(tmp_path / "held")))
    theirs = AutoModelForCausalLM.from_pretrained(imported.parent / "hf", local_files_only=True)
    assert figures["step"] == 0
    assert figures["loss"] > 0
    assert theirs.config.max_position_embeddings == 96


# ------------------------------------------------------------------------------------------------------- refusals


def refused(run: Path, path: Path, tokenizer: Tokenizer | None, error: type = ValueError) -> str:
    """What the error says; nothing is left."""
    before = names_in(run.parent)
    with pytest.raises(error) as raised:
        import_into(run, path, tokenizer)
    assert names_in(run.parent) == before
    return str(raised.value)


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_the_folder_is_not_run(tmp_path: Path, bpe: Tokenizer) -> None:
    hf, ran, run = tmp_path / "hf", tmp_path / "ran", tmp_path / "run"
    write_model(hf, bpe)
    (hf / "modeling.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Model: pass\n")
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(ran)))
    edit_config(hf, auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Model"})
    assert "auto_map=AutoConfig, AutoModelForCausalLM must be left out" in refused(run, hf, bpe)
    edit_config(hf, "auto_map")
    (hf / "model.safetensors").rename(tmp_path / "kept")
    assert "pytorch_model.bin is not opened: it is a pickle" in refused(run, hf, bpe)
    shutil.copyfile(hf / "pytorch_model.bin", hf / "model.safetensors")
    assert "model.safetensors: " in refused(run, hf, bpe)
    (tmp_path / "kept").replace(hf / "model.safetensors")
    import_into(run, hf, bpe)
    assert not ran.exists()


def test_the_run_must_be_new_or_empty(tmp_path: Path, bpe: Tokenizer, unigram: Tokenizer) -> None:
    hf, run = tmp_path / "hf", tmp_path / "run"
    write_model(hf, bpe)
    run.mkdir()
    (tmp_path / ".run.partial").mkdir()  # left by one that was killed
    checkpoint = import_into(run, hf, bpe)
    before = {path: sha256_of(path) for path in run.rglob("*") if path.is_file()}
    assert f"run={run} must be a new or an empty folder, and holds checkpoints" in refused(run, hf, bpe)
    assert "must be a new or an empty folder, and is a file" in refused(run / "config.yaml", hf, bpe)
    assert {path: sha256_of(path) for path in run.rglob("*") if path.is_file()} == before
    assert checkpoint == step_folder(run, 0)
    assert names_in(tmp_path) == ["hf", "run"]


def test_what_came_meanwhile_stays(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "hf", bpe)
    (tmp_path / "run").mkdir()
    real = weights_module.compare_weights

    def meanwhile(*words: Any) -> None:
        real(*words)
        (tmp_path / "run" / "mine").touch()

    monkeypatch.setattr("megakor.interop.import_model.compare_weights", meanwhile)
    assert "not empty" in refused(tmp_path / "run", tmp_path / "hf", bpe, OSError)
    assert names_in(tmp_path / "run") == ["mine"]


def test_the_tokenizer_must_fit(tmp_path: Path, bpe: Tokenizer, unigram: Tokenizer) -> None:
    hf, run = tmp_path / "hf", tmp_path / "run"
    write_model(hf, bpe, vocab_size=1399)
    told = refused(run, hf, bpe)
    assert f"tokenizer={bpe.folder}: model.vocab_size=1399 must be at least the tokenizer's vocabulary, 1400" in told
    told = refused(run, hf, None)
    assert f"path={hf} has none of its own" in told
    assert "such as byte-level BPE, are not supported" in told
    (hf / "tokenizer.model").write_bytes(b"another kind")
    assert "tokenizer.meta.json" in (told := refused(run, hf, None))
    assert "are not supported" in told
    shutil.copyfile(bpe.folder / "tokenizer.meta.json", hf / "tokenizer.meta.json")
    assert "is damaged or from another tokenizer" in refused(run, hf, None)


def test_a_tokenizer_with_another_end_is_told(tmp_path: Path, bpe: Tokenizer) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    get_logger("megakor").addHandler(handler)
    with contextlib.ExitStack() as stack:
        stack.callback(get_logger("megakor").removeHandler, handler)
        write_model(tmp_path / "hf", bpe, eos_token_id=2)
        (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
        import_into(tmp_path / "run", tmp_path / "hf", bpe)
    assert any("eos_token_id=2 is not 0, the end of text" in line for line in lines)
    assert any("every one compared with its source; embedding rows 1,400 -> 1,408" in line for line in lines)
    assert not Speaker.load(tmp_path / "run").answers  # the template is another


def test_whole_or_absent(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, run = tmp_path / "hf", tmp_path / "run"
    write_model(hf, bpe)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "the tensors need 429,056 bytes, and 1,000 are free" in refused(run, hf, bpe, OSError)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "put_in_place", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert f"run={run}: no space left on the device; nothing was written" in refused(run, hf, bpe, OSError)
    with monkeypatch.context() as patch:  # what is written is what was read, but for one bit
        real = weights_module.write_values
        flip = lambda t: (t.contiguous().view(torch.int32) ^ (1 if t.numel() == 96 else 0)).view(torch.float32)  # noqa: E731
        patch.setattr(
            weights_module, "write_values", lambda path, sizes, ts, most: real(path, sizes, map(flip, ts), most)
        )
        told = refused(run, hf, bpe)
        assert "query_key_value.bias must be its source's, bit for bit" in told
    edit_weights(hf, lambda tensors: tensors["gpt_neox.final_layer_norm.bias"][3].fill_(float("inf")))
    assert "tensor gpt_neox.final_layer_norm.bias must hold finite numbers alone" in refused(run, hf, bpe)
    edit_weights(hf, lambda tensors: tensors.pop("gpt_neox.final_layer_norm.bias"))
    assert "gpt_neox.final_layer_norm.bias [32] must be in one of its files" in refused(run, hf, bpe)


def test_the_command(tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "받은 모델", bpe)
    words = [f"path={tmp_path / '받은 모델'}", f"run={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        main("import-model", import_run, words)
    main("import-model", import_run, [*words, f"tokenizer={bpe.folder}"])
    assert capsys.readouterr().out == ""
    assert num_parameters(model_config(CheckpointManifest.load(resolve(tmp_path / "run")))) == 429_056 // 4
