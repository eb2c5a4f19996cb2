"""What a person sees of a run: the live card of a training step, the samples, the evaluation, and the closing words."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any

from metaflow.cards import Image, Markdown, ProgressBar, Table, VegaChart

import a2d_core
from a2d_core import presets, report, tracking
from a2d_core.config import Recipe
from a2d_core.report import estimate, number
from a2d_core.review import aligned, markdown_table, visible

TITLES = {"pretrain": "Continued pretraining", "sft": "Supervised fine-tuning"}
CURVES = {"loss": ("training loss", "#4c78a8"), "eval_nelbo": ("held-out NELBO", "#e45756")}
SIDE_CURVES = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"}
NUMBERS = {
    "loss": "training loss",
    "eval_nelbo": "held-out NELBO",
    "eval_perplexity_bound": "perplexity bound",
    **SIDE_CURVES,
    "memory_mb": "memory, MiB",
}
TASK_HEAD = ("task", "metric", "score", "chance", "untrained")
TEXT_HEAD = ("held-out text", "nats per token")
SHOWN = 5
"""Samples of which a line is printed."""
MOST_POINTS = 400
"""Points of a curve on a card; a longer one is thinned."""

Row = dict[str, Any]


class TrainingCard:
    """The live card of a training step: progress, the current numbers, and the curves."""

    def __init__(self, card: Any, recipe: Recipe, stage: str) -> None:
        config = getattr(recipe, stage)
        self._card = card
        self._bar = ProgressBar(max=100, label="percent", metadata="waiting for the first numbers")
        self._numbers = Markdown("")
        self._curves = VegaChart(main_curves([]))
        self._sides = {name: VegaChart(side_curve([], name)) for name in SIDE_CURVES}
        card.append(Markdown(f"# {TITLES[stage]}\n{recipe.name} · {recipe.objective} · seed {recipe.seed} · data `{config.dataset}`"))
        if not config.enabled:
            card.append(Markdown(f"Switched off by `{stage}.enabled=false`: the model passes through unchanged."))
            return
        for part in (self._bar, self._numbers, self._curves, Table([list(self._sides.values())], headers=list(SIDE_CURVES.values()))):
            card.append(part)
        card.refresh()

    def update(self, rows: list[Row]) -> None:
        """Show all rows of `metrics.jsonl` so far."""
        latest = {name: value for row in rows for name, value in row.items()}
        step, last = latest["step"], latest.get("max_steps", latest["step"])
        left = f", {timedelta(seconds=round(latest['seconds_left']))} left" if step < last and "seconds_left" in latest else ""
        self._bar.update(round(100 * step / last), metadata=f"step {step:,} of {last:,}{left}")
        self._numbers.update(markdown_table([list(NUMBERS.values()), [number(latest.get(name)) for name in NUMBERS]]))
        self._curves.update(main_curves(rows))
        for name, chart in self._sides.items():
            chart.update(side_curve(rows, name))
        self._card.refresh()


def sample_lines(samples: list[Row]) -> list[str]:
    """The first samples, a line each."""
    pairs = [[shorten(sample[key], 80, placeholder=" …") for key in ("prompt", "answer")] for sample in samples[:SHOWN]]
    return [visible("  →  ".join(pair)) for pair in pairs]


def show_samples(card: Any, recipe: Recipe, samples: list[Row]) -> None:
    """The card of the sample step."""
    config = recipe.sample
    card.append(
        Markdown(
            f"# Samples\n{recipe.name} · {recipe.objective} · up to {config.max_new_tokens} tokens · temperature {config.temperature:g}"
        )
    )
    if not config.enabled:
        card.append(Markdown("Switched off by `sample.enabled=false`."))
        return
    rows = [
        [
            s["prompt"],
            s["answer"],
            str(s["tokens"]),
            number(s["nfe"]),
            f"{s['tokens'] / max(s['nfe'], 1):.2f}",
            f"{s['seconds']:.2f}",
        ]
        for s in samples
    ]
    card.append(Table(rows, headers=["prompt", "answer", "tokens", "network evaluations", "tokens per evaluation", "seconds"]))


def show_evaluation(card: Any, recipe: Recipe, blocks: Sequence[report.Block] | None, verdict: dict[str, str]) -> None:
    """The card of the evaluate step, from `report.read`; None where the step is switched off."""
    gate = f"\n\n**Gate: {gate_words(verdict)}**" if verdict else ""
    card.append(Markdown(f"# Evaluation\n{recipe.name} · {recipe.objective} · seed {recipe.seed}{gate}"))
    if blocks is None:
        card.append(Markdown("Switched off by `evaluate.enabled=false`."))
        return
    for block in blocks:
        if isinstance(block, report.Table):
            card.append(Table([list(map(report.unbroken, row)) for row in block.rows], headers=list(block.head)))
        elif isinstance(block, report.Image):
            card.append(Image(block.png, label=block.caption))
        else:
            card.append(Markdown(f"{'#' * block.level} {block.text}".strip()))


def closing_words(
    recipe: Recipe, results: Row | None, verdict: dict[str, str], registered: Row | None, model: Path | None, uri: str, run_id: str
) -> str:
    """What the end of a run prints: its numbers, and the commands that show more, for the machine that started it."""
    lines = [f"A2D is done: {recipe.name}, {recipe.objective}, seed {recipe.seed}.", ""]
    if results and results["tasks"]:
        lines += [*aligned([TASK_HEAD, *task_rows(results)]), ""]
    if results and results["text"]:
        lines += [*aligned([TEXT_HEAD, *text_rows(results["text"])]), ""]
    look = [
        ("cards", flow_command("card", "server", "--run-id", run_id)),
        ("MLflow", shlex.join([tool("mlflow"), "ui", "--backend-store-uri", uri]) if uri.startswith("sqlite:") else uri),
    ]
    if verdict:
        look.append(("gate", gate_words(verdict)))
    if registered:
        look.append(("registered", f"{registered['name']} version {registered['version']}, alias candidate, review pending"))
        there = [] if uri == tracking.default_uri() else ["--mlflow", uri]
        look.append(("review", command("registry", "review", registered["name"], *there)))
    if model:
        options = ["--preset", recipe.name] if recipe.name in presets.names() else []
        if not recipe.sft.enabled:
            options.append("--raw")
        elif recipe.sft.dataset.startswith("embedded:"):
            options.append("--forget")  # its conversations have one turn
        look.append(("chat", command("chat", *options, "--model", short(model))))
    elif registered:
        look.append(
            ("download", shlex.join(["mlflow", "artifacts", "download", "--artifact-uri", registered["uri"], "--dst-path", "model"]))
        )
    return "\n".join([*lines, *aligned(look)])


def gate_words(verdict: dict[str, str]) -> str:
    """The verdict of the gate, and why."""
    return ": ".join(verdict[tag] for tag in ("gate", "gate.why") if tag in verdict)


# --- rows ---


def task_rows(results: Row) -> list[tuple[str, ...]]:
    """A row per task: task, metric, value ± standard error, chance, untrained baseline."""
    return [
        (t["task"], t["metric"], estimate(t["value"], t["stderr"]), estimate(t["chance"]), estimate(t["baseline"]))
        for t in results["tasks"]
    ]


def text_rows(text: Row) -> list[tuple[str, str]]:
    """The NELBO of held-out text along the pipeline, and before it the autoregressive source's own loss on the same tokens."""
    before = {
        "ar_nll": "autoregressive source, its own loss",
        "baseline_nelbo": "converted, untrained, NELBO",
        "pretrained_nelbo": "pretrained, NELBO",
    }
    rows = [(meaning, f"{text[name]:.3f}") for name, meaning in before.items() if text.get(name) is not None]
    return [*rows, ("finished model, NELBO", estimate(text["nelbo"], text["stderr"]))]


def command(*words: str) -> str:
    """A command of a2d_core as one types it: with PYTHONPATH where it is neither installed nor in the working directory."""
    home = Path(a2d_core.__file__).parents[1]
    is_found = home == Path.cwd() or home.name in ("site-packages", "dist-packages") or is_elsewhere()
    path = "" if is_found else f"PYTHONPATH={shlex.quote(short(home))} "
    return path + shlex.join([tool("python"), "-m", "a2d_core", *words])


def flow_command(*words: str) -> str:
    """A command of the flow as one types it."""
    return shlex.join([tool("python"), "flows/a2d_flow.py" if is_elsewhere() else short(sys.argv[0]), *words])


def is_elsewhere() -> bool:
    """Whether this step runs on another machine than the one that started it, whose paths are not known here."""
    return os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT", "local") != "local"


def tool(name: str) -> str:
    """A program of this run's environment as one types it: by its name where that environment is activated, else by its path."""
    is_active = os.environ.get("VIRTUAL_ENV") == sys.prefix or is_elsewhere()
    return name if is_active else short(Path(sys.executable).with_name(name))


def short(path: str | Path) -> str:
    """A path as one types it: from the working directory, where that is shorter."""
    return min(str(Path(path).absolute()), os.path.relpath(path), key=len)


# --- charts (Vega-Lite) ---


def main_curves(rows: list[Row]) -> dict[str, Any]:
    """Training loss and held-out NELBO over the steps."""
    points = [{"step": s, "value": v, "curve": label} for name, (label, _) in CURVES.items() for s, v in curve(rows, name)]
    labels, colours = zip(*CURVES.values(), strict=True)
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickCount": 8, "tickMinStep": 1}},
        "y": {"field": "value", "type": "quantitative", "title": "nats per token", "scale": {"zero": False}, "axis": {"tickCount": 6}},
        "color": {
            "field": "curve",
            "type": "nominal",
            "title": None,
            "scale": {"domain": labels, "range": colours},
            "legend": {"orient": "top"},
        },
    }
    dots = {"mark": {"type": "point", "filled": True, "size": 60}, "transform": [{"filter": f"datum.curve == '{labels[1]}'"}]}
    return chart(points, encoding, height=280, layer=[{"mark": {"type": "line", "interpolate": "linear"}}, dots])


def side_curve(rows: list[Row], name: str) -> dict[str, Any]:
    """One more number over the steps, small."""
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": None, "axis": {"tickCount": 3, "tickMinStep": 1}},
        "y": {"field": "value", "type": "quantitative", "title": None, "axis": {"tickCount": 3, "format": ",.3~r"}},
    }
    return chart(
        [{"step": s, "value": v} for s, v in curve(rows, name)], encoding, height=110, width=200, mark={"type": "line", "color": "#72767d"}
    )


def curve(rows: list[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of one number, thinned to `MOST_POINTS`; a step that was logged twice counts once."""
    points = list({row["step"]: row[name] for row in rows if name in row}.items())
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-every][::-1]


def chart(points: list[Row], encoding: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A Vega-Lite chart as wide as its place."""
    schema = "https://vega.github.io/schema/vega-lite/v5.json"
    return {"$schema": schema, "data": {"values": points}, "encoding": encoding, "width": "container", **parts}
