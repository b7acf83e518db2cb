"""The chat template: how a question, its context and its answer become text.

It is KoAlpaca's format as a Jinja template, the one that also travels into the Hugging Face export. Prompt and answer
are tokenised apart, so that the border between them is a token border; the answer brings its own leading space.
"""

from __future__ import annotations

from importlib.resources import files

from jinja2.sandbox import ImmutableSandboxedEnvironment

FILE = "chat_template.jinja"


def chat_template() -> str:
    """The template's source."""
    return files("megakor.instruct").joinpath(FILE).read_text(encoding="utf-8")


def messages(question: str, context: str) -> list[dict[str, str]]:
    """A question, with its context if there is one, as chat messages."""
    asked = [{"role": "user", "content": question}]
    return [*asked, {"role": "context", "content": context}] if context else asked


def render_prompt(question: str, context: str = "") -> str:
    """The text up to where the answer begins."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders
    template = environment.from_string(chat_template())
    return template.render(messages=messages(question, context), add_generation_prompt=True, eos_token="")


def render_answer(answer: str) -> str:
    """The text of an answer, which the end token follows as an id."""
    return " " + answer
