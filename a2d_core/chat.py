"""Chat with a diffusion model in the terminal; in a pipe, one line in is one answer out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from a2d_core import models, sampling
from a2d_core.config import SampleConfig, UserError, require
from a2d_core.models import DiffusionModel

HELP = "/reset forgets the conversation, /quit ends it"


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost."""

    text: str
    nfe: float
    """Network evaluations."""
    tokens: int
    """New tokens."""
    seconds: float
    """Time from question to answer."""

    def cost(self) -> str:
        """The cost on one line."""
        return f"{self.tokens} tokens, {self.nfe:.0f} evaluations, {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"


class Chat:
    """A conversation: each answer sees the turns before it, the oldest of which are dropped when the context is full.

    `raw` continues each text as it stands, without chat template and memory: for models that were not instruction-tuned.
    `forget` answers each question by itself: for models that were tuned on single questions.
    """

    def __init__(self, model: DiffusionModel, config: SampleConfig, *, raw: bool = False, forget: bool = False, seed: int = 0) -> None:
        require(
            raw or model.tokenizer.chat_template is not None,
            "this model's tokenizer has no chat template, so it cannot hold a conversation: use --raw to continue plain text",
        )
        self.model, self.config, self.raw, self.forget = model, config, raw, forget
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def answer(self, text: str) -> Answer:
        """Answer the next turn; raises `UserError` where even this turn alone exceeds the model's context."""
        asked = {"role": "user", "content": text}
        history = [] if self.raw or self.forget else self.messages
        start = time.perf_counter()
        prompt = self._prompt([*history, asked])
        while history and not self._fits(prompt):
            history = history[2:]
            prompt = self._prompt([*history, asked])
        generation = sampling.generate(self.model, [prompt], self.config, generator=self.generator)[0]
        reply = self.model.tokenizer.decode(generation.tokens, skip_special_tokens=True)
        self.messages = [*history, asked, {"role": "assistant", "content": reply}]
        return Answer(reply, generation.nfe, len(generation.tokens), time.perf_counter() - start)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.model.encode(messages[-1]["content"], chat=False) if self.raw else self.model.encode_messages(messages)

    def _fits(self, prompt: list[int]) -> bool:
        context = self.model.context
        return context is None or len(prompt) + self.config.max_new_tokens <= context


def run(
    config: SampleConfig,
    model_dir: str | Path,
    *,
    raw: bool = False,
    forget: bool = False,
    seed: int = 0,
    objective: str | None = None,
    source: TextIO | None = None,
) -> None:
    """Load a checkpoint and chat until /quit or the end of `source` (default: the terminal, or what is piped in)."""
    source = source or sys.stdin
    conversation = Chat(models.load(model_dir, objective=objective), config, raw=raw, forget=forget, seed=seed)
    is_terminal = source.isatty()
    if is_terminal:
        print(f"{model_dir}: {HELP}")
    for line in _lines(source):
        text = line.rstrip("\n")
        if text.strip() == "/quit":
            break
        if text.strip() == "/reset":
            conversation.reset()
        elif text.strip():
            _reply(conversation, text, is_terminal)


def _reply(conversation: Chat, text: str, is_terminal: bool) -> None:
    try:
        answer = conversation.answer(text)
    except UserError as error:
        if not is_terminal:
            raise
        print(f"error: {error}")  # a person can ask again
        return
    print(answer.text, flush=True)
    if is_terminal:
        print(f"\033[2m({answer.cost()})\033[0m")


def _lines(source: TextIO) -> Iterator[str]:
    """Lines of the source, with a prompt and line editing in a terminal."""
    if not source.isatty():
        yield from source
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` arrow keys and a history; not on every platform)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
