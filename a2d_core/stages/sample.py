"""Sample: answer prompts, tell at what cost, and go on where an earlier attempt ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from a2d_core import infill as gaps
from a2d_core import models, replay, sampling
from a2d_core.config import NOT_THE_ANSWER, SampleConfig, UserError, require
from a2d_core.models import DiffusionModel
from a2d_core.settings import to_dict
from a2d_core.stages import prompts
from a2d_core.stages.prompts import Row


def run(
    config: SampleConfig,
    model_dir: str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    rows: list[Row] | None = None,
    resume: bool = False,
    infill: bool = False,
    animate: str | Path | None = None,
    objective: str | None = None,
) -> dict[str, Any]:
    """Answer rows of prompts (default: `config.prompts`) into the file `output` (.jsonl), or into samples.jsonl below it.

    Each answer is written when it is there, and the file has the prompts' order in the end. `resume`: answers that are in it
    already are kept. `infill`: fill the gaps of the prompts. `animate`: a page that replays the first answers. `objective`: needed
    where the checkpoint does not say it. Raises `UserError`, before any answer, where a prompt cannot be answered.
    """
    rows = [{"prompt": prompt} for prompt in config.prompts] if rows is None else rows
    output = Path(output) if Path(output).suffix == ".jsonl" else Path(output, "samples.jsonl")
    settings = {name: value for name, value in to_dict(config).items() if name not in NOT_THE_ANSWER}
    digests = [prompts.digest(row, [settings, str(Path(model_dir).resolve()), seed, infill]) for row in rows]
    done = prompts.kept(output, digests) if resume else {}
    require(animate is None or len(done) < len(rows), f"all {len(rows)} prompts are answered already: nothing is left to replay")
    model = models.load(model_dir, objective=objective)
    answers = (_infilled if infill else _answered)(model, config, rows, set(done), seed, animate)
    output.parent.mkdir(parents=True, exist_ok=True)
    prompts.write(output, list(done.values()))
    started, before = time.perf_counter(), len(done)
    with output.open("a", encoding="utf-8") as file, tqdm(total=len(rows), initial=before, unit="prompt", desc="sample") as bar:
        for index, answer in answers:
            done[index] = {**rows[index], "index": index, **answer, "digest": digests[index]}
            file.write(prompts.line(done[index]))
            file.flush()
            bar.update()
    seconds = time.perf_counter() - started
    samples = [done[index] for index in sorted(done)]
    prompts.write(output, samples)
    tokens, evaluations = (sum(row[name] for row in list(done.values())[before:]) for name in ("tokens", "nfe"))
    return {
        "samples": samples,
        "answered": len(done) - before,
        "skipped": before,
        "tokens_per_evaluation": tokens / max(1, evaluations),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }


Answers = Iterator[tuple[int, Row]]
"""(index of the prompt, what is added to its row), in the order in which they are finished."""


def _answered(
    model: DiffusionModel, config: SampleConfig, rows: list[Row], done: set[int], seed: int, animate: str | Path | None
) -> Answers:
    """Look at the prompts, and then answer them."""
    tokens = [_encode(model, config, row, index) for index, row in enumerate(rows)]
    is_drawn = config.temperature > 0 or config.policy == "random"
    # Draws are keyed by a prompt's place among all: there, one that is answered already is a single token.
    places = [index for index in range(len(rows)) if is_drawn or index not in done]
    lengths = [1 if index in done else config.max_new_tokens for index in places]
    asked = [tokens[index][:1] if index in done else tokens[index] for index in places]
    new = {place: index for place, index in enumerate(places) if index not in done}
    recorder = replay.Recorder(model, config, {place: (text(rows[index]), tokens[index]) for place, index in new.items()})

    def answers() -> Answers:
        generator = torch.Generator(model.device).manual_seed(seed)
        begun: dict[int, float] = {}
        latest = time.perf_counter()
        for event in sampling.stream(model, asked if new else [], config, generator=generator, max_new_tokens=lengths if new else []):
            begun.setdefault(event.prompt, latest)  # a prompt is taken up when others are finished
            recorder.see(event)
            found = event.generation
            if found is not None:
                latest = time.perf_counter()
                if event.prompt in new:
                    yield new[event.prompt], _answer(found.text, len(found.tokens), found.nfe, latest - begun[event.prompt], found.finished)
        if animate is not None:
            Path(animate).write_text(recorder.page(), encoding="utf-8")

    return answers()


def _infilled(
    model: DiffusionModel, config: SampleConfig, rows: list[Row], done: set[int], seed: int, animate: str | Path | None
) -> Answers:
    """Fill the gaps of the prompts, `config.batch_size` of them at a time; those of a batch are done together or not at all."""
    assert animate is None, "infills are not replayed"
    for first in range(0, len(rows), config.batch_size):
        batch = range(first, min(first + config.batch_size, len(rows)))
        if done.issuperset(batch):
            continue
        started = time.perf_counter()
        generator = torch.Generator(model.device).manual_seed(seed + first)
        found = gaps.infill(model, [rows[index]["prompt"] for index in batch], config, generator=generator)
        seconds = (time.perf_counter() - started) / len(batch)
        for index, filled in zip(batch, found, strict=True):
            if index not in done:
                yield index, {**_answer(filled.text, filled.new_tokens, filled.nfe, seconds, True), "gaps": filled.gaps}


def _answer(text: str, tokens: int, nfe: int, seconds: float, finished: bool) -> Row:
    return {"answer": text, "tokens": tokens, "nfe": nfe, "seconds": round(seconds, 4), "finished": finished}


def text(row: Row) -> str:
    """What a row asks, in words: its prompt, or its last message."""
    return str(row["prompt"] if "prompt" in row else row["messages"][-1]["content"])


def _encode(model: DiffusionModel, config: SampleConfig, row: Row, index: int) -> list[int]:
    """The tokens of a prompt; raises `UserError` that names its number where it does not fit."""
    messages = row.get("messages")
    require(config.chat or messages is None, f"prompt {index + 1} is a list of messages, which needs the chat template: set chat=true")
    try:
        tokens = model.encode(row["prompt"], chat=config.chat) if messages is None else model.encode_messages(messages)
    except TemplateError as error:
        raise UserError(f"prompt {index + 1} does not fit the model's chat template: {error}") from None
    require(bool(tokens), f"prompt {index + 1} has no tokens")
    model.require_room(len(tokens) + config.max_new_tokens, f"prompt {index + 1} with its answer", "lower max_new_tokens")
    return tokens
