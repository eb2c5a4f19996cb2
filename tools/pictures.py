"""Draw the pictures of docs/CONCEPTS.md from the code that they explain: its attention, its noise, its sampler, a small model.

python tools/pictures.py runs/RUN_ID/model out/pretrained/checkpoint-final

The first directory is a bd3lm model that `make demo` made, the second the same after pretraining alone.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from a2d_core import embedded, models, noise, objectives, perplexity, sampling  # noqa: E402
from a2d_core.attention import Slots, may_attend  # noqa: E402
from a2d_core.config import SampleConfig  # noqa: E402

IMAGES = ROOT / "docs" / "images"
LENGTH, BLOCK = 9, 3
"""Tokens of the row, and tokens of a block, in the picture of the masks."""
SENTENCE = "the sea was calm and the boats came home late".split()
SEEN, HIDDEN, GREEN, AMBER, RED = "#2f6db5", "#eef1f4", "#4caf72", "#e8b64c", "#d9655b"


def save(figure: Figure, name: str) -> None:
    """Write a PNG of 64 colours, which is what drawings need."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    Image.open(png).convert("RGB").quantize(64).save(IMAGES / f"{name}.png", optimize=True)
    print(f"{name}.png: {(IMAGES / f'{name}.png').stat().st_size / 1024:.0f} KiB")


# --- 1: who sees whom -----------------------------------------------------------------------------


def views() -> dict[str, tuple[Tensor, list[str], list[str]]]:
    """Title -> mask [Q, S], and what the queries and the keys are called: all from `objectives` and `attention`."""
    position = torch.arange(LENGTH)[None]
    names = [str(i) for i in range(LENGTH)]

    def clean(block_size: int | None) -> Slots:
        rules = objectives.make("bd3lm" if block_size else "mdlm", block_size=block_size or 1, mask_token_id=0)
        return Slots.clean(position, rules.block_of(position))

    block = objectives.make("bd3lm", block_size=BLOCK, mask_token_id=0)
    streams = block.streams(position, torch.ones_like(position))
    slots = block.layout(streams, streams.is_maskable_BT[None], torch.ones(1, 1, LENGTH)).slots
    both = [f"{'c' if view == 0 else 'n'}{at}" for view, at in zip(slots.view[0].tolist(), slots.position[0].tolist(), strict=True)]
    one, whole, blocks = clean(1), clean(None), clean(BLOCK)
    return {
        "autoregressive": (may_attend(one, one)[0], names, names),
        "MDLM": (may_attend(whole, whole)[0], names, names),
        "BD3LM, training\nc clean, n noised": (may_attend(slots, slots)[0], both, both),
        "BD3LM, sampling\nlast block, others cached": (may_attend(blocks[:, -BLOCK:], blocks)[0], names[-BLOCK:], names),
    }


def draw_views() -> None:
    """The four masks."""
    figure = Figure(figsize=(6.4, 6.6), layout="constrained")
    for axes, (title, (mask, queries, keys)) in zip(figure.subplots(2, 2).flat, views().items(), strict=True):
        axes.imshow(mask, cmap=ListedColormap([HIDDEN, SEEN]), vmin=0, vmax=1)
        axes.set_xticks(range(len(keys)), keys, fontsize=7)
        axes.set_yticks(range(len(queries)), queries, fontsize=7)
        axes.set_xticks(np.arange(-0.5, len(keys)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(queries)), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("is seen", fontsize=8)
        axes.set_ylabel("sees", fontsize=8)
    save(figure, "who-sees-whom")


# --- 2: the noise ---------------------------------------------------------------------------------


def draw_noise() -> None:
    """The masks of one row at nine times: the same random numbers, more and more of them below 1 - alpha(t)."""
    times = torch.arange(1, 10) / 10
    rows, maskable = torch.zeros(1, dtype=torch.long), torch.ones(1, len(SENTENCE), dtype=torch.bool)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for line, t in enumerate(times):
        chance = (1 - noise.alpha(t)).expand(1, 1, len(SENTENCE))
        masked = noise.draw_mask(1, 0, rows, chance, maskable)[0, 0]
        for place, word in enumerate(SENTENCE):
            box(axes, place, line, "" if masked[place] else word, "#5b6570" if masked[place] else HIDDEN, "black")
    frame(axes, len(SENTENCE), len(times), [f"t = {t:.1f}" for t in times])
    save(figure, "noise")


def box(axes: Any, x: int, y: int, text: str, colour: str, ink: str) -> None:
    """A cell with a token."""
    axes.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, color=colour, linewidth=0))
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9)


def frame(axes: Any, columns: int, lines: int, labels: list[str]) -> None:
    """Lay the cells out from the top, with a label before each line."""
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(lines - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks(range(lines), labels, fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


# --- 3: unmasking ---------------------------------------------------------------------------------


def draw_unmasking(model: models.DiffusionModel, question: str) -> None:
    """The evaluations of one answer, from the sampler's events: what was revealed, and how sure the model was."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    ways = {"one token per evaluation": SampleConfig(max_new_tokens=16), "threshold = 0.9": SampleConfig(max_new_tokens=16, threshold=0.9)}
    traces = {title: trace(model, question, config) for title, config in ways.items()}
    heights = [len(lines) for lines, _ in traces.values()]
    for axes, (title, (lines, answer)) in zip(figure.subplots(2, 1, height_ratios=heights), traces.items(), strict=True):
        columns = 1 + max(position for line in lines for position in line)
        shown: dict[int, str] = {}
        for number, line in enumerate(lines):
            for place in range(columns):
                if place in line:
                    text, probability = line[place]
                    shown[place] = text
                    box(axes, place, number, text, GREEN if probability >= 0.9 else AMBER if probability >= 0.5 else RED, "white")
                else:
                    box(axes, place, number, shown.get(place, ""), HIDDEN if place in shown else "#c9d0d7", "black")
        frame(axes, columns, len(lines), [str(number + 1) for number in range(len(lines))])
        axes.set_ylabel("evaluation", fontsize=9)
        axes.set_title(f"“{question}”, {title}: {answer!r} in {len(lines)} evaluations", fontsize=10)
    save(figure, "unmasking")


def trace(model: models.DiffusionModel, question: str, config: SampleConfig) -> tuple[list[dict[int, tuple[str, float]]], str]:
    """For each evaluation: place in the answer -> (token, its probability); and the answer."""
    prompt = model.encode(question)
    lines: list[dict[int, tuple[str, float]]] = []
    for event in sampling.stream(model, [prompt], config):
        if event.generation is not None:
            return lines, event.generation.text
        token = {position - len(prompt): (label(model, token), probability) for position, token, probability in event.revealed}
        lines.append(token)
    raise AssertionError("the sampler ends with a generation")


def label(model: models.DiffusionModel, token: int) -> str:
    """A token as a cell shows it."""
    return "end" if token in model.stop_token_ids else model.tokenizer.decode([token])


# --- 4: weights and loss --------------------------------------------------------------------------


@torch.no_grad()
def draw_loss(model: models.DiffusionModel, rows: int = 48) -> None:
    """The weight w(t), and the cross-entropy of masked tokens at each t on held-out text, beside the autoregressive model's."""
    times = torch.linspace(0.05, 1, 20)
    tokens = model.tokenizer("\n".join(embedded.corpus_split()[1]))["input_ids"]
    ids = torch.tensor(tokens)[: len(tokens) // 128 * 128].view(-1, 128)
    ids = ids[:: max(1, len(ids) // rows)][:rows]
    maskable = (torch.arange(128) > 0).long().expand_as(ids)
    streams = model.objective.streams(ids, maskable)
    measured = []
    for step, t in enumerate(times):
        chance = (1 - noise.alpha(t)).expand(1, *streams.is_maskable_BT.shape)
        masked = noise.draw_mask(0, step, torch.arange(len(ids)), chance, streams.is_maskable_BT)
        _, ce = model(model.objective.layout(streams, masked, torch.ones(masked.shape)))
        measured.append(float(ce.mean()))
    source = perplexity.autoregressive(embedded.build_base(), ids, model.device).sum() / maskable.sum()
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    fine = torch.linspace(0.02, 1, 200)
    for schedule, style in (("linear", "-"), ("cosine", "--")):
        left.plot(fine, noise.nelbo_weight(fine, schedule), style, color=SEEN, label=schedule)
    left.set(xlabel="t", ylabel="weight of a masked token", ylim=(0, 20), title="w(t)")
    left.legend(fontsize=8)
    right.plot(times, measured, color=SEEN)
    right.fill_between(times, measured, alpha=0.2, color=SEEN)
    right.axhline(float(source), color=RED, linestyle="--")
    right.text(0.98, float(source) + 0.06, "autoregressive", color=RED, ha="right", fontsize=8)
    right.set(xlabel="t", ylabel="nats per masked byte", ylim=(0, None), title="cross-entropy at t")
    right.text(0.55, 0.7, f"area: {np.trapezoid(measured, times.tolist()) + measured[0] * float(times[0]):.2f}", fontsize=9, ha="center")
    save(figure, "loss")


# --- 5: parallel decoding -------------------------------------------------------------------------


def draw_parallel(model: models.DiffusionModel, rows: int = 300) -> None:
    """Mean evaluations of an answer against its tokens, for held-out word tasks and several thresholds, and the exact match."""
    asked = embedded.instructions("test", rows)
    prompts = [model.encode(row["messages"][0]["content"]) for row in asked]
    expected = [row["messages"][1]["content"] for row in asked]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    longest = 0
    for colour, threshold in zip(("#1b3a5c", SEEN, GREEN, AMBER), (None, 0.99, 0.9, 0.5), strict=True):
        answers = sampling.generate(model, prompts, SampleConfig(max_new_tokens=16, threshold=threshold, batch_size=64))
        match = sum(a.text == e for a, e in zip(answers, expected, strict=True)) / len(answers)
        grouped = defaultdict(list)
        for answer in answers:
            grouped[len(answer.tokens)].append(answer.nfe)
        lengths = sorted(n for n, found in grouped.items() if len(found) >= 5)
        longest = max(longest, *lengths)
        name = "one token per evaluation" if threshold is None else f"threshold = {threshold}"
        axes.plot(
            lengths, [np.mean(grouped[n]) for n in lengths], "o-", color=colour, label=f"{name}: exact match {match:.3f}", markersize=4
        )
    axes.plot([1, longest], [2, longest + 1], "--", color=RED, label="an autoregressive model: tokens + end of sequence")
    axes.set(xlabel="tokens of the answer", ylabel="network evaluations", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "parallel")


def main() -> None:
    """Draw all five."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="a bd3lm model of the preset tiny")
    options.add_argument("pretrained", help="its checkpoint after pretraining, before sft")
    paths = options.parse_args()
    draw_views()
    draw_noise()
    tuned = models.load(paths.model).eval()
    draw_unmasking(tuned, "Reverse: garden")
    draw_parallel(tuned)
    draw_loss(models.load(paths.pretrained).eval())


if __name__ == "__main__":
    main()
