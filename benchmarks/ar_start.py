"""What the autoregressive start is worth: the NELBO of held-out text after the same pretraining, from the AR weights and from random ones.

    python benchmarks/ar_start.py [--quick] [--seeds N]

Both starts have the architecture, data, budget and noise of the preset `tiny`. Both are scored on the same held-out tokens (the
first of each row is given), over the full range of t. The AR model's own loss on these tokens is shown beside them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import shared
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from a2d_core import embedded, models, perplexity, presets
from a2d_core.config import OBJECTIVES, Recipe
from a2d_core.stages import convert, pretrain


def random_start(source: Path, folder: Path, seed: int) -> Path:
    """The same architecture and tokenizer with fresh weights."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def held_out_nelbo(recipe: Recipe, checkpoint: Path) -> tuple[float, torch.Tensor]:
    """Nats per token of the recipe's held-out text, and the rows that were scored."""
    model = models.load(checkpoint)
    rows_BL = perplexity.rows_of_text(recipe.evaluate, model, recipe.seed)
    return float(perplexity.nelbo(recipe.evaluate, model, rows_BL, recipe.seed).sum() / rows_BL[:, 1:].numel()), rows_BL


def measure(recipe: Recipe, source: Path, folder: Path) -> tuple[float, torch.Tensor, list[list[float]]]:
    """Convert, pretrain, and score: the NELBO, the rows, and the evaluations on the way: [supervised tokens, NELBO]."""
    with shared.aside():
        convert.run(dataclasses.replace(recipe.convert, model=str(source)), recipe.objective, folder / "converted", seed=recipe.seed)
        pretrain.run(recipe.pretrain, folder / "converted", folder / "trained", seed=recipe.seed)
    config = recipe.pretrain
    a_step = config.batch_size * config.gradient_accumulation_steps * config.max_length * config.views * (config.t_min + config.t_max) / 2
    history = [json.loads(line) for line in (folder / "trained" / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"] * a_step: row["eval_nelbo"] for row in history if "eval_nelbo" in row}
    return *held_out_nelbo(recipe, folder / "trained" / "checkpoint-final"), [list(point) for point in curve.items()]


def plot(curves: list[dict[str, Any]]) -> Any:
    """Held-out NELBO against supervised tokens, a panel for each objective."""
    figure, axes = shared.figure(10, 3.6, len(OBJECTIVES))
    for panel, objective in zip(axes, OBJECTIVES, strict=True):
        for curve in (curve for curve in curves if curve["objective"] == objective):
            style = {"ar": ("C0", "from the AR weights"), "random": ("C1", "from random weights")}[curve["start"]]
            label = style[1] if curve["seed"] == 0 else None
            panel.plot(*zip(*curve["points"], strict=True), color=style[0], marker="o", markersize=3, label=label)
        panel.set_title(objective, fontsize=10)
        panel.set_xlabel("supervised (masked) tokens, expected")
        panel.set_ylabel("held-out NELBO, nats per byte")
        panel.legend(fontsize="small")
    return figure


def main() -> None:
    parser = shared.parser(__doc__, "a fifth of the steps and one seed")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per cell (default 3)")
    options = parser.parse_args()
    rows, curves = [], []
    for objective in OBJECTIVES:
        nelbo: dict[str, list[float]] = {"ar": [], "random": []}
        for seed in range(1 if options.quick else options.seeds):
            recipe = presets.resolve(presets.read("tiny"), objective, [], seed)
            steps = recipe.pretrain.max_steps // 5 if options.quick else recipe.pretrain.max_steps
            recipe = dataclasses.replace(recipe, pretrain=dataclasses.replace(recipe.pretrain, max_steps=steps))
            with tempfile.TemporaryDirectory() as name:
                folder, base = Path(name), embedded.build_base("tiny")
                starts = {"ar": base, "random": random_start(base, folder / "fresh", seed)}
                for start, source in starts.items():
                    value, rows_BL, points = measure(recipe, source, folder / start)
                    curves.append({"objective": objective, "start": start, "seed": seed, "points": points})
                    nelbo[start].append(value)
                ar_nll = float(perplexity.autoregressive(base, rows_BL, torch.device("cpu")).sum() / rows_BL[:, 1:].numel())
        rows.append({"objective": objective, "steps": steps, "ar_nll": ar_nll, **{k: statistics.median(v) for k, v in nelbo.items()}})
    print(
        f"\n{'objective':<10}{'steps':>7}{'AR model, own loss':>21}{'AR start':>11}{'random start':>15}   nats per byte, median over seeds"
    )
    for row in rows:
        print(f"{row['objective']:<10}{row['steps']:>7}{row['ar_nll']:>21.3f}{row['ar']:>11.3f}{row['random']:>15.3f}")
    shared.keep(options.output_dir, [*rows, *curves], plot(curves))
    print(json.dumps({"ratios": {f"random_over_ar_{row['objective']}": round(row["random"] / row["ar"], 3) for row in rows}}))


if __name__ == "__main__":
    main()
