"""The chat template: KoAlpaca's text, the same through Jinja here and through transformers."""

from __future__ import annotations

from megakor.instruct.template import chat_template, messages, render_answer, render_prompt


def test_koalpaca_format() -> None:
    assert render_prompt("수도는?") + render_answer("서울") == "### 질문: 수도는?\n\n### 답변: 서울"
    assert render_prompt("요약해 줘.", "긴 글") == "### 질문: 요약해 줘.\n\n### 맥락: 긴 글\n\n### 답변:"


def test_whole_conversation_equals_prompt_answer_and_end_token(tokenizer_with_template) -> None:
    conversation = [*messages("수도는?", "대한민국"), {"role": "assistant", "content": "서울"}]
    text = tokenizer_with_template.apply_chat_template(conversation, tokenize=False)
    assert text == render_prompt("수도는?", "대한민국") + render_answer("서울") + "<|endoftext|>"
    prompt = tokenizer_with_template.apply_chat_template(
        messages("수도는?", ""), tokenize=False, add_generation_prompt=True
    )
    assert prompt == render_prompt("수도는?")


def test_two_turns_are_apart(tokenizer_with_template) -> None:
    turns = [
        {"role": "user", "content": "하나"},
        {"role": "assistant", "content": "둘"},
        {"role": "user", "content": "셋"},
    ]
    text = tokenizer_with_template.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "### 질문: 하나\n\n### 답변: 둘<|endoftext|>\n\n### 질문: 셋\n\n### 답변:"


def test_template_file_has_no_trailing_text() -> None:
    assert chat_template().strip().endswith("{%- endif -%}")
