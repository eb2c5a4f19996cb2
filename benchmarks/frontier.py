"""Quality against tokens per evaluation on the embedded model: thresholds, entropy budgets, and a fixed number of tokens.

    python benchmarks/frontier.py [--model DIR] [--objective mdlm] [--limit N] [--output-dir DIR]

Every sampler answers the held-out word tasks. What counts is exact match on answers of six letters or more, and for these the
tokens per evaluation of the network: tokens through the first end of sequence, the fill behind it left out, over evaluations. The
reference is one token at a time. A PNG and a table (JSON) are written; the last line is JSON with the fastest sampler that loses
at most 0.01 of exact match. Without `--model` the `tiny` preset is trained first (minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from a2d_core import models, presets, report, tasks
from a2d_core.config import OBJECTIVES, EvaluateConfig, SampleConfig
from a2d_core.stages import convert, evaluate, pretrain, sft

LONG = 6
"""Letters of an answer that counts."""
MOST_LOST = 0.01
REFERENCE = "one token at a time"


def train(objective: str, folder: Path) -> Path:
    """The checkpoint of the `tiny` preset."""
    recipe = presets.resolve(presets.read("tiny"), objective)
    convert.run(recipe.convert, objective, folder / "converted", seed=recipe.seed)
    pretrain.run(recipe.pretrain, folder / "converted", folder / "pretrained", seed=recipe.seed)
    sft.run(recipe.sft, folder / "pretrained" / "checkpoint-final", folder / "sft", seed=recipe.seed)
    return folder / "sft" / "checkpoint-final"


def sweeps() -> list[str]:
    """What is tried; entropy budgets where the sampler has them."""
    tried = ["threshold=0.5,0.6,0.7,0.8,0.9,0.95,0.99", "steps_per_block=1,2,3,4,6,8"]
    fields = {field.name for field in dataclasses.fields(SampleConfig)}
    return [*tried, "entropy_budget=0.03,0.1,0.3,0.6,1.0,2.0"] if "entropy_budget" in fields else tried


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


def plot(rows: list[dict[str, Any]]) -> bytes:
    """The report's plot over tokens per evaluation, the reference as its star."""
    names = {"task": f"answers of {LONG} letters or more", "metric": "exact match", "is_main": True, "entry": None}
    points = [{**row, **names, "evaluations": row["tokens_per_evaluation"]} for row in rows]
    return report.plot({"tasks": points[:1], "frontier": points[1:]}, across="tokens per evaluation")


def main() -> None:
    """Train or load, try every sampler, and write what came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--objective", choices=OBJECTIVES, default="bd3lm")
    parser.add_argument("--limit", type=int, help="held-out words of each task (default: all)")
    parser.add_argument("--output-dir", type=Path, default=Path("frontier"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = models.load(options.model or train(options.objective, Path(folder)))
    base = SampleConfig(max_new_tokens=16)
    config = EvaluateConfig(limit=options.limit, text_dataset=None)
    loaded = tasks.load(config)
    rows = []
    print(f"{'sampler':<22}{'exact match':>18}{'evaluations':>13}{'tokens per evaluation':>23}")
    for name, sampler in {REFERENCE: base, **evaluate.samplers(sweeps(), base)}.items():
        row = measure(name, evaluate.score_tasks(config, sampler, model, loaded, seed=0))
        rows.append(row)
        print(
            f"{name:<22}{report.estimate(row['value'], row['stderr']):>18}{row['evaluations']:>13.2f}{row['tokens_per_evaluation']:>23.2f}"
        )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "frontier.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.output_dir / "frontier.png").write_bytes(plot(rows))
    good = [row for row in rows if row["value"] >= rows[0]["value"] - MOST_LOST]
    best = max(good, key=lambda row: row["tokens_per_evaluation"])
    found = {"sampler": best["sampler"], "exact_match": round(best["value"], 4), "documents": best["documents"]}
    found |= {"one_token_at_a_time": round(rows[0]["value"], 4)}
    print(json.dumps({"ratios": {"tokens_per_evaluation": round(best["tokens_per_evaluation"], 2)}, **found}))


if __name__ == "__main__":
    main()
