"""`megakor import-config`: the experiment that it writes composes, and is ours for Polyglot-Ko's sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megakor.config.choices import ActivationCheckpointing
from megakor.config.schema import ImportConfig, PretrainConfig
from megakor.interop.neox_experiment import import_config
from tests.config.commands import command, composed
from tests.interop.neox_files import PLACES, SIZES, model_file

DATA = ["data.tokenizer=t"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A model's file and one of places, in a folder with a Hangul name."""
    folder = tmp_path / "설정 모음"
    folder.mkdir()
    for name, text in {"모델": model_file("1_3b_polyglot"), "자리": PLACES}.items():
        (folder / f"{name}.yml").write_text(text, encoding="utf-8")
    return [str(folder / "모델.yml"), str(folder / "자리.yml")]


@pytest.mark.parametrize("name", SIZES)
def test_polyglot_ko_comes_to_the_shipped_experiment(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.yml").write_text(model_file(name), encoding="utf-8")
    import_config(ImportConfig(path=[str(tmp_path / f"{name}.yml")], out=str(tmp_path), name="mine"))
    found = composed("pretrain", f"--config-dir={tmp_path}", "experiment=mine", "data.train=d", *DATA)
    shipped = composed("pretrain", f"experiment={name}")
    assert isinstance(found, PretrainConfig)
    if name == "5_8b_polyglot":  # it recomputes attention alone, which GPT-NeoX cannot
        shipped.train.activation_checkpointing = ActivationCheckpointing.none
    assert found.model == shipped.model
    assert found.train == shipped.train
    assert found.optimizer == shipped.optimizer
    assert found.schedule == shipped.schedule
    assert found.parallel == dataclasses.replace(shipped.parallel, data_parallel_size=None)
    assert found.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize("verb", ["pretrain", "launch pretrain", "simulate"])
def test_the_experiment_composes_as_told(
    verb: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    import_config(ImportConfig(path=files, format="json"))
    told = json.loads(capsys.readouterr().out)
    assert told["experiment"] == "experiment/모델.yaml"
    assert told["command"] == ["megakor", "pretrain", "--config-dir=.", "experiment=모델", "data.tokenizer=FOLDER"]
    config = composed(verb, *told["command"][2:])
    assert (config.name, config.run) == ("모델", "runs/모델")
    assert config.data.train == "/data/말뭉치/korean_text_document"
    assert config.checkpoint.interval == 1000
    text = (tmp_path / told["experiment"]).read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# From GPT-NeoX's 모델.yml, 자리.yml.\n")


def test_every_given_key_is_told(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_config(ImportConfig(path=files, out=str(tmp_path), format="json"))
    keys = json.loads(capsys.readouterr().out)["keys"]
    given = [row["key"] for row in keys if not row["default"]]
    assert len(given) == len(set(given)) == 41
    outcomes = {row["key"]: row["outcome"] for row in keys}
    assert outcomes["num_layers"] == "mapped"
    assert outcomes["no_weight_tying"] == "changed"
    assert outcomes["vocab_file"] == outcomes["norm"] == "dropped"
    assert all(row["why"] for row in keys if row["outcome"] != "mapped")


def test_the_table(files: list[str], tmp_path: Path) -> None:
    ended = command("-m", "megakor", "import-config", f"path=[{','.join(files)}]", f"out={tmp_path}", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0].split() == ["GPT-NeoX", "value", "megakor", "why"]
    assert next(line for line in lines if line.startswith("hidden_size")).split() == [
        "hidden_size", "2048", "mapped", "model.hidden_size=2048"
    ]  # fmt: skip
    assert f"{tmp_path}/experiment/모델.yaml is written; go on with" in lines
    assert lines[-1] == f"  megakor pretrain --config-dir={tmp_path} 'experiment=모델' data.tokenizer=FOLDER"


def test_nothing_is_written_when_a_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "가.yml"
    path.write_text(model_file("1_3b_polyglot").replace('"layernorm"', '"rmsnorm"'), encoding="utf-8")
    ended = command("-m", "megakor.import_config", f"path={path}", f"out={tmp_path}", cwd=tmp_path)
    assert ended.returncode == 1
    error = "megakor import-config: error: norm=rmsnorm must be layernorm: norms are LayerNorm with biases\n"
    assert ended.stderr == error
    assert "1 refused" in ended.stdout
    assert not (tmp_path / "experiment").exists()


def test_a_refusal_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "가.yml"
    path.write_text(model_file("1_3b_polyglot").replace('"layernorm"', '"rmsnorm"'), encoding="utf-8")
    with pytest.raises(ValueError, match="norm=rmsnorm must be layernorm"):
        import_config(ImportConfig(path=[str(path)], out=str(tmp_path), format="json"))
    told = json.loads(capsys.readouterr().out)
    assert told["experiment"] is None
    assert [row["key"] for row in told["keys"] if row["outcome"] == "refused"] == ["norm"]


@pytest.mark.parametrize("name", ["a/b", "instruct_mine", "demo"])
def test_names_that_hydra_would_not_find(name: str, files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^name={name} must (be one word|not be that of an experiment)"):
        import_config(ImportConfig(path=files, out=str(tmp_path), name=name))


def test_an_experiment_is_not_overwritten(files: list[str], tmp_path: Path) -> None:
    import_config(ImportConfig(path=files, out=str(tmp_path)))
    with pytest.raises(FileExistsError, match=r"모델.yaml must not exist yet; name= and out= choose another file$"):
        import_config(ImportConfig(path=files, out=str(tmp_path)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    ended = command("-m", "megakor", "import-config", "path=없는.yml", cwd=tmp_path)
    assert ended.returncode == 1
    assert "없는.yml" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_it_starts_without_pytorch() -> None:
    code = "import sys, megakor.import_config; print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    assert command("-c", code).stdout == "set()\n"
