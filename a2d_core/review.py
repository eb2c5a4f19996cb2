"""What a reviewer reads of a candidate and the champion, as JSON, as text for a terminal, and as Markdown for MLflow's pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from a2d_core import gate

MOST_DESCRIPTION = 4900
"""Characters of a version's description: MLflow's databases hold 5,000."""
Rows = list[list[str]]


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with what registering wrote of it."""

    name: str
    number: int
    tags: dict[str, str]
    record: dict[str, Any] = field(default_factory=dict)
    """review.json: results, samples, recipe, chain and facts; empty where the version was made by something else."""

    @property
    def results(self) -> dict[str, Any] | None:
        """The evaluation, as results.json has it."""
        return self.record.get("results")


def build(candidate: Version, champion: Version | None) -> dict[str, Any]:
    """Candidate against champion, JSON-serialisable: gate, metrics, samples, lineage, and how the recipes differ."""
    theirs = champion.results if champion else None
    verdict = gate.judge(candidate.results, theirs)
    rows = gate.compare(candidate.results, theirs)
    lineages = [lineage(version) for version in (candidate, champion) if version]
    answers = [{s["prompt"]: s["answer"] for s in v.record.get("samples") or []} for v in (candidate, champion) if v]
    return {
        "name": candidate.name,
        "candidate": {"version": candidate.number, "tags": candidate.tags},
        "champion": {"version": champion.number, "tags": champion.tags} if champion else None,
        "gate": {"word": verdict.word, "why": verdict.why},
        "metrics": [
            {"name": row.name, "word": row.word if champion else ""}
            | {
                who: s and {"value": s.value, "stderr": s.stderr}
                for who, s in (*_both(row.candidate, row.champion).items(), ("gain", row.gain))
            }
            for row in rows
        ],
        "samples": [
            {"prompt": prompt, **_both(*(a.get(prompt) for a in answers))} for prompt in dict.fromkeys(p for a in answers for p in a)
        ],
        "lineage": [
            {"what": what, **_both(*(line.get(what) for line in lineages))} for what in dict.fromkeys(w for x in lineages for w in x)
        ],
        "differences": [
            {"field": name, **_both(ours, other)}
            for name, ours, other in differences(candidate.record.get("recipe") or {}, champion.record.get("recipe") or {})
        ]
        if champion
        else [],
    }


def _both(candidate: Any, champion: Any = None) -> dict[str, Any]:
    return {"candidate": candidate, "champion": champion}


def lineage(version: Version) -> dict[str, str]:
    """Where a version comes from, in words; a digest is cut to its first twelve digits."""
    tags, record = version.tags, version.record
    facts, recipe = record.get("facts") or {}, record.get("recipe") or {}
    lines = {"source model": tags.get("base_model", "")}
    for stage in ("pretrain", "sft"):
        if digest := (facts.get(stage) or {}).get("data_digest"):
            lines[f"{stage} data"] = f"{recipe[stage]['dataset']}, {facts[stage]['train_rows']} rows, digest {digest[:12]}"
    chain = [f"{s['stage']} ({s['step']} steps)" if "step" in s else s["stage"] for s in record.get("chain") or []]
    lines |= {"stages": " > ".join(chain), "weights": tags.get("checkpoint_sha256", "")[:12], "code": tags.get("code", "")}
    lines |= {"Metaflow run": tags.get("metaflow.run", ""), "MLflow run": tags.get("mlflow.parent_run", "")}
    return {what: value for what, value in lines.items() if value}


def differences(ours: Any, theirs: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, our value, theirs) wherever two JSON values differ; numbers must be the same to the last bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif ours != theirs:
        yield where, ours, theirs


# --- for people -----------------------------------------------------------------------------------


def text(review: dict[str, Any]) -> str:
    """A review for the terminal; plain, so that it reads the same in a pipe, and no model's answer can command the terminal."""
    candidate, champion = review["candidate"], review["champion"]
    head = f"{review['name']}: candidate version {candidate['version']} ({_state(candidate['tags'])})"
    head += f" against champion version {champion['version']}" if champion else "; there is no champion yet"
    now, then = str(gate.Verdict(**review["gate"])), _gate_tag(candidate["tags"])
    parts = [head, f"gate: {now}" + (f"\nit was, when the version was registered: {then}" if then != now else "")]
    for title, rows in _tables(review):
        parts.append("\n".join([title, *(f"  {line}" for line in aligned(rows))]))
    for sample in review["samples"]:
        answers = [f"  {who:<10} {_flat(sample[who])}" for who in ("candidate", "champion") if champion or who == "candidate"]
        parts.append("\n".join([f"> {_flat(sample['prompt'])}", *answers]))
    return visible("\n\n".join(parts))


def visible(text: str) -> str:
    """Text without the characters that command a terminal."""
    return re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)


def markdown(review: dict[str, Any]) -> str:
    """A review as the description of a version; samples and then differences are left out where it would be too long."""
    champion = review["champion"]
    against = f"against champion version {champion['version']}" if champion else "with no champion yet"
    parts = [f"**Gate: {gate.Verdict(**review['gate'])}** ({against}, when it was registered)"]
    parts += [f"### {title}\n{markdown_table(rows)}" for title, rows in _tables(review)]
    if review["samples"]:
        rows = [[_flat(sample[key]) for key in ("prompt", "candidate", "champion")[: 3 if champion else 2]] for sample in review["samples"]]
        parts.insert(2, f"### samples\n{markdown_table([['prompt', 'candidate', 'champion'][: len(rows[0])], *rows])}")
    while len("\n\n".join(parts)) > MOST_DESCRIPTION and len(parts) > 1:
        parts.pop(2 if len(parts) > 2 else 1)
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with their columns under one another."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _tables(review: dict[str, Any]) -> list[tuple[str, Rows]]:
    """The titled tables of a review, those without rows left out; the champion's column only where there is one."""
    names = ["candidate", "champion"] if review["champion"] else ["candidate"]

    def score(cell: dict[str, Any] | None) -> str:
        return "-" if cell is None else str(gate.Score(**cell))

    def words(row: dict[str, Any]) -> str:
        return f"{row['word']} ({score(row['gain'])})" if row["gain"] else row["word"]

    metrics = [[row["name"], *(score(row[n]) for n in names), *([words(row)] if review["champion"] else [])] for row in review["metrics"]]
    lines = [[row["what"], *(row[n] or "-" for n in names)] for row in review["lineage"]]
    changed = [[row["field"], *(str(row[n]) for n in names)] for row in review["differences"]]
    heads = (
        ("metrics, ± one standard error", ["metric", *names, *(["candidate is"] if review["champion"] else [])], metrics),
        ("lineage", ["", *names], lines),
        ("configuration: what differs", ["field", *names], changed),
    )
    return [(title, [head, *rows]) for title, head, rows in heads if rows]


def markdown_table(rows: Rows) -> str:
    """Rows, the first of them the head, as a Markdown table."""
    head, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _state(tags: dict[str, str]) -> str:
    who = f" by {tags['review.by']} at {tags['review.at']}" if "review.by" in tags else ""
    why = f": {tags['review.why']}" if tags.get("review.why", "-") != "-" else ""
    return f"review {tags.get('review', 'none')}{who}{why}"


def _gate_tag(tags: dict[str, str]) -> str:
    return ": ".join(filter(None, (tags.get("gate", "none"), tags.get("gate.why"))))


def _flat(value: str | None) -> str:
    return "-" if value is None else " ".join(value.split())
