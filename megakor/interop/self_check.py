"""The export against its source: a folder and a checkpoint go in, the differences between their models come out.

Both models compute in fp32. A bf16 or fp16 export is compared with the checkpoint's weights rounded to that type, so
the tolerance is the same for every type: what remains is the order of additions. What the rounding itself changes is
reported beside it and never judged.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from megakor.checkpoint.reader import load_model, run_of
from megakor.tokenizer.tokenizer import Tokenizer

LOGIT_TOLERANCE = 1e-4  # absolute, fp32 arithmetic on both sides
NUM_GREEDY_TOKENS = 8
NUM_POSITIONS = 64

# Text that conversions get wrong: spaces at the ends and in runs, newlines, compatibility jamo, decomposed Hangul, mask
# tokens, the space sign itself, byte pieces by name, scripts without pieces.
PROBES = (
    "  옛날 옛적  깊은 산속에,\n\n\t나무꾼이 살았습니다. ",
    "ㅋㅋ 진짜요? ㅠㅠ 84㎡, 2024년 3월 15일 1,234,567원",
    "\u1112\u1161\u11ab\u1100\u1173\u11af 낱자와 漢字, cafe\u0301, English words & ﬁ ligatures",
    "전화 <|tel|>, 계좌<|acc|>번호 <|rrn|>\n<|tel|> a▁b <0x41> <unk>",
    "🙂👩‍👩‍👧 ᄀᆞᆯ ไทย \x00\x7f\u3000",
)


def self_check(out: str | Path, checkpoint: str | Path) -> dict[str, Any]:
    """Load an export offline and compare it with the checkpoint it was made from.

    Returns:
        max_logit_difference: largest absolute difference over two sequences, the true vocabulary.
        tolerance: what it was held to.
        rounding_logit_difference: the largest difference between the export and the unrounded checkpoint.
        greedy_equal: whether 8 greedy tokens are the same. Where the source's two best logits are nearer than the
            tolerance, either token is right, and the comparison ends.
        tokens_equal: whether both tokenizers give the same ids, and the text back, on `PROBES`.

    Raises:
        ValueError: one of them does not hold.
    """
    out, checkpoint = Path(out), Path(checkpoint)
    with _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
        exported = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype=torch.float32).eval()
    source_tokenizer = Tokenizer.load(run_of(checkpoint) / "tokenizer")
    tokens_equal = all(_same_tokens(tokenizer, source_tokenizer, text) for text in PROBES)

    dtype = getattr(torch, json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"])
    source, manifest = load_model(checkpoint)
    num_tokens, max_length = manifest.num_tokens, exported.config.max_position_embeddings
    input_ids = _inputs(tokenizer, num_tokens, min(NUM_POSITIONS, max_length))  # [2, seq]
    prompt = input_ids[:1, : max(1, min(16, max_length - NUM_GREEDY_TOKENS))]
    with torch.inference_mode():
        whole_logits = source(input_ids)[..., :num_tokens]
        for parameter in source.parameters():
            parameter.copy_(parameter.to(dtype))
        source_logits = source(input_ids)[..., :num_tokens]
        exported_logits = exported(input_ids=input_ids).logits[..., :num_tokens]
        greedy_equal = same_greedy(source, exported, prompt, num_tokens)
    figures = {
        "max_logit_difference": (source_logits - exported_logits).abs().max().item(),
        "tolerance": LOGIT_TOLERANCE,
        "rounding_logit_difference": (whole_logits - exported_logits).abs().max().item(),
        "greedy_equal": greedy_equal,
        "tokens_equal": tokens_equal,
    }
    # A difference that is not a number fails as well.
    if not figures["max_logit_difference"] <= LOGIT_TOLERANCE or not greedy_equal or not tokens_equal:
        raise ValueError(
            f"the export of {checkpoint} does not agree with it: "
            f"max_logit_difference={figures['max_logit_difference']:.3g} must be at most {LOGIT_TOLERANCE:g}, "
            f"greedy_equal={greedy_equal} and tokens_equal={tokens_equal} must be True"
        )
    return figures


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' loading bars, which know no log files, off for the moment."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def _same_tokens(tokenizer: Any, source: Tokenizer, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids == list(source.encode(text)) and tokenizer.decode(ids) == source.decode(ids)


def _inputs(tokenizer: Any, num_tokens: int, length: int) -> torch.Tensor:
    """[2, length]: a sequence of text, and one of tokens drawn over the whole vocabulary."""
    text_ids = tokenizer("".join(PROBES), add_special_tokens=False, verbose=False)["input_ids"]
    first = torch.tensor(list(itertools.islice(itertools.cycle(text_ids), length)))
    second = torch.randint(num_tokens, (length,), generator=torch.Generator().manual_seed(0))
    return torch.stack([first, second])


def same_greedy(source: torch.nn.Module, exported: Any, prompt: torch.Tensor, num_tokens: int) -> bool:
    """Whether `exported.generate` chooses at every position what the source's logits allow."""
    continued = exported.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_GREEDY_TOKENS
    )
    sequence = prompt
    for chosen in continued[0, prompt.shape[1] :]:
        logits = source(sequence)[0, -1, :num_tokens]
        if chosen != logits.argmax():
            return chosen < num_tokens and bool(logits.max() - logits[chosen] <= LOGIT_TOLERANCE)
        sequence = torch.cat([sequence, chosen.view(1, 1)], dim=1)
    stopped = sequence.shape[1] - prompt.shape[1] < NUM_GREEDY_TOKENS
    return not stopped or int(sequence[0, -1]) == exported.generation_config.eos_token_id
