"""A page that replays how answers were unmasked, evaluation by evaluation: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2d_core import sampling
from a2d_core.config import SampleConfig
from a2d_core.models import DiffusionModel
from a2d_core.watch import Watched, pieces

MAX_TOKENS = 4096
"""Prompts are replayed up to so many positions of answers in all: about a hundred kilobytes."""
TEMPLATE = Path(__file__).with_name("replay.html")


class Recorder:
    """Takes in the events of `sampling.stream`, and makes the page of them."""

    def __init__(self, model: DiffusionModel, config: SampleConfig, prompts: dict[int, tuple[str, Sequence[int]]]) -> None:
        """`prompts`: number among the prompts of the stream -> (title, token ids); the first of them are recorded."""
        self.model, self.config = model, config
        first = list(prompts.items())[: max(1, MAX_TOKENS // config.max_new_tokens)]
        self.titles = {number: title for number, (title, _) in first}
        self.watched = {number: Watched.begin(model, tokens, config) for number, (_, tokens) in first}
        self.frames: dict[int, list[Any]] = {number: [] for number in self.watched}

    def see(self, event: sampling.Event) -> None:
        """Take in what an evaluation did, where its prompt is one of those that are recorded."""
        watched = self.watched.get(event.prompt)
        if watched is None:
            return
        watched.see(event)
        if event.generation is None:
            begin = watched.canvas.begin
            revealed = [[position - begin, token, round(probability, 3)] for position, token, probability in event.revealed]
            self.frames[event.prompt].append([event.nfe, revealed, [position - begin for position in event.remasked]])

    def page(self) -> str:
        """The page, of the prompts that are finished."""
        answers = [self._answer(number) for number, watched in self.watched.items() if watched.generation is not None]
        used = sorted({token for answer in answers for _, revealed, _ in answer["frames"] for _, token, _ in revealed})
        special = set(self.model.tokenizer.all_special_ids)
        texts = {token: None if token in special else pieces(self.model.tokenizer, [token])[0] or "\ufffd" for token in used}
        spec, config = self.model.spec, self.config
        how = [spec.objective if spec.objective == "mdlm" else f"bd3lm, blocks of {spec.block_size}", f"policy {config.policy}"]
        names = ("threshold", "entropy_budget", "steps_per_block", "remasking", "temperature")
        how += [f"{name} {getattr(config, name):g}" for name in names if getattr(config, name)]
        data = json.dumps({"how": " · ".join(how), "tokens": texts, "answers": answers}, ensure_ascii=False, separators=(",", ":"))
        return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data.replace("<", "\\u003c"))

    def _answer(self, number: int) -> dict[str, Any]:
        watched = self.watched[number]
        canvas, generation = watched.canvas, watched.generation
        assert generation is not None
        stretches = [[max(start, canvas.begin) - canvas.begin, stop - canvas.begin] for start, stop in canvas.stretches]
        return {
            "prompt": self.titles[number],
            "blocks": [block for block in stretches if block[0] < block[1]],
            "frames": self.frames[number],
            "kept": len(generation.tokens),
            "answer": generation.text,
        }
