"""A conversation with a diffusion model: its turns, its settings, and what each answer cost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from a2d_core import sampling
from a2d_core.config import SampleConfig, UserError, require
from a2d_core.models import DiffusionModel
from a2d_core.settings import build, describe, parse_override, to_dict
from a2d_core.watch import Watched

HELP = """\
/system TEXT            set the system prompt; without TEXT, remove it
/settings [FIELD]       how answers are generated; with a field, what it means
/settings FIELD=VALUE   change it, as in /settings threshold=0.7 temperature=0.5
/reset                  forget the conversation
/help                   this
/quit                   leave; so does Ctrl-D. Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost."""

    text: str
    nfe: int
    """Network evaluations."""
    tokens: int
    """New tokens."""
    seconds: float
    """Time from question to answer, without the time it took to show it."""
    forgotten: int = 0
    """Turns that were left out, the oldest first, because the context was full."""
    stopped: bool = False
    """Whether Ctrl-C ended it; then the text is what was there before the first mask token."""


class Chat:
    """A conversation: each answer sees the turns before it, the oldest of which are left out when the context is full.

    `raw` continues each text as it stands, without chat template and memory: for models that were not instruction-tuned.
    `forget` answers each question by itself: for models that were tuned on single questions.
    """

    def __init__(self, model: DiffusionModel, config: SampleConfig, *, raw: bool = False, forget: bool = False, seed: int = 0) -> None:
        if not raw:
            model.require_chat_template("without one it cannot hold a conversation, so use --raw to continue plain text")
        model.objective.check_sampling(config)
        self.model, self.config, self.raw, self.forget = model, config, raw, forget
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.messages: list[dict[str, str]] = []
        self.system: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt."""
        self.messages = []

    def instruct(self, text: str) -> None:
        """Take `text` as the system prompt, none where it is empty; raises `UserError` where the model's template has none."""
        require(not self.raw, "plain text has no system prompt: leave out --raw")
        system = [{"role": "system", "content": text}] if text else []
        try:
            self.model.encode_messages([*system, {"role": "user", "content": "?"}])
        except TemplateError as error:
            raise UserError(f"this model's chat template takes no system prompt ({error}): say it in your first message") from None
        self.system = system

    def answer(self, text: str, show: Callable[[Watched, float], None] | None = None) -> Answer:
        """Answer the next turn, and let `show` see it, and the seconds so far, after each evaluation.

        A KeyboardInterrupt ends the answer where it is. Raises `UserError` where even this turn alone exceeds the model's context.
        """
        asked = {"role": "user", "content": text}
        history = [] if self.raw or self.forget else self.messages
        start, spent = time.perf_counter(), 0.0
        prompt = self._prompt([*history, asked])
        while history and not self._fits(prompt):
            history = history[2:]
            prompt = self._prompt([*history, asked])
        watched, stopped = Watched.begin(self.model, prompt, self.config), False
        try:
            for event in sampling.stream(self.model, [prompt], self.config, generator=self.generator, evaluations=show is not None):
                watched.see(event)
                if show is not None:
                    before = time.perf_counter()
                    show(watched, before - start - spent)
                    spent += time.perf_counter() - before
        except KeyboardInterrupt:
            stopped = True
        forgotten = 0 if self.raw or self.forget else (len(self.messages) - len(history)) // 2
        tokens, reply = self._so_far(watched)
        self.messages = [*history, asked, {"role": "assistant", "content": reply}] if reply or not stopped else history
        return Answer(reply, watched.nfe, tokens, time.perf_counter() - start - spent, forgotten, stopped)

    def _so_far(self, watched: Watched) -> tuple[int, str]:
        """How many tokens the answer has, and its text: up to the first mask token, where it was stopped."""
        if watched.generation is not None:
            return len(watched.generation.tokens), watched.generation.text
        begin = watched.canvas.begin
        end = next(i for i in range(begin, len(watched.canvas.tokens) + 1) if i not in watched.marks)
        tokens = [watched.marks[i].token for i in range(begin, end)]
        return len(tokens), str(self.model.tokenizer.decode(tokens, skip_special_tokens=True))

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.model.encode(messages[-1]["content"], chat=False) if self.raw else self.model.encode_messages(self.system + messages)

    def _fits(self, prompt: list[int]) -> bool:
        context = self.model.context
        return context is None or len(prompt) + self.config.max_new_tokens <= context


def obey(conversation: Chat, name: str, rest: str, fixed: dict[str, str]) -> str:
    """Carry out a command, and return what to say of it. `fixed`: fields that /settings does not change, and why.

    Raises `UserError` for an unknown command or setting, and for what the model cannot do.
    """
    if name == "settings":
        return _settings(conversation, rest, fixed)
    if name == "system":
        conversation.instruct(rest)
        return "the system prompt is set" if rest else "there is no system prompt"
    if name == "reset":
        conversation.reset()
        return "the conversation is forgotten"
    require(name == "help", f"there is no command /{name}: /help lists them")
    return HELP


def _settings(conversation: Chat, text: str, fixed: dict[str, str]) -> str:
    """Change `field=value ...`, or tell the value and the meaning of a field, or all values."""
    now, meanings = to_dict(conversation.config), describe(SampleConfig)
    if not text:
        return "\n".join(f"{name:<18} {_shown(now[name])}" for name in now if name not in fixed) + "\n/settings FIELD tells what it means"
    if "=" not in text:
        require(text in now and text not in fixed, f"there is no setting '{text}': /settings lists them")
        return f"{text}={_shown(now[text])}: {meanings[text]}"
    changes: dict[str, Any] = {}
    for part in re.split(r"\s+(?=\w+=)", text):
        path, value = parse_override(part)
        name = ".".join(path)
        require(name not in fixed, f"{name} cannot be changed here: {fixed.get(name)}")
        changes[name] = value
    config = build(SampleConfig, {**now, **changes}, "sample")
    conversation.model.objective.check_sampling(config)
    conversation.config = config
    return "\n".join(f"{name}={_shown(to_dict(config)[name])}" for name in changes)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def forgot(conversation: Chat, turns: int) -> str:
    """What to say where turns were left out."""
    return (
        f"(the context of {conversation.model.context} positions is full: the oldest {'turn was' if turns == 1 else f'{turns} turns were'} "
        "left out: /reset begins anew, and a lower max_new_tokens leaves more room)"
    )
