"""What can be seen of a generation while it runs: which tokens stand where, how sure each was, and the text that is final."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from a2d_core import sampling
from a2d_core.config import SampleConfig
from a2d_core.models import DiffusionModel

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that make no character."""


@dataclass(frozen=True)
class Mark:
    """A token that was revealed."""

    token: int
    probability: float
    """Its own, when it was revealed."""
    nfe: int
    """The evaluation that revealed it, counted from 1."""


@dataclass
class Watched:
    """The answer to one prompt, as the events of `sampling.stream` tell it."""

    model: DiffusionModel
    canvas: sampling.Canvas
    marks: dict[int, Mark] = field(default_factory=dict)
    """Position -> the token that stands there now."""
    nfe: int = 0
    generation: sampling.Generation | None = None

    @classmethod
    def begin(cls, model: DiffusionModel, prompt: Sequence[int], config: SampleConfig) -> Watched:
        """An answer that is all mask tokens; raises `UserError` where the prompt (token ids) and its answer exceed the model's context."""
        tokens = [*prompt, *[model.spec.mask_token_id] * config.max_new_tokens]
        return cls(model, sampling.lay_out(model, tokens, config, len(prompt) + config.min_new_tokens, stop=config.stop))

    def see(self, event: sampling.Event) -> None:
        """Take in what an evaluation did."""
        self.nfe, self.generation = event.nfe, event.generation
        self.marks.update((position, Mark(token, probability, event.nfe)) for position, token, probability in event.revealed)
        for position in event.remasked:
            del self.marks[position]

    @property
    def active(self) -> tuple[int, int]:
        """The positions [start, stop) that are being filled: the first stretch with a mask token; none where the answer has ended."""
        for start, stop in self.canvas.stretches:
            start = max(start, self.canvas.begin)
            if any(position not in self.marks for position in range(start, stop)):
                return start, stop
            if any(self.marks[position].token in self.model.stop_token_ids for position in range(start, stop)):
                return stop, stop
        return len(self.canvas.tokens), len(self.canvas.tokens)

    def final(self) -> str:
        """The text of the stretches that are filled, up to a stop token; at the end, the answer."""
        if self.generation is not None:
            return self.generation.text
        tokens = [self.marks[position].token for position in range(self.canvas.begin, self.active[0])]
        cut = next((i for i, token in enumerate(tokens) if token in self.model.stop_token_ids), len(tokens))
        return str(self.model.tokenizer.decode(tokens[:cut], skip_special_tokens=True))


def blocks(
    model: DiffusionModel, prompt: Sequence[int], config: SampleConfig, *, generator: torch.Generator | None = None
) -> Iterator[str]:
    """Answer a prompt (token ids), and yield the text of each block when it is filled: the pieces make up the answer.

    Kept back for the next piece are bytes that make no character yet, and what may be the beginning of a stop text.
    """
    watched, said = Watched.begin(model, prompt, config), ""
    for event in sampling.stream(model, [prompt], config, generator=generator):
        watched.see(event)
        text = watched.final() if watched.generation else _certain(watched.final(), config.stop)
        if len(text) > len(said):
            yield text[len(said) :]
            said = text


def _certain(text: str, stops: Sequence[str]) -> str:
    """The text without an end that what follows may yet take away."""
    text = text.rstrip(UNFINISHED)
    begun = [text.find(stop) for stop in stops if stop in text]
    begun += [len(text) - n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: min(begun, default=len(text))]


def pieces(tokenizer: Any, tokens: Sequence[int | None]) -> list[str]:
    """The share of each token in the text, with the space before a word; None is a mask, and has none.

    Where several tokens make up one character, the last of them has it.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # a decoder drops the space before a first word
    lead = len(tokenizer.decode(anchor))
    found, waiting = [], list[int]()
    for token in tokens:
        text = ""
        if token is None:
            waiting = []
        else:
            waiting.append(token)
            text = tokenizer.decode([*anchor, *waiting])[lead:]
            if text.endswith(UNFINISHED) and len(waiting) < 4:  # of four bytes at most
                text = ""
            else:
                waiting = []
        found.append(text)
    return found
