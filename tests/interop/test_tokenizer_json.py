from __future__ import annotations

import gzip
import json
import os
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as FastTokenizer

from megakor.corpus.text import normalize
from megakor.interop.tokenizer_json import build_tokenizer
from megakor.tokenizer.special import CONTROL_SYMBOLS
from megakor.tokenizer.tokenizer import Tokenizer
from tests.interop.conftest import generated_lines

# The characters of Unicode 9, which both sides order alike, in the sizes that tests of Korean text care for.
CHARACTERS = st.one_of(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z", "Cc"]),
    st.sampled_from([chr(code) for code in range(0xAC00, 0xD7A4, 97)]),
    st.sampled_from([chr(code) for code in range(0x1100, 0x1200)]),
    st.sampled_from(list("\u0301\u0323\u0316\u0338\u3099\u200d\ufe0f\u2581_ \n\t\r\0")),
    st.sampled_from(["<|acc|>", "<|tel|>", "<|rrn|>", "<|acc", "<0xEA>", "<unk>", "  ", "ㅋㅋ", "입니다", "하였다"]),
)
TEXT = st.lists(CHARACTERS, max_size=40).map("".join).filter(lambda text: not any(c in text for c in CONTROL_SYMBOLS))


def proto_of(tokenizer: Tokenizer) -> ModelProto:
    proto = ModelProto()
    proto.ParseFromString(tokenizer.model_proto())
    return proto


@pytest.fixture(scope="module")
def fast_bpe(bpe: Tokenizer) -> FastTokenizer:
    # Through the file's text, as a user gets it.
    return FastTokenizer.from_str(build_tokenizer(proto_of(bpe)).to_str())


def real_lines() -> Iterator[str]:
    for path in sorted(Path(os.environ["MEGAKOR_TEST_CORPUS"]).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for _, line in zip(range(300), file, strict=False):
                yield from json.loads(line)["text"].split("\n")


def test_bpe_ids_equal_on_10000_generated_lines(bpe: Tokenizer, fast_bpe: FastTokenizer) -> None:
    lines = generated_lines(11, 10_000)
    for line in lines:
        ids = fast_bpe.encode(line).ids
        assert ids == bpe.encode(line), line
        assert fast_bpe.decode(ids) == normalize(line)[0]
    assert sum("  " in line for line in lines) > 1000
    assert sum("<|acc|>" in line for line in lines) > 100


@pytest.mark.skipif("MEGAKOR_TEST_CORPUS" not in os.environ, reason="MEGAKOR_TEST_CORPUS names no folder of text")
def test_bpe_ids_equal_on_real_lines(bpe: Tokenizer, fast_bpe: FastTokenizer) -> None:
    lines = list(real_lines())
    assert len(lines) >= 10_000
    for line in lines:
        assert fast_bpe.encode(line).ids == bpe.encode(line), line


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_bpe_ids_equal_on_any_text(text: str, bpe: Tokenizer, fast_bpe: FastTokenizer) -> None:
    ids = fast_bpe.encode(text).ids
    assert ids == bpe.encode(text)
    assert fast_bpe.decode(ids) == normalize(text)[0]


def test_bpe_ids_equal_for_random_vocabularies() -> None:
    """Vocabularies that no trainer would make, over two letters: pairs overlap wherever they can."""
    pieces = [""]
    for _ in range(5):
        pieces += [piece + letter for piece in pieces for letter in "ab"]
    pieces = sorted({piece for piece in pieces if len(piece) > 1})
    for seed in range(60):
        rng = random.Random(seed)
        proto = handmade_proto([*rng.sample(pieces, rng.randint(5, 30)), "a", "b"])
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        fast = build_tokenizer(proto)
        for _ in range(100):
            text = "".join(rng.choices("ab", k=rng.randint(1, 40)))
            assert fast.encode(text).ids == processor.encode(text), (seed, text)


def handmade_proto(pieces: list[str]) -> ModelProto:
    """A BPE model of bytes and of `pieces`, the best first."""
    proto = ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece="<unk>", score=0, type=2)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=6)
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-rank, type=1)
    return proto


def test_unigram_ids_equal(unigram: Tokenizer) -> None:
    """Exactly, ties included: the tokenizer's scores are rounded so that their sums are exact in both libraries."""
    fast = FastTokenizer.from_str(build_tokenizer(proto_of(unigram)).to_str())
    for line in generated_lines(13, 10_000):
        ids = fast.encode(line).ids
        assert ids == unigram.encode(line), line
        assert fast.decode(ids) == normalize(line)[0]


def test_literals_of_unreachable_pieces_stay_text(unigram: Tokenizer) -> None:
    """Also where a character of the literal has no piece: unknown characters must not make the literal the cheaper."""
    proto = proto_of(unigram)
    keep = [piece for piece in proto.pieces if piece.piece not in ("x", "0", "<") or piece.type != 1]
    del proto.pieces[:]
    proto.pieces.extend(keep)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    fast = build_tokenizer(proto)
    for text in ("<0x41>", "가<0x41>나", "<unk>", "<unk><0xFF>", "x0<"):
        assert fast.encode(text).ids == processor.encode(text), text


def test_control_literals_are_parsed_and_user_defined_symbols_are_not_special(
    bpe: Tokenizer, fast_bpe: FastTokenizer
) -> None:
    assert fast_bpe.encode("가<|endoftext|>나").ids == [*bpe.encode("가"), bpe.eod_id, *bpe.encode("나")]
    assert fast_bpe.decode([*bpe.encode("가<|acc|>\n"), bpe.eod_id]) == "가<|acc|>\n"
    # The mark composes with `>`, so that after NFC there is no literal.
    text = "<|acc|>\u0338"
    assert fast_bpe.encode(text).ids == bpe.encode(text)
    assert fast_bpe.decode(fast_bpe.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_vocabulary_is_the_model_s(bpe: Tokenizer, fast_bpe: FastTokenizer) -> None:
    assert fast_bpe.get_vocab_size() == bpe.vocab_size
    assert all(fast_bpe.id_to_token(index) == bpe.piece(index) for index in range(bpe.vocab_size))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("normalizer_spec", "add_dummy_prefix", True),
        ("normalizer_spec", "remove_extra_whitespaces", True),
        ("normalizer_spec", "precompiled_charsmap", b"\x00"),
        ("trainer_spec", "byte_fallback", False),
        ("trainer_spec", "model_type", 3),
    ],
)
def test_other_options_are_refused(bpe: Tokenizer, section: str, name: str, value: object) -> None:
    proto = proto_of(bpe)
    setattr(getattr(proto, section), name, value)
    with pytest.raises(ValueError, match=r"^tokenizer\.model: "):
        build_tokenizer(proto)
