from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megakor.config.compose import quote_override
from megakor.config.schema import CorpusConfig, GenerateConfig
from tests.config.commands import PRETRAIN, command, composed

TEXTS = [
    "안녕하세요",
    "/data/말뭉치/*.jsonl.gz",
    "안녕, 세상!",
    "a,b",
    "[대괄호]",
    "[a, b]",
    "{중괄호: 1}",
    "(소괄호)",
    '큰"따옴표',
    "작은'따옴표",
    "'안녕' 하고 '인사'",
    '"안녕" 하고 "인사"',
    "'",
    '"',
    "역슬래시\\n",
    "C:\\말\\뭉치",
    "끝\\",
    "끝\\\\",
    "\\'",
    "값 = 값",
    "a=b",
    " 앞뒤 빈칸 ",
    "줄\n바꿈\t탭",
    "$",
    "~!@#%^&*",
    "true",
    "12",
    "1e-3",
    "range(1,3)",
    "glob(*)",
    "한국어 🙂 漢字",
    "",
]
"""Values that a user may well type."""


def parsed(argument: str, schema: type) -> Any:
    """The value that Hydra and OmegaConf make of an argument, as composition does but without its cost."""
    override = OverridesParser.create().parse_override(quote_override(argument, schema, multirun=False))
    assert not override.is_sweep_override()
    value = OmegaConf.create({"key": override.value()})
    return OmegaConf.to_container(value, resolve=True)["key"]  # type: ignore[index]


@pytest.mark.parametrize("text", TEXTS)
def test_a_string_is_taken_as_it_is(text: str) -> None:
    assert parsed(f"prompt={text}", GenerateConfig) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("가나 a1'\"\\,[]{}():=#-~+*?!%;|&<>\t\n"), max_size=8))
@example("\\")
@example("''")
@example("'\\'")
def test_any_string_is_taken_as_it_is(text: str) -> None:
    assert parsed(f"prompt=값{text}", GenerateConfig) == f"값{text}"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("가나a1/*.-_ "), min_size=1, max_size=6).map(str.strip).filter(bool), max_size=3)
)
def test_lists(items: list[str]) -> None:
    assert parsed(f"inputs=[{','.join(items)}]", CorpusConfig) == items


@pytest.mark.parametrize("text", ["안녕, '세상' [a] {b: 1} \\ ="])
def test_strings_compose(text: str) -> None:
    assert composed("generate", "run=r", f"prompt={text}").prompt == text
    assert composed("generate", "run=r", "question=q", "prompt=null").prompt is None
    assert composed("pretrain", *PRETRAIN, f"name={text}").run == "r"


def test_interpolations_stay_hydras() -> None:
    assert composed("pretrain", *PRETRAIN, "name=한글", "data.train=자료/${name}/a").data.train == "자료/한글/a"


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("/data/말뭉치/*.jsonl", ["/data/말뭉치/*.jsonl"]),
        ("a,b", ["a,b"]),
        ("[]", []),
        ("[가, 나]", ["가", "나"]),
        ("['가,나', 다]", ["가,나", "다"]),
        ('["가,나", 다]', ["가,나", "다"]),
        ("['작은\\'따옴표']", ["작은'따옴표"]),
        ("/data/[ab]*.jsonl", ["/data/[ab]*.jsonl"]),
        ("[/data/[ab]*.jsonl, c]", ["/data/[ab]*.jsonl", "c"]),
        ("[C:\\말뭉치\\a.txt]", ["C:\\말뭉치\\a.txt"]),
        ("[1, 2]", ["1", "2"]),
    ],
)
def test_lists_by_example(value: str, items: list[str]) -> None:
    assert [str(item) for item in parsed(f"inputs={value}", CorpusConfig)] == items


def test_named_sets_have_any_path() -> None:
    config = composed("pretrain", *PRETRAIN, "+data.validation.held_out=/자료/가,나")
    assert config.data.validation == {"held_out": "/자료/가,나"}


def test_sets_named_in_hangul() -> None:
    config = composed("pretrain", *PRETRAIN, "+data.validation.뉴스=/자료/뉴스", "+data.validation.책=/자료/책")
    assert config.data.validation == {"뉴스": "/자료/뉴스", "책": "/자료/책"}


def test_numbers_and_choices_keep_their_types() -> None:
    config = composed(
        "pretrain", *PRETRAIN, "train.precision=fp32", "logging.wandb=disabled", "schedule.name=wsd",
        "logging.peak_tflops=null", "model.tie_word_embeddings=true", "optimizer.lr=3e-4",
    )  # fmt: skip
    assert config.train.precision.name == "fp32"
    assert config.logging.wandb.name == "disabled"
    assert config.logging.peak_tflops is None
    assert config.model.tie_word_embeddings is True
    assert config.optimizer.lr == 3e-4


def test_the_deepspeed_section_passes_through() -> None:
    config = composed(
        "pretrain",
        *PRETRAIN,
        "+deepspeed.wall_clock_breakdown=true",
        "+deepspeed.zero_optimization.reduce_bucket_size=7",
    )
    assert config.deepspeed == {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 7}}


HANGUL = "말뭉치, 'ㄱ' [ㄴ] \"ㄷ\" C:\\ㄹ"


@pytest.mark.parametrize("words", [["-m", "megakor", "corpus"], ["-m", "megakor.corpus"]], ids=["verb", "module"])
def test_hangul_through_a_process(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / HANGUL
    folder.mkdir()
    text = "\n".join(json.dumps({"글": f"{number}번째 글이다."}, ensure_ascii=False) for number in range(20))
    (folder / "글.jsonl").write_text(text, encoding="utf-8")
    out = tmp_path / f"나온 {HANGUL}"
    ended = command(*words, f"inputs={folder}/글.jsonl", f"out={out}", "text_key=글", "heldout_ratio=0.2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((out / "train.jsonl").read_text().splitlines()[0])["text"].endswith("번째 글이다.")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, out.name}


def test_hangul_in_another_locale(tmp_path: Path) -> None:
    ended = command("-m", "megakor", "generate", "run=없는 곳", "prompt=안녕", env={"LC_ALL": "C", "LANG": "C"})
    assert ended.returncode == 1
    assert "없는 곳" in ended.stderr


def test_a_flag_sets_the_key_of_its_name() -> None:
    assert composed("checkpoint prune", "run=r", "--dry-run").dry_run
    assert composed("launch pretrain", *PRETRAIN, "--dry-run").dry_run
    assert not composed("launch pretrain", *PRETRAIN).dry_run


@pytest.mark.parametrize("flag", ["--dry-run", "--name"])
def test_a_flag_that_is_no_key_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`pretrain` has no dry run, and a key with a value is no flag."""
    with pytest.raises(SystemExit) as ended:
        composed("pretrain", *PRETRAIN, flag)
    assert ended.value.code not in (0, None)
    assert flag in capsys.readouterr().err
