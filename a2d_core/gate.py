"""The regression gate: what an evaluation says of a model, by itself and beside the champion. Pure functions of results.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

BAR = 2.0
"""Standard errors by which a task must lie beyond chance and the untrained model."""
MARGIN = 1.0
"""A metric has fallen where it is worse than the champion's by more than so many standard errors of the difference."""


@dataclass(frozen=True)
class Score:
    """One metric of an evaluation."""

    value: float
    stderr: float | None
    higher_is_better: bool = True
    bars: tuple[float, ...] = ()
    """What it must lie beyond: chance, the untrained model."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.stderr is None else f"{self.value:.3f} ± {self.stderr:.3f}"

    def beats(self, bar: float) -> bool:
        """Whether it lies beyond a bar by more than chance would bring it."""
        gain = self.value - bar if self.higher_is_better else bar - self.value
        return gain > BAR * (self.stderr or 0.0)


@dataclass(frozen=True)
class Comparison:
    """A metric of the candidate beside that of the champion; None where it was not measured."""

    name: str
    candidate: Score | None
    champion: Score | None

    @property
    def word(self) -> Literal["better", "worse", "same", "new", "missing"]:
        """How the candidate's differs from the champion's, by more than `MARGIN` standard errors of the difference.

        Both are taken as independent: for two models that answer the same questions, that overstates the error.
        """
        if self.candidate is None or self.champion is None:
            return "missing" if self.candidate is None else "new"
        gain = self.candidate.value - self.champion.value
        gain = gain if self.candidate.higher_is_better else -gain
        margin = MARGIN * math.hypot(self.candidate.stderr or 0.0, self.champion.stderr or 0.0)
        return "better" if gain > margin else "worse" if -gain > margin else "same"


@dataclass(frozen=True)
class Verdict:
    """`passed`, `failed`, or `open` where nothing could be compared, or not all of it; and why."""

    word: Literal["passed", "failed", "open"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


def scores(results: dict[str, Any] | None) -> dict[str, Score]:
    """The metrics of results.json that have a direction, by name: TASK/METRIC, and text/nelbo."""
    found = {}
    for row in (results or {}).get("tasks") or []:
        bars = tuple(bar for bar in (row["chance"], row["baseline"]) if bar is not None)
        found[f"{row['task']}/{row['metric']}"] = Score(row["value"], row["stderr"], row.get("higher_is_better") is not False, bars)
    text = (results or {}).get("text")
    return found | ({"text/nelbo": Score(text["nelbo"], text["stderr"], higher_is_better=False)} if text else {})


def compare(results: dict[str, Any] | None, champion: dict[str, Any] | None) -> list[Comparison]:
    """All metrics of two evaluations, the candidate's in their order and then those that only the champion has."""
    ours, theirs = scores(results), scores(champion)
    return [Comparison(name, ours.get(name), theirs.get(name)) for name in {**ours, **theirs}]


def judge(results: dict[str, Any] | None, champion: dict[str, Any] | None = None) -> Verdict:
    """Whether a model passes: each task beyond chance and the untrained model, and no metric fallen below the champion's."""
    rows = compare(results, champion)
    level = [name for name, score in scores(results).items() if not all(map(score.beats, score.bars))]
    fallen = [f"{row.name} {row.candidate} (champion {row.champion})" for row in rows if row.word == "worse"]
    if level or fallen:
        parts = {"no better than chance or the untrained model": level, "worse than the champion": fallen}
        return Verdict("failed", "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names))
    missing = [row.name for row in rows if row.word == "missing"]
    if missing:
        return Verdict("open", f"the champion has {', '.join(missing)}, which was not measured")
    is_judged = any(row.champion or (row.candidate and row.candidate.bars) for row in rows)
    return Verdict("passed") if is_judged else Verdict("open", "nothing was scored that can be compared")
