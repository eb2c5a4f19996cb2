"""Quality against tokens per evaluation on the embedded model: thresholds, entropy budgets, and a fixed number of tokens.

    python benchmarks/frontier.py [--quick] [--objective bd3lm --model DIR] [--output-dir DIR]

Every sampler answers the held-out word tasks. Measured are the exact match on answers of six letters or more, and the tokens per
evaluation of the network for the same answers, where tokens count through the first end of sequence and the fill after it does
not. The reference is one token at a time. The ratio is that of the fastest sampler whose exact match is at most 0.01 lower. The
preset `tiny` is trained first, for each objective (minutes), unless `--model` names a checkpoint. For mdlm the last rows show what
the approximate caches cost.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import shared

from a2d_core import models, report, tasks
from a2d_core.config import OBJECTIVES, EvaluateConfig, SampleConfig
from a2d_core.stages import evaluate

LONG = 6
"""Letters of an answer that counts."""
MOST_LOST = 0.01
REFERENCE = "one token at a time"
SWEEPS = [
    "threshold=0.5,0.6,0.7,0.8,0.9,0.95,0.99",
    "steps_per_block=1,2,3,4,6,8",
    "entropy_budget=0.03,0.1,0.3,0.6,1.0,2.0",
]
CACHES = {f"block_size=4, {cache}": {"block_size": 4, "cache": cache} for cache in ("exact", "prefix", "dual")}
"""mdlm alone: what its approximate caches cost, at one token per evaluation in blocks of four."""


def measure(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Exact match and pace over the long answers of all tasks, with the standard error over words."""
    rows = [row for samples in results["samples"].values() for row in samples if len(row["target"]) >= LONG]
    by_word: dict[str, list[float]] = {}
    for row in rows:
        by_word.setdefault(row["doc"]["word"], []).append(row["exact_match"])
    means = [statistics.fmean(scores) for scores in by_word.values()]
    evaluations, tokens = (statistics.fmean(row[number] for row in rows) for number in ("nfe", "tokens"))
    pace = {"evaluations": evaluations, "tokens": tokens, "tokens_per_evaluation": tokens / evaluations}
    score = statistics.fmean(row["exact_match"] for row in rows)
    return {"sampler": name, "value": score, "stderr": statistics.stdev(means) / len(means) ** 0.5, **pace, "documents": len(rows)}


def sweep(objective: str, checkpoint: Path, limit: int | None) -> list[dict[str, Any]]:
    """Score every sampler, the reference first."""
    model, base = models.load(checkpoint), SampleConfig(max_new_tokens=16)
    config = EvaluateConfig(limit=limit, text_dataset=None)
    loaded, rows = tasks.load(config), []
    print(f"\n{objective:<22}{'exact match':>18}{'evaluations':>13}{'tokens per evaluation':>23}")
    cached = {name: dataclasses.replace(base, **fields) for name, fields in CACHES.items() if objective == "mdlm"}
    for name, sampler in {REFERENCE: base, **evaluate.samplers(SWEEPS, base), **cached}.items():
        row = measure(name, evaluate.score_tasks(config, sampler, model, loaded, seed=0))
        rows.append({"objective": objective, **row})
        score = report.estimate(row["value"], row["stderr"])
        print(f"{name:<22}{score:>18}{row['evaluations']:>13.2f}{row['tokens_per_evaluation']:>23.2f}", flush=True)
    return rows


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sampler with the most tokens per evaluation of those that lose no more than `MOST_LOST`."""
    good = [row for row in rows if row["value"] >= rows[0]["value"] - MOST_LOST]
    return max(good, key=lambda row: row["tokens_per_evaluation"])


def plot(found: dict[str, list[dict[str, Any]]]) -> Any:
    """A panel for each objective, a line for each field that is tried, and the reference as a star."""
    figure, axes = shared.figure(5.5 * len(found), 4, len(found))
    for panel, (objective, (reference, *tried)) in zip(axes, found.items(), strict=True):
        rows = [row for row in tried if row["sampler"] not in CACHES]
        panel.axhline(reference["value"] - MOST_LOST, color="grey", linewidth=0.7, linestyle=":")
        panel.plot(reference["tokens_per_evaluation"], reference["value"], "*", markersize=12, label=REFERENCE)
        for field in dict.fromkeys(row["sampler"].partition("=")[0] for row in rows):
            points = sorted(
                (row["tokens_per_evaluation"], row["value"], row["stderr"], row["sampler"].partition("=")[2])
                for row in rows
                if row["sampler"].startswith(f"{field}=")
            )
            across, up, error, names = zip(*points, strict=True)
            panel.errorbar(across, up, yerr=error, marker="o", markersize=3, capsize=2, linewidth=1, label=field)
            for at, value, name in zip(across, up, names, strict=True):
                panel.annotate(name, (at, value), (3, 3), textcoords="offset points", fontsize=6)
        panel.set_title(f"{objective}: answers of {LONG} letters or more", fontsize=10)
        panel.set_xlabel("tokens per network evaluation")
        panel.set_ylabel("exact match ± standard error")
    figure.legend(*panel.get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    parser = shared.parser(__doc__, "a quarter of the training, 40 held-out words of each task")
    parser.add_argument("--objective", choices=OBJECTIVES, help="this one alone")
    parser.add_argument("--model", type=Path, help="its trained checkpoint, to spare the training")
    options = parser.parse_args()
    if options.model and not options.objective:
        parser.error("--model needs --objective")
    found = {}
    for objective in [options.objective] if options.objective else OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            share = 0.25 if options.quick else 1.0
            checkpoint = options.model or shared.train_tiny(objective, Path(folder), share)
            found[objective] = sweep(objective, checkpoint, 40 if options.quick else None)
    shared.keep(options.output_dir, [row for rows in found.values() for row in rows], plot(found))
    print()
    for objective, rows in found.items():
        best = fastest(rows)
        print(f"{objective}: {best['sampler']}, {best['value']:.3f} against {rows[0]['value']:.3f} of {best['documents']} long answers")
    ratios = {f"tokens_per_evaluation_{name}": round(fastest(rows)["tokens_per_evaluation"], 2) for name, rows in found.items()}
    print(json.dumps({"ratios": {"tokens_per_evaluation": min(ratios.values()), **ratios}}))


if __name__ == "__main__":
    main()
