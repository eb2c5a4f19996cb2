"""What lm-eval found, as the rows of results.json and samples.jsonl, and by question, as the gate compares it."""

# Shapes: B rows of text, L positions

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from typing import Any

from torch import Tensor

from a2d_core import embedded, gate, suites
from a2d_core.suites import Part

Row = dict[str, Any]


def summarise(
    parts: list[Part], results: list[Row], baseline: list[Row] | None = None, champion: dict[str, float] | None = None
) -> list[Row]:
    """The rows of all parts; a task that is in two of them is told apart by its shots. See `run`."""
    rows = []
    names = [name for found in results for name in found["results"]]
    for i, (part, found) in enumerate(zip(parts, results, strict=False)):  # no results: in all processes but the first
        scores = rows_of(found, baseline[i] if baseline else None)
        with_mean = {row["task"] for row in scores}
        inner = {member for group, members in found["group_subtasks"].items() if group in with_mean for member in members}
        asked = part.entries or [suites.Entry(row["task"]) for row in scores if row["task"] not in inner]
        chosen = {_chosen(entry, scores): entry for entry in asked}
        for row in scores:
            entry = chosen.get((row["task"], row["metric"]))
            shots = part.evaluate.num_fewshot if part.entries else None
            if names.count(row["task"]) > 1:
                row["task"] = f"{row['task']} {shots}-shot"
            row |= {"is_main": entry is not None, "entry": entry.name or None if entry else None, "num_fewshot": shots}
            row |= {name: getattr(entry, name) if entry else None for name in ("published", "source", "note")}
            row["champion"] = (champion or {}).get(f"{row['task']}/{row['metric']}")
            rows.append(row)
    return rows


def rows_of(results: Row, baseline: Row | None) -> list[Row]:
    """A row for each task and metric in lm-eval's results, the groups with a mean of their own behind the tasks."""
    rows = []
    for name, numbers in results["results"].items():
        for key in (key for key in numbers if "," in key and "_stderr," not in key):
            metric, _, variant = key.partition(",")
            if not isinstance(numbers[key], (int, float)):
                continue
            leaves = _leaves(results, name)
            questions = _questions(results, name, metric, variant)
            is_words = set(leaves) <= set(embedded.TASKS)
            given = [row[metric] for leaf in leaves for row in results["samples"][leaf] if row["filter"] == variant and metric in row]
            stderr = gate.stderr_of_mean(list(questions.values())) if is_words else numbers.get(f"{metric}_stderr,{variant}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if variant == "none" else f"{metric}/{variant}",
                    "value": float(numbers[key]),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "independent": len(questions) or None if all(value in (0, 1) for value in given) else None,
                    "chance": sum(map(embedded.chance_level, leaves)) / len(leaves) if is_words else None,
                    "baseline": float(baseline["results"][name][key]) if baseline else None,
                    "documents": numbers["sample_len"],
                    "failed": failed(results, name),
                    "evaluations": _mean(results, name, "nfe"),
                    "tokens": _mean(results, name, "tokens"),
                    "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
                    "questions": questions,
                }
            )
    return rows


def _chosen(entry: suites.Entry, scores: list[Row]) -> tuple[str, str] | None:
    """Task and metric of the row that stands for an entry; where the task has no metric of its name, the first."""
    metrics = [str(row["metric"]) for row in scores if row["task"] == entry.task]
    return (entry.task, entry.metric if entry.metric in metrics else metrics[0]) if metrics else None


def _leaves(results: Row, name: str) -> list[str]:
    """The tasks in a group, which have samples; a task is one."""
    if name in results["samples"]:
        return [name]
    return [leaf for member in results["group_subtasks"][name] for leaf in _leaves(results, member)]


def _questions(results: Row, name: str, metric: str, variant: str) -> dict[str, float]:
    """Question -> its part of a metric, which is the mean of these parts; empty where the metric is no mean over documents.

    A question is known by its document and prompt. Word tasks that ask about the same word are one question: they do not err
    independently.
    """
    leaves, value = _leaves(results, name), results["results"][name][f"{metric},{variant}"]
    answered = {
        leaf: [row for row in results["samples"][leaf] if row["filter"] == variant and isinstance(row.get(metric), (int, float))]
        for leaf in leaves
    }
    count = sum(map(len, answered.values()))
    for counts_each_task_alike in (False, True):
        parts: dict[Any, list[tuple[list[Any], float]]] = defaultdict(list)
        for leaf, row in ((leaf, row) for leaf, rows in answered.items() for row in rows):
            weight = 1 / len(answered[leaf]) / len(leaves) if counts_each_task_alike else 1 / count
            asked = [leaf, *(row[key] for key in ("doc_id", "doc_hash", "prompt_hash"))]
            parts[row["doc"]["word"] if leaf in embedded.TASKS else (leaf, row["doc_id"])].append((asked, weight * row[metric]))
        found = {_known_by([asked for asked, _ in some]): len(parts) * sum(part for _, part in some) for some in parts.values()}
        if found and math.isclose(statistics.fmean(found.values()), value, rel_tol=1e-6, abs_tol=1e-9):
            return found
    return {}


def by_question(rows: list[Row], rows_BL: Tensor | None, nats_B: Tensor | None) -> dict[str, dict[str, float]]:
    """TASK/METRIC of the main rows, and text/nelbo -> their `questions`, which are taken out of the rows."""
    each = {f"{row['task']}/{row['metric']}": (row.pop("questions"), row["is_main"]) for row in rows}
    found = {name: questions for name, (questions, is_main) in each.items() if is_main}
    if rows_BL is not None and nats_B is not None:
        per_token = (nats_B / (rows_BL.shape[1] - 1)).tolist()
        found["text/nelbo"] = dict(zip(map(_known_by, rows_BL.tolist()), per_token, strict=True))
    return found


def _known_by(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def failed(results: Row, name: str) -> int:
    """Documents of a task, or of the tasks of a group, that failed."""
    return sum(len({row["doc_id"] for row in results["samples"][leaf] if row.get("failed")}) for leaf in _leaves(results, name))


def numbers_of(results: Row, name: str, number: str) -> list[Any]:
    """A number of every document of a task, or of the tasks of a group, that has it; a document has a sample for each filter."""
    tasks_of = [results["samples"][leaf] for leaf in _leaves(results, name)]
    return [found for rows in tasks_of for found in {row["doc_id"]: row[number] for row in rows if number in row}.values()]


def _mean(results: Row, name: str, number: str) -> float | None:
    found = numbers_of(results, name, number)
    return statistics.fmean(found) if found else None


def sample_rows(results: Row) -> list[Row]:
    """A row for each document of each task (and filter): what was asked, expected and answered, the scores, and what it took."""
    rows = []
    for task, samples in results["samples"].items():
        for row in samples:
            asked = row["arguments"]
            first = asked[0] if isinstance(asked, list) else next(iter(asked.values()))
            prompt = first[0] if isinstance(first, list) else first.get("arg_0")
            answer = row["filtered_resps"]
            rows.append(
                {
                    "task": task,
                    "num_fewshot": results["n-shot"].get(task),
                    "doc_id": row["doc_id"],
                    "filter": row["filter"],
                    "prompt": prompt,
                    "target": row["target"],
                    "response": row["resps"],
                    "answer": answer[0] if isinstance(answer, list) and len(answer) == 1 else answer,
                    "scores": {metric: row.get(metric) for metric in row["metrics"]},
                    "failed": row["failed"],
                    **{name: row.get(name) for name in ("nfe", "tokens", "logprob", "stderr", "nelbo_samples")},
                }
            )
    return rows
