"""Bad command lines end in one line on standard error, exit status 1, and a traceback with --debug only."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from megakor.config.compose import known_keys, main
from megakor.config.schema import EngineConfig
from megakor.config.verbs import VERBS
from tests.config.commands import NEEDED, PRETRAIN, command, composed


def failure(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> str:
    """The one line that a bad command line ends in."""
    ran: list[object] = []
    with pytest.raises(SystemExit) as ended:
        main(verb, ran.append, list(arguments))
    assert ended.value.code == 1
    assert not ran
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith(f"megakor {verb}: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("verb", "argument", "wrong", "right"),
    [
        ("pretrain", "train.globl_batch_size=4", "train.globl_batch_size", "train.global_batch_size"),
        ("pretrain", "+train.num_step=4", "train.num_step", "train.num_steps"),
        ("pretrain", "model.hidden=4", "model.hidden", "model.hidden_size"),
        ("pretrain", "trian.num_steps=4", "trian.num_steps", "train.num_steps"),
        ("corpus", "input=a", "input", "inputs"),
        ("generate", "promt=안녕", "promt", "prompt"),
        ("export", "trim_vocab=false", "trim_vocab", "trim_vocabulary"),
    ],
)
def test_unknown_keys(capsys: pytest.CaptureFixture[str], verb: str, argument: str, wrong: str, right: str) -> None:
    line = failure(capsys, verb, *NEEDED[verb], argument)
    assert re.search(rf"\b{re.escape(wrong)}\b(?!_)", line)
    assert re.search(rf"nearest: .*\b{re.escape(right)}\b", line)


def test_an_unknown_key_in_a_yaml_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from megakor.config import compose

    folder = tmp_path / "configs"
    shutil.copytree(compose.config_folder(), folder)
    (folder / "experiment" / "odd.yaml").write_text("# @package _global_\ntrain:\n  num_stps: 3\n")
    monkeypatch.setattr(compose, "config_folder", lambda: folder)
    line = failure(capsys, "pretrain", *PRETRAIN, "experiment=odd")
    assert "num_stps" in line
    assert "num_steps" in line.partition("nearest")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_missing_keys_are_named(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    one_of_several = ("prompt=p", "step=1", "data.train=a", "model.vocab_size=256")
    by_rule = "cluster.gpus"  # it may be null elsewhere
    needed = [word.partition("=")[0] for word in NEEDED[verb] if word not in one_of_several]
    if needed == [by_rule]:
        assert f"{by_rule}=None must " in failure(capsys, verb)
        return
    if not needed:
        composed(verb)
        return
    line = failure(capsys, verb)
    keys = known_keys(VERBS[verb].schema)
    for name in needed:
        if issubclass(VERBS[verb].schema, EngineConfig) and name in ("run", "train.sequence_length", by_rule):
            continue  # has a default
        assert name in keys
        assert re.search(rf"(missing |; ){re.escape(name)} \(\w", line), (name, line)


@pytest.mark.parametrize("group", ["experiment", "model"])
def test_an_unknown_choice_of_a_group(capsys: pytest.CaptureFixture[str], group: str) -> None:
    line = failure(capsys, "pretrain", *PRETRAIN, f"{group}=없는것")
    assert f"{group}/없는것" in line
    assert {"experiment": "1_3b_polyglot", "model": "12_8b"}[group] in line  # what there is


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.num_steps=열", ["train.num_steps", "열"]),
        ("train.num_steps=1.5", ["train.num_steps", "1.5"]),
        ("train.precision=fp8", ["train.precision", "fp8", "fp32", "bf16", "fp16"]),
        ("schedule.name=step", ["schedule.name", "step", "cosine", "linear", "constant", "wsd"]),
        ("model.tie_word_embeddings=maybe", ["model.tie_word_embeddings", "maybe"]),
        ("train=3", ["train"]),
        ("train.num_steps=null", ["train.num_steps"]),
        ("optimizer.lr=[1,2]", ["optimizer.lr"]),
    ],
)
def test_values_of_another_type(capsys: pytest.CaptureFixture[str], argument: str, words: list[str]) -> None:
    line = failure(capsys, "pretrain", *PRETRAIN, argument)
    for word in words:
        assert word in line


def test_positional_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "corpus", "out=o", "말뭉치.txt")
    assert "말뭉치.txt" in line
    assert "key=value" in line


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_multirun_under_a_launcher_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--multirun" in failure(capsys, "pretrain", *PRETRAIN, "optimizer.lr=1e-3,1e-4", flag)


def test_multirun_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    seen: list[typing.Any] = []
    main("pretrain", seen.append, [*PRETRAIN, "optimizer.lr=1e-3,1e-4", "name=a,b", "-m"])
    assert [(config.optimizer.lr, config.name) for config in seen] == [
        (1e-3, "a"), (1e-3, "b"), (1e-4, "a"), (1e-4, "b")
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())  # Hydra leaves nothing behind


def test_multirun_over_hangul(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[typing.Any] = []
    main("report", seen.append, ["run=가,나", "-m"])
    assert [config.run for config in seen] == ["가", "나"]


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]])
def test_local_rank_is_tolerated(flag: list[str]) -> None:
    assert composed("pretrain", *flag, *PRETRAIN).name == "run"
    assert composed("pretrain", *PRETRAIN, *flag).name == "run"


def test_debug_shows_the_traceback() -> None:
    quiet = command("-m", "megakor", "corpus", "out=o", "inputs=/없는/곳.txt")
    loud = command("-m", "megakor", "corpus", "out=o", "inputs=/없는/곳.txt", "--debug")
    assert (quiet.returncode, loud.returncode) == (1, 1)
    assert quiet.stderr.splitlines() == [loud.stderr.splitlines()[-1]]
    assert quiet.stderr.startswith("megakor corpus: error: inputs=/없는/곳.txt")
    assert "Traceback" in loud.stderr
    assert "Traceback" not in quiet.stderr


def test_debug_shows_the_traceback_of_a_composition() -> None:
    loud = command("-m", "megakor", "pretrain", *PRETRAIN, "train.precision=fp8", "--debug")
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1].startswith("megakor pretrain: error: ")


def test_an_unknown_verb() -> None:
    ended = command("-m", "megakor", "pretran")
    assert ended.returncode == 2
    assert not ended.stdout
    assert len(ended.stderr.splitlines()) == 1
    assert "pretran" in ended.stderr
    assert ended.stderr.rstrip().endswith("nearest: pretrain")


def test_the_verbs_are_shown_in_the_order_of_the_arc() -> None:
    shown = command("-m", "megakor", "--help").stdout
    places = [shown.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    arc = ["corpus", "train-tokenizer", "shard", "pretrain", "instruct", "export", "evaluate", "generate"]
    assert [verb for verb in VERBS if verb in arc] == arc


def leaves(schema: type, prefix: str = "") -> list[tuple[str, dataclasses.Field[typing.Any], typing.Any]]:
    """Every key of a schema that takes a value."""
    hints, found = typing.get_type_hints(schema), []
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            found += leaves(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, field, kind))
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_key(capsys: pytest.CaptureFixture[str], verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(verb, lambda _: pytest.fail("--help ran the verb"), ["--help"])
    shown = capsys.readouterr().out
    rows = {words[0]: " ".join(words) for words in map(str.split, shown.splitlines()) if words}
    for name, field, _ in leaves(VERBS[verb].schema):
        assert name in rows, name
        row = rows[name]
        assert field.metadata["unit"] in row
        assert field.metadata["help"].split()[0] in row
    for folder in VERBS[verb].groups:
        assert f"{folder}=NAME" in shown


def test_help_shows_what_lists_and_sections_hold(capsys: pytest.CaptureFixture[str]) -> None:
    main("corpus", lambda _: None, ["--help"])
    assert "list[str]" in capsys.readouterr().out
    main("pretrain", lambda _: None, ["--help"])
    assert "dict[str, str]" in capsys.readouterr().out


def test_help_shows_what_a_list_may_hold(capsys: pytest.CaptureFixture[str]) -> None:
    main("instruct", lambda _: None, ["--help"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lora.targets"))
    assert row.split()[1].startswith("list[query_key_value|dense")
    assert "['query_key_value']" in row


def test_help_shows_the_values_of_the_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    main("pretrain", lambda _: None, ["experiment=12_8b_256xa100", "train.num_steps=7", "--help"])
    shown = {words[0]: words for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert shown["model.hidden_size"][2] == "5120"
    assert shown["train.num_steps"][2] == "7"


def test_help_with_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    failure(capsys, "pretrain", "experiment=없는것", "--help")


def test_every_key_has_a_help_text() -> None:
    for verb in VERBS.values():
        for name, field, _ in leaves(verb.schema):
            assert len(field.metadata["help"]) > 5, name
