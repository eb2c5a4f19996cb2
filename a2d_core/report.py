"""The report of an evaluation: one list of blocks, which the card of the flow and the page report.html both show."""

from __future__ import annotations

import base64
import html as escape
import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

Z95 = 1.959964
"""Standard errors on either side of a score that make its 95% confidence interval."""
SHOWN = 5
"""Worst, and best, samples that are shown of an evaluation."""
LONGEST = 400
"""Characters of a prompt or an answer that are shown."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; white-space: pre-wrap }
th { border-bottom: 2px solid #888; font-weight: 600 } img { max-width: 100% } .wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Text:
    """A heading, or a paragraph."""

    text: str
    level: int = 0
    """0 is a paragraph, 1 and 2 are headings."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Image:
    """A PNG."""

    png: bytes
    caption: str


Block = Text | Table | Image


def read(directory: str | Path) -> list[Block]:
    """The report of an evaluation from the files that it wrote."""
    folder = Path(directory)
    summary, record = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("results.json", "evaluation.json"))
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return content(summary, [json.loads(line) for line in lines], record)


def content(summary: Row, samples: list[Row], record: Row) -> list[Block]:
    """The report: what was run, the tables with confidence intervals, the plot, what failed, and the worst and best samples."""
    suite = record["evaluate"]["suite"]
    made = f"seed {record['seed']} · {record['device']} · {record['seconds']:,.0f} s · {record['evaluations']:,} evaluations"
    blocks: list[Block] = [Text(f"Suite {suite}" if suite else "Tasks", 2)] if summary["tasks"] else []
    blocks.append(Text(f"{made} · weights {record['weights']['model'][:12]} · torch {record['versions']['torch']}"))
    if summary["tasks"]:
        blocks += [task_table(summary["tasks"]), *_notes(summary["tasks"])]
    if summary["text"]:
        blocks += [Text("Text", 2), text_table(summary["text"]), Text(_bound(summary["text"]))]
    if any(row["evaluations"] for row in summary["tasks"]):
        caption = "Quality against network evaluations per answer; bars are 95% confidence intervals. "
        caption += "A star is the sampler of the tables; the others are named by what they change." if summary["frontier"] else ""
        blocks += [Text("Quality against evaluations", 2), Image(plot(summary), caption)]
        if summary["frontier"]:
            blocks.append(frontier_table(summary["frontier"]))
    return [*blocks, *_failures(samples), *_samples(samples, summary["tasks"])]


# --- tables ---------------------------------------------------------------------------------------


def main_rows(tasks: list[Row]) -> list[Row]:
    """The rows that stand for a suite's entries; all rows where there is no suite."""
    return [row for row in tasks if row["entry"]] or tasks


def task_table(tasks: list[Row]) -> Table:
    """A line for each task, or entry of a suite: score, confidence interval, and what it is compared with, in points of 1."""
    rows = main_rows(tasks)
    columns = {
        "task": [row["entry"] or row["task"] for row in rows],
        "metric": [row["metric"] for row in rows],
        "shots": [number(row["num_fewshot"]) for row in rows],
        "score": [estimate(row["value"], row["stderr"]) for row in rows],
        "95% interval": [between(interval(row["value"], row["stderr"], row["independent"])) for row in rows],
        "chance": [estimate(row["chance"]) for row in rows],
    }
    for name, title in (("baseline", "parent"), ("champion", "champion"), ("published", "published")):
        columns[title] = [estimate(row[name]) for row in rows]
        columns[f"vs {title}"] = ["–" if row[name] is None else f"{row['value'] - row[name]:+.3f}" for row in rows]
    columns |= {
        "evaluations": [number(row["evaluations"]) for row in rows],
        "tokens per evaluation": [ratio(row["tokens"], row["evaluations"]) for row in rows],
        "documents": [number(row["documents"]) for row in rows],
        "failed": [number(row["failed"] or None) for row in rows],
    }
    told = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    return Table(tuple(told), tuple(zip(*told.values(), strict=True)))


def text_table(text: Row) -> Table:
    """A line for each model: the text in nats per token, the perplexity that they bound, and bits per byte."""
    ours = ("this model, NELBO", "nelbo", "stderr", "bits_per_byte", "bits_per_byte_stderr")
    lines = [
        ("autoregressive source, its own loss", "ar_nll", "ar_stderr", "ar_bits_per_byte", "ar_bits_per_byte_stderr"),
        ("converted, untrained, NELBO", "baseline_nelbo", None, None, None),
        ("pretrained, NELBO", "pretrained_nelbo", None, None, None),
        ours,
    ]
    rows = []
    for name, nats, stderr, bits, bits_stderr in lines:
        if text.get(nats) is not None:
            numbers = estimate(text[nats], text.get(stderr or "")), between(interval(text[nats], text.get(stderr or "")))
            rows.append((name, *numbers, f"{math.exp(text[nats]):.2f}", estimate(text.get(bits or ""), text.get(bits_stderr or ""))))
    return Table(("model", "nats per token", "95% interval", "perplexity", "bits per byte"), tuple(rows))


def _bound(text: Row) -> str:
    words = f"{text['tokens']:,} tokens are scored, {text['bytes']:,} bytes. A NELBO is an upper bound: the perplexity is at most that."
    if text.get("gap") is not None:
        words += f" The bound is {estimate(text['gap'], text['gap_stderr'])} nats per token above the autoregressive source."
    return words


def frontier_table(frontier: list[Row]) -> Table:
    """A line for each sampler and task."""
    rows = []
    for row in (row for row in frontier if row["is_main"]):
        pace = number(row["evaluations"]), ratio(row["tokens"], row["evaluations"])
        rows.append((row["sampler"], row["task"], row["metric"], estimate(row["value"], row["stderr"]), *pace))
    return Table(("sampler", "task", "metric", "score", "evaluations", "tokens per evaluation"), tuple(rows))


def _notes(tasks: list[Row]) -> list[Block]:
    notes = [f"{row['entry']}: {row['note']}" for row in tasks if row["note"]]
    sources = sorted({f"Published: {row['source']}" for row in tasks if row["source"]})
    return [Text(". ".join((*sources, *notes)) + ".")] if sources or notes else []


def _failures(samples: list[Row]) -> list[Block]:
    failed = [row for row in samples if row["failed"] is not None]
    if not failed:
        return []
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for row in failed:
        reasons[row["task"], row["failed"]] += 1
    rows = tuple((task, str(count), _cut(reason)) for (task, reason), count in sorted(reasons.items(), key=lambda item: -item[1]))
    return [Text("Failed samples", 2), Text(f"{len(failed):,} of {len(samples):,}; no mean counts them."), Table(("task", "", "why"), rows)]


def _samples(samples: list[Row], tasks: list[Row]) -> list[Block]:
    """The worst and the best answers by the metrics that stand for their tasks, and among equals by evaluations."""
    is_higher_better = {row["metric"]: row["higher_is_better"] is not False for row in tasks if row["is_main"]}
    ranked: list[tuple[float, Row]] = []
    for row in samples:
        named = {name if row["filter"] == "none" else f"{name}/{row['filter']}": value for name, value in row["scores"].items()}
        found = [(name, value) for name, value in named.items() if name in is_higher_better and isinstance(value, (int, float))]
        if row["failed"] is not None:
            ranked.append((-math.inf, row | {"score": None}))
        elif found:
            name, value = found[0]
            ranked.append((value if is_higher_better[name] else -value, row | {"score": value}))
    if not ranked:
        return []
    ordered = [row for _, row in sorted(ranked, key=lambda pair: (pair[0], -(pair[1]["nfe"] or 0)))]
    worst, best = ordered[:SHOWN], ordered[max(SHOWN, len(ordered) - SHOWN) :][::-1]
    blocks: list[Block] = [Text("Worst samples", 2), _sample_table(worst)]
    return [*blocks, Text("Best samples", 2), _sample_table(best)] if best else blocks


def _sample_table(rows: list[Row]) -> Table:
    """What was asked is cut at its front, and an answer at its end."""
    cells = [
        (
            row["task"],
            _cut(row["prompt"], tail=True),
            _cut(row["target"]),
            _cut(row["failed"] or row["answer"]),
            "failed" if row["failed"] else f"{row['score']:.3g}",
            number(row["nfe"]),
        )
        for row in rows
    ]
    return Table(("task", "asked", "expected", "answered", "score", "evaluations"), tuple(cells))


def _cut(value: Any, tail: bool = False) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= LONGEST:
        return text
    return f"… {text[-LONGEST:]}" if tail else f"{text[:LONGEST]} …"


def estimate(value: float | None, stderr: float | None = None) -> str:
    """A score with its standard error, where it has one."""
    return "–" if value is None else f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def interval(value: float, stderr: float | None, independent: int | None = None) -> tuple[float, float] | None:
    """The 95% confidence interval of a score; None without a standard error.

    Where it is the share of right ones among `independent` answers, Wilson's, which knows that 20 of 20 are not all; tasks
    that weigh or err together count as the fewer answers that have this error. Else that of the normal distribution.
    """
    if stderr is None:
        return None
    if not independent:
        return value - Z95 * stderr, value + Z95 * stderr
    count = value * (1 - value) / stderr**2 if stderr > 1e-9 else independent
    middle, half = value + Z95**2 / (2 * count), Z95 * math.sqrt(value * (1 - value) / count + (Z95 / (2 * count)) ** 2)
    return max(0.0, (middle - half) / (1 + Z95**2 / count)), min(1.0, (middle + half) / (1 + Z95**2 / count))


def between(ends: tuple[float, float] | None) -> str:
    """An interval for people."""
    return "–" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def number(value: float | None) -> str:
    """A number for people, a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def unbroken(cell: str) -> str:
    """A cell of a table whose error stays on the line of its number."""
    return cell.replace(" ± ", "\u00a0±\u00a0").replace(" to ", "\u00a0to\u00a0") if cell[:1] in "-0123456789" else cell


def ratio(above: float | None, below: float | None) -> str:
    """A quotient with two decimals."""
    return "–" if above is None or not below else f"{above / below:.2f}"


# --- the plot and the page ------------------------------------------------------------------------


def plot(summary: Row) -> bytes:
    """A PNG: the score of each task against its `evaluations`, and a line for each field that the frontier tries."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, colours = figure.subplots(), (f"C{i}" for i in itertools.count())
    for row in (row for row in summary["tasks"] if row["is_main"] and row["evaluations"]):
        name = row["entry"] or row["task"]
        lines: dict[str, list[Row]] = defaultdict(list)
        for point in summary["frontier"]:
            if (point["task"], point["metric"]) == (row["task"], row["metric"]):
                lines[point["sampler"].partition("=")[0]].append(point)
        for j, (field, points) in enumerate(lines.items()):
            style = {"color": next(colours), "linestyle": ("-", "--", ":")[j % 3], "marker": "osD"[j % 3], "markersize": 4}
            _bars(axes, sorted(points, key=lambda point: point["evaluations"]), label=f"{name}, {field}", **style)
            for point in points:
                value = point["sampler"].partition("=")[2]
                axes.annotate(value, (point["evaluations"], point["value"]), (3, 4), textcoords="offset points", fontsize=7)
        _bars(axes, [row], label=name, color=next(colours), marker="*", markersize=12)
    axes.set_xlabel("network evaluations per answer")
    axes.set_ylabel("score")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()


def _bars(axes: Any, points: list[Row], **style: Any) -> None:
    """Points with their 95% confidence intervals."""
    at, scores = [p["evaluations"] for p in points], [p["value"] for p in points]
    ends = [interval(p["value"], p["stderr"], p["independent"]) or (p["value"], p["value"]) for p in points]
    sizes = [[abs(score - end) for score, end in zip(scores, side, strict=True)] for side in zip(*ends, strict=True)]
    axes.errorbar(at, scores, yerr=sizes, capsize=2, elinewidth=0.7, **style)


def html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one page that needs nothing else."""
    parts = []
    for block in blocks:
        if isinstance(block, Text):
            tag = f"h{block.level}" if block.level else "p"
            parts.append(f"<{tag}>{escape.escape(block.text)}</{tag}>")
        elif isinstance(block, Table):
            head = "".join(f"<th>{escape.escape(cell)}</th>" for cell in block.head)
            rows = ["".join(f"<td>{escape.escape(unbroken(cell))}</td>" for cell in row) for row in block.rows]
            parts.append(f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in [head, *rows])}</table></div>')
        else:
            data = base64.b64encode(block.png).decode()
            parts.append(
                f'<img src="data:image/png;base64,{data}" alt="{escape.escape(block.caption)}"><p>{escape.escape(block.caption)}</p>'
            )
    top = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape.escape(title)}</title><style>{STYLE}</style>'
    return f"{top}<h1>{escape.escape(title)}</h1>\n" + "\n".join(parts) + "\n"
