"""A loaded checkpoint that speaks: text in, text out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megakor.checkpoint.reader import load_model, resolve, run_of
from megakor.config.schema import GenerateConfig
from megakor.generate.sampling import continuation
from megakor.instruct.template import FILE, render_prompt
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.tokenizer.tokenizer import Tokenizer


@dataclass
class Speaker:
    """A model with its tokenizer.

    Attributes:
        answers: whether the model was tuned to the chat template.
    """

    model: GPTNeoXForCausalLM
    tokenizer: Tokenizer
    answers: bool

    @classmethod
    def load(cls, path: str | Path) -> Speaker:
        """Load a run's or checkpoint folder's model on the CPU in fp32.

        Raises:
            ValueError: the run's tokenizer is not the one that the checkpoint was trained with.
        """
        checkpoint = resolve(path)
        model, manifest = load_model(checkpoint)
        tokenizer = Tokenizer.load(run_of(checkpoint) / "tokenizer")
        if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise ValueError(f"{tokenizer.folder}: fingerprint must be {manifest.tokenizer_fingerprint[:12]}…")
        return cls(model, tokenizer, answers=(tokenizer.folder / FILE).is_file())

    def speak(self, text: str, config: GenerateConfig, seed: int) -> str:
        """What the model writes after `text`."""
        ids = continuation(
            self.model,
            self.tokenizer.encode(text),
            num_tokens=self.tokenizer.vocab_size,
            eod_id=self.tokenizer.eod_id,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            generator=torch.Generator().manual_seed(seed),
        )
        return self.tokenizer.decode(ids)

    def generate(self, config: GenerateConfig) -> list[str]:
        """`num_samples` continuations of the prompt, or answers to the question, each from a seed of its own.

        Raises:
            ValueError: a question to a checkpoint that was not instruction-tuned.
        """
        if config.question is not None and not self.answers:
            raise ValueError(f"question={config.question} must go to an instruction-tuned run; give a prompt instead")
        text = config.prompt if config.question is None else render_prompt(config.question, config.context)
        return [self.speak(text or "", config, config.seed + index).strip() for index in range(config.num_samples)]
