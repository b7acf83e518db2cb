"""Runs of `megakor instruct` with adapters against PEFT on the exported base: losses, resumes, and both exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.reader import load_model, read_weights, resolve
from megakor.checkpoint.verify import damages
from megakor.config.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExportConfig,
    GenerateConfig,
    InstructConfig,
    LoggingConfig,
    LoraConfig,
    LoraTarget,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
    WandbMode,
)
from megakor.data.plan import Plan
from megakor.generate.speaker import Speaker
from megakor.instruct import __main__ as instruct
from megakor.instruct.pairs import read_pairs, split
from megakor.instruct.stream import PairStream, tokenise
from megakor.interop.adapters import export_adapters
from megakor.interop.huggingface import export
from megakor.model.lora import adapter_specs
from megakor.model.parameters import initial_value
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.engine import Engine
from megakor.train.schedule import learning_rate
from tests.distributed.runs import Curve, Job, Stop, curve, ended_by, layout_of_group, zero
from tests.interop.conftest import MODEL, write_run
from tests.ranks import run_ranks

STEPS, SAVED = 6, 3
TARGETS = [LoraTarget.query_key_value, LoraTarget.dense_4h_to_h]


def configuration(folder: Path, name: str, base: str = "base", **changes: Any) -> InstructConfig:
    """A run of adapters; `changes` are of sections, with `__` for the dot."""
    config = InstructConfig(
        run=str(folder / name),
        base=str(folder / base),
        tokenizer=str(folder / "base" / "tokenizer"),
        parallel=ParallelConfig(),
        train=TrainConfig(
            seed=5, num_steps=STEPS, global_batch_size=4, micro_batch_size=2, sequence_length=96,
            precision=Precision.fp32, clip_grad_norm=0.5,
        ),
        optimizer=OptimizerConfig(lr=0.02),
        checkpoint=CheckpointConfig(interval=SAVED, keep_last=0, asynchronous=False),
        evaluation=EvaluationConfig(interval=STEPS),
        logging=LoggingConfig(wandb=WandbMode.disabled, peak_tflops=0.1),
        pairs=PairsConfig(files=[str(folder / "pairs.jsonl")], packing=False),
        lora=LoraConfig(rank=4, alpha=8.0, targets=TARGETS),
    )  # fmt: skip
    for key, value in changes.items():
        section, _, field = key.partition("__")
        setattr(getattr(config, section), field, value)
    return config


def run_instruct(config: InstructConfig, stop: int | None = None) -> str | None:
    """Run `megakor instruct` in the group that is there, to its end or until a step; the error, if any."""
    instruct.process_group = layout_of_group  # type: ignore[assignment]
    real_step = Engine.train_step
    Engine.train_step = ended_by(Job(config, stop=stop), real_step)  # type: ignore[arg-type, method-assign]
    try:
        instruct.run(config)
    except Stop:
        return None
    except ValueError as error:
        return str(error)
    finally:
        Engine.train_step = real_step  # type: ignore[method-assign]
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Path:
    """A base, its export, and a run of adapters on it."""
    folder = tmp_path_factory.mktemp("adapters")
    sums = [{"q": f"{first} + {second}", "a": str(first + second)} for first in range(8) for second in range(8)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, sums)), encoding="utf-8")
    write_run(folder / "base", bpe, MODEL)
    export(ExportConfig(run=str(folder / "base"), out=str(folder / "base-hf")))
    assert run_ranks(run_instruct, 1, configuration(folder, "tuned")) == [None]
    return folder


def hf_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base-hf", local_files_only=True)


def loss_of(model: Any, config: InstructConfig, step: int) -> torch.Tensor:
    """Mean loss of the unmasked labels of a step's batch."""
    tokenizer = Tokenizer.load(config.tokenizer)
    kept, _ = split(read_pairs(config.pairs), config.pairs.validation_ratio)
    size = config.train
    stream = PairStream(
        tokenise(kept, tokenizer, size.sequence_length), tokenizer.eod_id, seed=size.seed,
        plan=Plan(size.global_batch_size, size.sequence_length, size.batch_sizes), packing=config.pairs.packing,
    )  # fmt: skip
    (batch,) = stream.micro_batches(step, 0, 1, size.global_batch_size)
    ids, labels, mask = (torch.from_numpy(part) for part in (batch.input_ids, batch.labels, batch.loss_mask))
    logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


def by_peft(folder: Path, config: InstructConfig) -> tuple[Curve, Any]:
    """The same run by PEFT and torch's AdamW, from the same adapters; its curve and the model."""
    lora, targets = config.lora, [target.value for target in config.lora.targets]
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf_base(folder), settings)
    parameters = dict(model.named_parameters())
    trained = []
    with torch.no_grad():
        for spec in adapter_specs(MODEL, lora):
            name = f"base_model.model.{spec.name}".replace(".weight", ".default.weight")
            parameters[name].copy_(initial_value(spec, config.train.seed))
            trained.append(parameters[name])
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rows = []
    for step in range(config.train.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step, config.train.num_steps)
        optimizer.zero_grad()
        loss = loss_of(model, config, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.clip_grad_norm)
        optimizer.step()
        rows.append((step + 1, loss.item(), norm.item()))
    return rows, model


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Curve, Any]:
    return by_peft(folder, configuration(folder, "tuned"))


def check_curves(found: Curve, expected: Curve) -> None:
    for row, other in zip(found, expected, strict=True):
        assert row[0] == other[0]
        assert row[1:] == pytest.approx(other[1:], rel=1e-5)


def test_a_run_is_peft_s(folder: Path, reference: tuple[Curve, Any]) -> None:
    """Losses and gradient norms of every step, and the weights at the end, merged as PEFT merges them."""
    found, (expected, model) = curve(folder / "tuned"), reference
    check_curves(found, expected)
    weights, start = read_weights(resolve(folder / "tuned")), read_weights(resolve(folder / "base"))
    merged = model.merge_and_unload().state_dict()
    for name, weight in weights.items():
        theirs = merged[name.replace("embed_out", "lm_head")] if name.startswith("embed_out") else merged[name]
        torch.testing.assert_close(weight[: len(theirs)], theirs, rtol=0, atol=2e-5)
        targeted = name.endswith(("query_key_value.weight", "dense_4h_to_h.weight"))
        moved = (weight - start[name]).abs().max()
        assert moved > 0.01 if targeted else moved == 0, (name, moved)


def test_the_checkpoint_and_the_metrics_tell_of_adapters(folder: Path) -> None:
    manifest = CheckpointManifest.load(resolve(folder / "tuned"))
    assert manifest.adapters is not None
    assert Path(manifest.adapters.base) == resolve(folder / "base")
    assert (manifest.adapters.rank, manifest.adapters.alpha, manifest.adapters.base_step) == (4, 8.0, 100)
    assert damages(resolve(folder / "tuned"), 2) == []
    names = {key.partition("/")[2] for key in manifest.tensors}
    assert names == {spec.name for spec in adapter_specs(MODEL, configuration(folder, "tuned").lora)}
    start = json.loads((folder / "tuned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert start["num_trained_parameters"] == 2 * 4 * ((32 + 96) + (64 + 32))
    assert start["num_parameters"] > 50 * start["num_trained_parameters"]


@pytest.mark.parametrize(
    ("name", "ranks", "first", "then"),
    [
        ("zero2", 2, zero(2), zero(2)),
        ("tp2 to pp2", 2, {"parallel__tensor_parallel_size": 2}, {"parallel__pipeline_parallel_size": 2}),
        ("pp2 to zero3", 2, {"parallel__pipeline_parallel_size": 2}, zero(3)),
    ],
)
def test_a_stopped_run_goes_on(
    folder: Path, reference: tuple[Curve, Any], name: str, ranks: int, first: dict[str, Any], then: dict[str, Any]
) -> None:
    stages = {"parallel__pipeline_partition": "type:Block"}
    stopped = configuration(folder, name, **first, **stages)
    assert run_ranks(run_instruct, ranks, stopped, SAVED + 1) == [None] * ranks
    assert run_ranks(run_instruct, ranks, configuration(folder, name, **then, **stages)) == [None] * ranks
    found = curve(folder / name)
    check_curves(found, reference[0])
    if first == then:
        whole = configuration(folder, f"{name}, whole", **then)
        assert run_ranks(run_instruct, ranks, whole) == [None] * ranks
        assert found == curve(folder / f"{name}, whole")


def test_going_on_otherwise_is_refused(folder: Path, bpe: Tokenizer) -> None:
    write_run(folder / "other", bpe, MODEL, seed=1)
    more = {"train__num_steps": 7}
    goes_on = f": the run goes on from its checkpoint of step {STEPS}"
    base = resolve(folder / "base")
    for config, message in (
        (configuration(folder, "tuned", "other", **more), f"base={folder}/other (step 100) must be the checkpoint that "
         f"the adapters were trained on, {base} (step 100)"),
        (configuration(folder, "tuned", lora__rank=2, lora__alpha=4.0, **more),
         "lora.rank=2 must be 4; lora.alpha=4.0 must be 8.0"),
        (configuration(folder, "tuned", lora__targets=TARGETS[:1], **more),
         "lora.targets=['query_key_value'] must be ['dense_4h_to_h', 'query_key_value']"),
        (configuration(folder, "tuned", lora__rank=0, **more), "lora.rank=0 must be 4"),
    ):  # fmt: skip
        assert run_ranks(run_instruct, 1, config) == [message + goes_on]


def test_a_tuned_run_is_a_base(folder: Path) -> None:
    """Merged, for adapters and for all parameters; a run of all parameters does not turn into one of adapters."""
    config = configuration(folder, "tuned")
    export(ExportConfig(run=config.run, out=str(folder / "tuned-hf")))
    merged = AutoModelForCausalLM.from_pretrained(folder / "tuned-hf", local_files_only=True)
    expected = loss_of(merged, config, 0).item()
    for name, rank in (("second", 2), ("all", 0)):
        again = configuration(folder, name, "tuned", lora__rank=rank)
        assert run_ranks(run_instruct, 1, again) == [None]
        assert curve(folder / name)[0][1] == pytest.approx(expected, rel=1e-5)
        manifest = CheckpointManifest.load(resolve(folder / name))
        assert (manifest.adapters is None) is (rank == 0)
        assert read_weights(resolve(folder / name)).keys() == read_weights(resolve(folder / "base")).keys()
    refused = configuration(folder, "all", "tuned", train__num_steps=7)
    assert run_ranks(run_instruct, 1, refused) == [
        f"lora.rank=4 must be 0: the run goes on from its checkpoint of step {STEPS}"
    ]


def test_a_tuned_run_answers(folder: Path) -> None:
    speaker = Speaker.load(folder / "tuned")
    assert speaker.answers
    config = GenerateConfig(run=str(folder / "tuned"), question="봄에 심기 좋은 채소는?", max_new_tokens=4)
    assert isinstance(speaker.generate(config)[0], str)


def test_peft_loads_exported_adapters(folder: Path, bpe: Tokenizer) -> None:
    """The exported base with the exported adapters is the merged model."""
    out = folder / "tuned-peft"
    config = ExportConfig(run=str(folder / "tuned"), out=str(out), adapters=True)
    figures = export_adapters(config)
    assert figures["num_parameters"] == 2 * 4 * ((32 + 96) + (64 + 32))
    assert figures["num_bytes"] == sum(f.stat().st_size for f in out.iterdir() if f.name != "megakor_export.json")
    base = hf_base(folder)
    ids = torch.randint(bpe.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        before = base(ids).logits
        model = peft.PeftModel.from_pretrained(base, out)
        found = model(input_ids=ids).logits
        source, _ = load_model(resolve(folder / "tuned"))
        expected = source(ids)[..., : bpe.vocab_size]
    assert model.peft_config["default"].target_modules == {target.value for target in TARGETS}
    assert (found - expected).abs().max() < 2e-5
    assert (before - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(out, local_files_only=True).chat_template
    assert export_adapters(replace(config, precision=Precision.bf16))["precision"] == "bf16"  # over the earlier one
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(tensor.dtype is torch.bfloat16 for tensor in tensors.values())


def test_a_run_without_adapters_has_none_to_export(folder: Path) -> None:
    config = ExportConfig(run=str(folder / "base"), out=str(folder / "nothing"), adapters=True)
    with pytest.raises(ValueError, match="must be a run with lora.rank above 0: adapters=true exports adapters alone"):
        export_adapters(config)
    assert not (folder / "nothing").exists()
