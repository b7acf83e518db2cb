"""A SentencePiece model as a Hugging Face `tokenizer.json`: pieces and scores go in, the same ids come out.

The stock converter strips and collapses spaces, orders merges by id and matches symbols before normalisation, so the
conversion is written out here, for the models that `megakor train-tokenizer` makes (identity normalisation, no dummy
prefix, spaces kept, byte fallback):

- the text goes through NFC, U+2581 becomes `_` (as in `megakor.corpus.text`) and a space becomes U+2581;
- user-defined symbols (newline, mask tokens) are added tokens that are matched in the normalised text, longest first;
- BPE: merges of every split of every piece, in the order of the pieces' scores;
- unigram: the pieces with their scores; pieces that SentencePiece never matches in text cannot be reached.
  SentencePiece adds scores in single precision and `tokenizers` in double: of two segmentations with the very same
  score (in a run of one character) they can choose differently, unless sums are exact, as with scores that are
  multiples of 1/256;
- what no piece covers becomes byte pieces, and the decoder puts bytes together again.

Control symbols are `special` added tokens. Unlike `megakor.tokenizer.Tokenizer`, which never parses them from text, a
Hugging Face tokenizer turns their literals into ids: that is how its chat templates work. On text without those
literals the ids are equal. (The `tokenizers` library orders combining marks by an older Unicode than Python does: in a
run of two or more, marks assigned after Unicode 9 can come out in another order. None of them is of a Korean script.)
"""

from __future__ import annotations

from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megakor.corpus.text import REPLACEMENT, RESERVED

Piece = ModelProto.SentencePiece

# Far below any path over pieces that spell the same characters, and small enough to keep sums of scores exact.
UNREACHABLE_SCORE = -4096.0


def build_tokenizer(proto: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` with the ids of a SentencePiece model.

    Args:
        proto: the model's `ModelProto`.

    Raises:
        ValueError: the model was trained with options that this conversion does not know.
    """
    _check_options(proto)
    if proto.trainer_spec.model_type == TrainerSpec.BPE:
        tokenizer = Tokenizer(_bpe(proto))
    else:
        tokenizer = Tokenizer(_unigram(proto))
        uncovered = _uncovered_literal_characters(proto)
        if uncovered:
            # No piece holds such a character, so a cut around it changes no segmentation; it keeps the literal of
            # an unreachable piece, which would be cheaper than an unknown character, from being matched.
            pattern = Regex("[" + "".join(f"\\x{{{ord(character):x}}}" for character in uncovered) + "]")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(RESERVED, REPLACEMENT), normalizers.Replace(" ", RESERVED)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(RESERVED, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type == Piece.CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(piece.piece, normalized=True) for piece in proto.pieces if piece.type == Piece.USER_DEFINED]
    )
    assert tokenizer.get_vocab_size(with_added_tokens=True) == len(proto.pieces)
    return tokenizer


def _check_options(proto: Any) -> None:
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (TrainerSpec.BPE, TrainerSpec.UNIGRAM):
        raise ValueError(f"tokenizer.model: model_type={trainer.model_type} must be BPE or unigram")
    if normalizer.precompiled_charsmap:
        raise ValueError(f"tokenizer.model: normalization_rule_name={normalizer.name} must be identity")
    rules = [
        ("add_dummy_prefix", normalizer.add_dummy_prefix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("byte_fallback", trainer.byte_fallback, True),
    ]
    for name, value, expected in rules:
        if value != expected:
            raise ValueError(f"tokenizer.model: {name}={value} must be {expected} for a tokenizer.json of equal ids")
    if len({piece.piece for piece in proto.pieces}) != len(proto.pieces):
        raise ValueError("tokenizer.model: pieces must differ from one another")


def _bpe(proto: Any) -> models.BPE:
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    return models.BPE(
        vocab=vocab,
        merges=_merges(proto),
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=False,
        byte_fallback=True,
        ignore_merges=False,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best first.

    SentencePiece joins the adjacent pair whose joint piece has the highest score, the leftmost of equals, whichever
    split of the piece the pair is. A merge list ranks the splits of one piece apart, which changes nothing: two
    different splits of one piece never overlap, and the tests try random vocabularies for it.
    """
    normal = {piece.piece for piece in proto.pieces if piece.type == Piece.NORMAL}
    ranked = []
    for index, piece in enumerate(proto.pieces):
        if piece.type == Piece.NORMAL:
            for cut in range(1, len(piece.piece)):
                left, right = piece.piece[:cut], piece.piece[cut:]
                if left in normal and right in normal:
                    ranked.append((-piece.score, index, cut, (left, right)))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _unigram(proto: Any) -> models.Unigram:
    reachable = Piece.NORMAL
    vocab = [(piece.piece, piece.score if piece.type == reachable else UNREACHABLE_SCORE) for piece in proto.pieces]
    return models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=True)


def _uncovered_literal_characters(proto: Any) -> list[str]:
    """The characters of unreachable pieces (`<0x41>`, `<unk>`) that no reachable piece of one character covers."""
    single = {piece.piece for piece in proto.pieces if piece.type == Piece.NORMAL and len(piece.piece) == 1}
    literals = "".join(piece.piece for piece in proto.pieces if piece.type in (Piece.BYTE, Piece.UNKNOWN))
    return sorted(set(literals) - single)
