"""What the benchmarks share: a process for each measurement, a trained tiny model, and plots."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any


def parser(text: str, quick: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes: `--quick`, and `--output-dir` for its rows as JSON and its plot."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"{quick}: under 5 minutes")
    made.add_argument("--output-dir", type=Path, help="where the rows (rows.json) and the plot (plot.png) are written")
    return made


def in_a_process(script: str, cell: dict[str, Any]) -> dict[str, Any]:
    """What `script --cell` finds in a new process: nothing of another measurement is in its memory."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, script, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def aside() -> Iterator[None]:
    """Send what is printed within, the progress of a training, to standard error: a benchmark prints its table."""
    with redirect_stdout(sys.stderr):
        yield


def train_tiny(objective: str, folder: Path, share: float = 1.0, stages: Sequence[str] = ("pretrain", "sft")) -> Path:
    """The checkpoint that the preset `tiny` makes, with a share of its training steps."""
    import dataclasses

    from a2d_core import presets
    from a2d_core.stages import convert, pretrain, sft

    recipe = presets.resolve(presets.read("tiny"), objective)
    with aside():
        convert.run(recipe.convert, objective, folder / "converted", seed=recipe.seed)
        start = folder / "converted"
        for name in stages:
            config = getattr(recipe, name)
            steps = int(config.max_steps * share)
            config = dataclasses.replace(config, max_steps=steps, eval_every=float(steps), save_every=float(steps))
            {"pretrain": pretrain, "sft": sft}[name].run(config, start, folder / name, seed=recipe.seed)
            start = folder / name / "checkpoint-final"
    return start


def keep(output_dir: Path | None, rows: Any, plot: Any = None) -> None:
    """Write the rows, and the plot (a matplotlib figure) if there is one, where they were asked for."""
    if output_dir is None:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    if plot is not None:
        plot.savefig(output_dir / "plot.png", dpi=110, metadata={"Software": None})


def figure(width: float = 8, height: float = 4, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure, which needs no screen, and the axes of each column."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.3)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return made, axes


def bars(axes: Any, groups: Sequence[str], series: dict[str, Sequence[float]], *, title: str, ylabel: str) -> None:
    """Groups of bars, each with its number."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(at, values, width, label=name)
        axes.bar_label(drawn, [f"{value:,.0f}" for value in values], fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.margins(y=0.15)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(ylabel)
    axes.legend(fontsize="small")
