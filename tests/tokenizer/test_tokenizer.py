from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakor.tokenizer import Tokenizer, special

FIXED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

VALID = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
CHARACTERS = "가각힣ㅋㅎㅏ㎡①漢字 \u3000\u00a0\t\n\r\0▅_\u1100\u1161\u11a8\u3131\ufeff\ufffd\uffff\U0010ffff"
WORDS = ["  ", "\n\n", "한국", "학교에서", "12,345", "é", "e\u0301", "👨‍👩‍👧"]
LITERALS = [
    *special.CONTROL_SYMBOLS,
    *special.USER_DEFINED_SYMBOLS,
    "</s>",
    "<unk>",
    "<0x41>",
    "<0x",
    "<|",
    "|>",
    "<|sep",
    "Ġ",
]
KOREAN = st.sampled_from([*CHARACTERS, *WORDS, *LITERALS])
TEXTS = st.one_of(st.text(VALID), st.lists(KOREAN, max_size=40).map("".join), st.text(VALID, min_size=50, max_size=200))


@FIXED
@given(text=TEXTS)
def test_round_trip_is_nfc(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    expected = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(ids) == expected
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert not {tokenizer.eod_id, tokenizer.sep_id, special.UNKNOWN_ID} & set(ids)
    assert tokenizer.num_bytes_per_id()[ids].sum() == len(expected.encode())
    for symbol in special.USER_DEFINED_SYMBOLS:
        assert ids.count(tokenizer.special_id(symbol)) == expected.count(symbol)


def test_every_character_comes_back(tokenizer: Tokenizer) -> None:
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF and code != 0x2581)
    while block := "".join(itertools.islice(characters, 10_000)):
        assert tokenizer.decode(tokenizer.encode(block)) == unicodedata.normalize("NFC", block)


@pytest.mark.parametrize(
    "text", ["", "\n", "\n\n\n", " ", "     ", " 앞 공백", "뒤 공백 ", "가  나   다", "\t\t탭\t", "줄\r\n줄\r"]
)
@pytest.mark.parametrize(
    "end",
    [
        "",
        "😀👨‍👩‍👧🇰🇷",
        "ㅋㅋㅋ ㅠㅠ",
        "84㎡ ①",
        "大韓民國",
        "\u1100\u1161\u11a8",
        "ᄒᆞᆫ글",
        "\ufeff",
        "\0",
        "▅",
        "\u3000",
    ],
)
def test_what_default_normalisation_would_lose(tokenizer: Tokenizer, text: str, end: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text + end)) == unicodedata.normalize("NFC", text + end)


def test_the_reserved_character_becomes_an_underscore(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("가▁나") == tokenizer.encode("가_나")


def test_control_literals_never_parse_and_masks_do(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eod_id, tokenizer.sep_id) == (0, 2)
    for literal in (*special.CONTROL_SYMBOLS, special.UNKNOWN, "<0x41>"):
        ids = tokenizer.encode(f"앞{literal}뒤")
        assert tokenizer.decode(ids) == f"앞{literal}뒤"
        assert not {0, 1, 2} & set(ids)
    for mask in special.MASK_TOKENS:
        index = tokenizer.special_id(mask)
        ids = tokenizer.encode(f"전화{mask}{mask}입니다")
        assert ids.count(index) == 2
        assert tokenizer.decode(ids) == f"전화{mask}{mask}입니다"
    assert tokenizer.decode([tokenizer.eod_id, *tokenizer.encode("가"), tokenizer.sep_id, special.UNKNOWN_ID]) == "가"


def test_newlines_and_digits_are_single_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("\n\n") == [tokenizer.newline_id] * 2
    assert len(tokenizer.encode("2024")) == 4
    pieces = [tokenizer.piece(index) for index in range(special.NUM_FIXED_PIECES, tokenizer.vocab_size)]
    assert not [
        piece for piece in pieces if "\n" in piece or (len(piece.strip("▁")) > 1 and any(map(str.isdigit, piece)))
    ]


def test_ids_are_laid_out_as_documented(tokenizer: Tokenizer) -> None:
    names = [special.END_OF_DOCUMENT, special.UNKNOWN, special.SEPARATOR, *special.USER_DEFINED_SYMBOLS]
    names += [f"<0x{byte:02X}>" for byte in range(special.NUM_BYTES)]
    assert [tokenizer.piece(index) for index in range(special.NUM_FIXED_PIECES)] == names
    assert len({tokenizer.piece(index) for index in range(tokenizer.vocab_size)}) == tokenizer.vocab_size == 450


def test_bytes_per_id_are_what_each_id_decodes_to(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.num_bytes_per_id()
    assert sizes.dtype == np.int64
    assert sizes.shape == (tokenizer.vocab_size,)
    for index in range(tokenizer.vocab_size):
        if not tokenizer.is_byte(index):
            assert sizes[index] == len(tokenizer.decode([index]).encode())
        else:
            assert sizes[index] == 1


@FIXED
@given(text=TEXTS)
def test_ids_are_those_of_the_lines_one_by_one(tokenizer: Tokenizer, text: str) -> None:
    lines = unicodedata.normalize("NFC", text).split("\n")
    ids = [index for line in lines for index in [*tokenizer.encode(line), tokenizer.newline_id]][:-1]
    assert tokenizer.encode(text) == ids


def test_blocks_change_no_id_of_bpe(tokenizer: Tokenizer) -> None:
    text = "\n".join(["학교에서 2024년  ㅋㅋ    漢字😀", "", " 대한민국"] * 2000)
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto()).encode(text)
    assert (tokenizer.encode(text) == whole) or tokenizer.meta["kind"] == "unigram"
    assert tokenizer.decode(whole) == text


def test_batches_are_single_texts(tokenizer: Tokenizer) -> None:
    texts = ["학교에서", "", "▁\n漢字"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_lone_surrogates_and_foreign_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D83D, at character 1"):
        tokenizer.encode("가\ud83d")
    for index in (-1, tokenizer.vocab_size, tokenizer.vocab_size + 100):
        with pytest.raises(ValueError, match=f"ids: {index} must be .* below vocab_size=450"):
            tokenizer.decode([5, index])


def test_decodes_arrays_and_broken_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("漢")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "漢"
    first_byte = special.NUM_FIXED_PIECES - special.NUM_BYTES
    assert "\ufffd" in tokenizer.decode([first_byte + 0xFF])


def test_pickled_copies_are_the_same(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("학교에서 ㅋㅋ 漢") == tokenizer.encode("학교에서 ㅋㅋ 漢")
    assert (copy.fingerprint, copy.folder, copy.meta) == (tokenizer.fingerprint, tokenizer.folder, tokenizer.meta)


def copy_of(tokenizer: Tokenizer, folder: Path) -> Path:
    for file in tokenizer.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.meta.json"])
def test_missing_and_damaged_files_are_named(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    file = copy_of(tokenizer, tmp_path) / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"tokenizer=.* holds no {name}"):
        Tokenizer.load(tmp_path)


def test_a_model_of_another_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    meta = json.loads((copy_of(tokenizer, tmp_path) / "tokenizer.meta.json").read_text())
    meta["fingerprint"] = "0" * 64
    (tmp_path / "tokenizer.meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="belongs to fingerprint=0000"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(
    "MEGAKOR_TEST_CORPUS" not in os.environ, reason="MEGAKOR_TEST_CORPUS names no folder of Korean text"
)
def test_round_trip_on_real_text(tokenizer: Tokenizer) -> None:
    files = sorted(Path(os.environ["MEGAKOR_TEST_CORPUS"]).glob("*.jsonl.gz"))
    assert files, "MEGAKOR_TEST_CORPUS holds no *.jsonl.gz"
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in itertools.islice(lines, 40):
                text = json.loads(line)["text"].replace("▁", "_")
                assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
