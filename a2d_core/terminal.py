"""Chat in the terminal, which shows each block being unmasked; in a pipe, one line in is one answer out."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from a2d_core import chat, models
from a2d_core.chat import Answer, Chat
from a2d_core.config import SampleConfig, UserError
from a2d_core.models import DiffusionModel
from a2d_core.watch import Watched, pieces

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

FRAMES_PER_SECOND = 15
"""The terminal is drawn at most so often."""
MASKED = "▒"
SPECIAL = "∙"
"""A token that is no text, such as the end of the answer."""


def run(
    config: SampleConfig,
    model_dir: str | Path,
    *,
    raw: bool = False,
    forget: bool = False,
    system: str = "",
    pace: float = 0.0,
    seed: int = 0,
    objective: str | None = None,
    fixed: dict[str, str] | None = None,
    source: TextIO | None = None,
) -> None:
    """Load a checkpoint and chat until /quit or the end of `source` (default: the terminal, or what is piped in).

    `pace`: seconds that each evaluation is shown for at least. `fixed`: fields that /settings does not change, and why.
    """
    source = source or sys.stdin
    conversation = Chat(models.load(model_dir, objective=objective), config, raw=raw, forget=forget, seed=seed)
    if system:
        conversation.instruct(system)
    is_person = source.isatty() and sys.stdout.isatty()
    talk = _Terminal(conversation, str(model_dir), pace) if is_person else _Pipe(conversation, source)
    for line in talk.lines():
        text = line.strip()
        command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", text)
        if text == "/quit":
            return
        try:
            if command:
                talk.say(chat.obey(conversation, command[1], command[2] or "", fixed or {}))
            elif text:
                talk.reply(line.rstrip("\n"))
        except UserError as error:
            talk.fail(error)


class _Pipe:
    """One line in, one answer out, and nothing else on the standard output."""

    def __init__(self, conversation: Chat, source: TextIO) -> None:
        self.conversation, self.source = conversation, source

    def lines(self) -> Iterator[str]:
        yield from self.source

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def reply(self, text: str) -> None:
        answer = self.conversation.answer(text)
        print(answer.text, flush=True)
        if answer.forgotten:
            self.say(chat.forgot(self.conversation, answer.forgotten))
        if answer.stopped:
            sys.exit(130)  # what a shell expects after Ctrl-C

    def fail(self, error: UserError) -> None:
        raise error


class _Terminal(_Pipe):
    """A person, who sees the answer come about, and can ask again."""

    def __init__(self, conversation: Chat, name: str, pace: float) -> None:
        from rich.console import Console  # rich is for people: a pipe does without it

        super().__init__(conversation, sys.stdin)
        self.pace, self.console = pace, Console(highlight=False)
        spec = conversation.model.spec
        kind = f"bd3lm, blocks of {spec.block_size} tokens" if spec.objective == "bd3lm" else "mdlm"
        self.say(f"{name} ({kind})\n/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves\n")

    def lines(self) -> Iterator[str]:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` arrow keys and a history; not on every platform)
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def reply(self, text: str) -> None:
        from rich.live import Live

        view, drawn = _View(self.conversation.model), 0.0

        def show(watched: Watched, seconds: float) -> None:
            nonlocal drawn
            view.watched, view.seconds = watched, seconds
            if time.perf_counter() - drawn >= 1 / FRAMES_PER_SECOND or self.pace:
                live.refresh()
                view.drawn, drawn = watched.nfe, time.perf_counter()
                time.sleep(self.pace)

        with Live(view, console=self.console, auto_refresh=False) as live:
            view.answer = self.conversation.answer(text, show)
            live.refresh()
        if view.answer.stopped:
            self.say(f"stopped: what stands before the first {MASKED} is kept")
        if view.answer.forgotten:
            self.say(chat.forgot(self.conversation, view.answer.forgotten))
        self.console.print()

    def fail(self, error: UserError) -> None:
        self.console.print(f"error: {error}\n", style="red", markup=False)


class _View:
    """The answer as it stands, and below it what it has cost; as much of its end as the terminal has lines for, until it is finished."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.watched: Watched | None = None
        self.seconds = 0.0
        self.drawn = 0
        """Evaluations when it was last drawn: what was revealed since stands out."""
        self.answer: Answer | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.watched is None:
            return
        lines = list(self.text().wrap(console, options.max_width))
        yield from lines if self.answer else lines[-max(1, console.height - 2) :]
        cost = self.cost()
        cost.truncate(options.max_width - 2, overflow="ellipsis")  # room for the ^C that a terminal writes: a further line would stay
        yield cost

    def text(self) -> Text:
        from rich.text import Text

        if self.answer is not None and not self.answer.stopped:
            return Text(plain(self.answer.text))
        assert self.watched is not None
        start, stop = self.watched.active
        marks = [self.watched.marks.get(position) for position in range(start, stop)]
        shares = pieces(self.model.tokenizer, [mark.token if mark else None for mark in marks])
        text = Text(plain(self.watched.final()))
        for mark, share in zip(marks, shares, strict=True):
            if mark is None:
                text.append(MASKED, "dim")
            elif mark.token in self.model.tokenizer.all_special_ids:
                text.append(SPECIAL, "dim")
            else:
                text.append(plain(share), colour(mark.probability) if mark.nfe > self.drawn else "")
        return text

    def cost(self) -> Text:
        from rich.text import Text

        assert self.watched is not None
        special = set(self.model.tokenizer.all_special_ids)
        tokens = sum(mark.token not in special for mark in self.watched.marks.values())
        if self.answer is not None and not self.answer.stopped:
            tokens = self.answer.tokens
        seconds = self.answer.seconds if self.answer else self.seconds
        words = [
            f"{tokens} token{'s' * (tokens != 1)}",
            f"{self.watched.nfe} evaluation{'s' * (self.watched.nfe != 1)}",
            f"{tokens / max(self.watched.nfe, 1):.1f} tokens/evaluation",
            f"{tokens / max(seconds, 1e-9):.0f} tokens/s",
        ]
        return Text(" · ".join(words), "dim", no_wrap=True)


def colour(probability: float) -> str:
    """How a new token stands out: the surer the model was, the greener."""
    return f"bold {'red' if probability < 0.5 else 'yellow' if probability < 0.9 else 'green'}"


def plain(text: str) -> str:
    """The text without control characters: an answer must not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
