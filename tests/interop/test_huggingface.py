from __future__ import annotations

import errno
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakor.checkpoint.format import CheckpointManifest, FileEntry, step_folder
from megakor.checkpoint.reader import load_model
from megakor.config.schema import ExportConfig, Precision
from megakor.files import sha256_of
from megakor.interop import huggingface
from megakor.interop.huggingface import export
from megakor.interop.self_check import PROBES, same_greedy, self_check
from megakor.tokenizer.tokenizer import Tokenizer
from tests.interop.conftest import MODEL, generated_lines, write_run


def config(run: Path, **changes: Any) -> ExportConfig:
    return replace(ExportConfig(run=str(run), out=str(run.parent / "내보내기")), **changes)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("tied", "parallel", "attention_bias"), [(False, True, True), (True, True, True), (False, False, False)]
)
def test_exported_model_gives_the_checkpoint_s_logits(
    tmp_path: Path, bpe: Tokenizer, tied: bool, parallel: bool, attention_bias: bool
) -> None:
    model = replace(MODEL, tie_word_embeddings=tied, use_parallel_residual=parallel, attention_bias=attention_bias)
    checkpoint = write_run(tmp_path / "run", bpe, model)
    figures = export(config(tmp_path / "run"))
    out = Path(figures["out"])
    exported = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    source, _ = load_model(checkpoint)
    input_ids = torch.randint(bpe.vocab_size, (3, 50), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        difference = (exported(input_ids).logits - source(input_ids)[..., : bpe.vocab_size]).abs().max()
        assert source(input_ids).std() > 0.1
    assert exported.config.vocab_size == bpe.vocab_size == figures["vocab_size"] < MODEL.vocab_size
    assert difference < 2e-5
    assert figures["max_logit_difference"] < 2e-5
    assert figures["greedy_equal"]
    assert figures["tokens_equal"]
    assert figures["num_parameters"] == sum(parameter.numel() for parameter in exported.parameters())
    assert leftovers(tmp_path) == []
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_config_is_spelled_for_both_transformers(run: Path) -> None:
    out = Path(export(config(run))["out"])
    written = json.loads((out / "config.json").read_text())
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 5000.0)
    loaded = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert loaded.config.rope_parameters == written["rope_parameters"]
    # Either spelling alone gives the same model.
    for dropped in (("rope_parameters",), ("rotary_pct", "rotary_emb_base")):
        content = {name: value for name, value in written.items() if name not in dropped}
        (out / "config.json").write_text(json.dumps(content))
        again = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        ids = torch.arange(40).view(1, 40)
        assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_auto_tokenizer(run: Path, bpe: Tokenizer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export(config(run))["out"], local_files_only=True)
    for text in [*PROBES, *generated_lines(3, 200)]:
        ids = tokenizer(text)["input_ids"]
        assert ids == bpe.encode(text)
        assert tokenizer.decode(ids) == bpe.decode(ids)
    eod = bpe.eod_id
    assert tokenizer("<|endoftext|>")["input_ids"] == [eod]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (eod, eod, eod)
    assert tokenizer.sep_token_id == bpe.sep_id
    batch = tokenizer(["가", "가나 다라마"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["input_ids"][0, 0] == eod
    assert batch["attention_mask"][0, 0] == 0
    assert len(tokenizer) == bpe.vocab_size
    assert tokenizer.model_max_length == MODEL.max_position_embeddings
    assert tokenizer.chat_template is None


def test_chat_template_travels(run: Path, bpe: Tokenizer) -> None:
    template = "{% for message in messages %}### 질문: {{ message['content'] }}\n\n{% endfor %}### 답변: "
    (run / "tokenizer" / "chat_template.jinja").write_text(template, encoding="utf-8")
    out = Path(export(config(run))["out"])
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    messages = [{"role": "user", "content": "봄은 언제 오나요?"}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids == bpe.encode("### 질문: 봄은 언제 오나요?\n\n### 답변: ")
    assert "apply_chat_template" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_half_precision_is_the_rounded_checkpoint(run: Path, precision: Precision) -> None:
    figures = export(config(run, precision=precision))
    out = Path(figures["out"])
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {huggingface.DTYPES[precision]}
    assert figures["max_logit_difference"] < 2e-5 < figures["rounding_logit_difference"]
    loaded = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert loaded.dtype == huggingface.DTYPES[precision]


def test_padded_rows_are_kept_when_asked_and_never_generated(run: Path, bpe: Tokenizer) -> None:
    out = export(config(run, trim_vocabulary=False))["out"]
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert model.get_input_embeddings().weight.shape[0] == MODEL.vocab_size
    with torch.no_grad():  # a padded row that always wins
        model.get_output_embeddings().weight[bpe.vocab_size :] = model.get_output_embeddings().weight[5] * 100
    prompt = torch.tensor([bpe.encode("옛날 옛적에")])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=16)
    assert generated.max() < bpe.vocab_size


def test_large_models_are_sharded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "MAX_SHARD_SIZE", 150_000)
    figures = export(config(run))
    out = Path(figures["out"])
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 2
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()) == {
        path.name for path in out.glob("model-*.safetensors")
    }
    assert self_check(out, step_folder(run, 100))["max_logit_difference"] < 2e-5


def test_model_card(run: Path) -> None:
    out = Path(export(config(run))["out"])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "language: ko" in card
    assert "pipeline_tag: text-generation" in card
    assert "name: 말뭉치-시험" in card
    assert "1.8750" in card
    assert "409,600" in card
    assert "9.7500" not in card  # a later step than the checkpoint's


def test_self_check_sees_a_changed_weight(run: Path) -> None:
    out = Path(export(config(run))["out"])
    weights = load_file(out / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"][0, 0] += 0.05
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="max_logit_difference=.* must be at most 0.0001"):
        self_check(out, step_folder(run, 100))


def test_greedy_comparison_sees_another_model(tmp_path: Path, bpe: Tokenizer) -> None:
    write_run(tmp_path / "one", bpe, MODEL, seed=1)
    exported = AutoModelForCausalLM.from_pretrained(export(config(tmp_path / "one"))["out"], local_files_only=True)
    source, _ = load_model(write_run(tmp_path / "two", bpe, MODEL, seed=2))
    same, _ = load_model(step_folder(tmp_path / "one", 100))
    prompt = torch.tensor([bpe.encode("옛날 옛적에")])
    with torch.inference_mode():
        assert same_greedy(same, exported, prompt, bpe.vocab_size)
        assert not same_greedy(source, exported, prompt, bpe.vocab_size)


def test_self_check_sees_a_changed_tokenizer(run: Path) -> None:
    out = Path(export(config(run))["out"])
    content = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"]["normalizers"].pop(0)  # NFC
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="tokens_equal=False"):
        self_check(out, step_folder(run, 100))


def test_an_export_that_disagrees_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = huggingface.model_json
    monkeypatch.setattr(huggingface, "model_json", lambda *args: real(*args) | {"layer_norm_eps": 0.5})
    with pytest.raises(ValueError, match="does not agree"):
        export(config(run))
    assert not (run.parent / "내보내기").exists()
    assert leftovers(run.parent) == []


def test_an_earlier_export_is_replaced_and_nothing_else_is(run: Path, tmp_path: Path) -> None:
    out = Path(export(config(run))["out"])
    export(config(run, precision=Precision.bf16))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    (out / "메모.txt").write_text("내 것")
    with pytest.raises(ValueError, match=r"out=.* holds 메모\.txt, which no export wrote"):
        export(config(run))
    with pytest.raises(ValueError, match="out=.* must be a new folder or an earlier export"):
        export(config(run, out=str(run)))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        export(config(run, out=str(tmp_path / "file")))
    assert (out / "메모.txt").read_text() == "내 것"
    assert (run / "metrics.jsonl").is_file()


def test_no_space_leaves_the_earlier_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(export(config(run))["out"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "save_torch_state_dict", full)
        with pytest.raises(OSError, match="out=.*no space left"):
            export(config(run))
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the tensors need .* bytes, and 1,000 are free"):
        export(config(run))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert leftovers(run.parent) == []


def test_damaged_checkpoints_are_refused(run: Path) -> None:
    weights = step_folder(run, 100) / "rank-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="must be|whole checkpoint"):
        export(config(run))
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256"):
        export(config(run))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="run=.* whole checkpoint"):
        export(config(run))
    with pytest.raises(FileNotFoundError, match="run="):
        export(config(run / "nowhere"))
    assert not (run.parent / "내보내기").exists()


def test_a_tokenizer_of_another_run_is_refused(run: Path, unigram: Tokenizer) -> None:
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        export(config(run))
    shutil.copytree(unigram.folder, run / "tokenizer")
    with pytest.raises(ValueError, match="must be the checkpoint's tokenizer_fingerprint="):
        export(config(run))


def test_values_that_overflow_the_type_are_refused(run: Path) -> None:
    folder = step_folder(run, 100)
    path = folder / "rank-00000.safetensors"
    manifest = CheckpointManifest.load(folder)
    index = manifest.check_sizes(folder)
    (row,) = index.overlapping("weight/gpt_neox.final_layer_norm.bias", 0, 0, 1)
    content = bytearray(path.read_bytes())
    content[index.begin[row] : index.begin[row] + 4] = struct.pack("<f", 1e6)
    path.write_bytes(content)
    manifest.files[path.name] = FileEntry(path.stat().st_size, sha256_of(path))
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"final_layer_norm\.bias .* precision=fp16"):
        export(config(run, precision=Precision.fp16))


def test_unigram_exports_too(tmp_path: Path, unigram: Tokenizer) -> None:
    write_run(tmp_path / "run", unigram, replace(MODEL, vocab_size=unigram.vocab_size))
    assert export(config(tmp_path / "run"))["tokens_equal"]
