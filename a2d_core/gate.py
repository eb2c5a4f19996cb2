"""The regression gate: what an evaluation says of a model, by itself and beside the champion. Pure functions of results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    is_judged: bool = True
    """Whether the verdict depends on it: it stands for a task that was asked for, and is not a part or another metric of one."""
    questions: Mapping[str, float] = field(default_factory=dict)
    """Question -> its part of the value, which is their mean; empty where that is not known."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.stderr is None else f"{self.value:.3f} ± {self.stderr:.3f}"

    def beats(self, bar: float) -> bool:
        """Whether it lies beyond a bar by more than chance would bring it."""
        gain = self.value - bar if self.higher_is_better else bar - self.value
        return gain > BAR * (self.stderr or 0.0)


def stderr_of_mean(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for fewer than two values, or where one is not finite."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 and all(map(math.isfinite, values)) else None


@dataclass(frozen=True)
class Comparison:
    """A metric of the candidate beside that of the champion; None where it was not measured."""

    name: str
    candidate: Score | None
    champion: Score | None

    @cached_property
    def gain(self) -> Score | None:
        """By how much the candidate's is above the champion's, with the standard error of the difference; None without both.

        Over the questions that both answered, question by question: models that err on the same ones differ less than two
        independent errors say. As if independent where an evaluation did not keep its questions; None where they share none.
        """
        if self.candidate is None or self.champion is None:
            return None
        ours, theirs = self.candidate.questions, self.champion.questions
        if ours and theirs:
            gains = [value - theirs[question] for question, value in ours.items() if question in theirs]
            return Score(statistics.fmean(gains), stderr_of_mean(gains)) if gains else None
        stderr = math.hypot(self.candidate.stderr or 0.0, self.champion.stderr or 0.0)
        return Score(self.candidate.value - self.champion.value, stderr)

    @property
    def word(self) -> Literal["better", "worse", "same", "new", "missing", "other questions"]:
        """How the candidate's differs from the champion's, by more than `MARGIN` standard errors of the difference."""
        if self.candidate is None or self.champion is None:
            return "missing" if self.candidate is None else "new"
        if self.gain is None:
            return "other questions"
        gain, margin = self.gain.value, MARGIN * (self.gain.stderr or 0.0)
        margin *= 1 + 1e-9  # of one question in any number gain and error are the same, but for rounding: that is no more than the error
        gain = gain if self.candidate.higher_is_better else -gain
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
    questions = (results or {}).get("questions") or {}
    for row in (results or {}).get("tasks") or []:
        name, bars = f"{row['task']}/{row['metric']}", tuple(bar for bar in (row["chance"], row["baseline"]) if bar is not None)
        is_higher_better, is_judged = row.get("higher_is_better") is not False, row.get("is_main", True)
        found[name] = Score(row["value"], row["stderr"], is_higher_better, bars, is_judged, questions.get(name, {}))
    text, name = (results or {}).get("text"), "text/nelbo"
    if text:
        found[name] = Score(text["nelbo"], text["stderr"], higher_is_better=False, questions=questions.get(name, {}))
    return found


def compare(results: dict[str, Any] | None, champion: dict[str, Any] | None) -> list[Comparison]:
    """All metrics of two evaluations, the candidate's in their order and then those that only the champion has."""
    ours, theirs = scores(results), scores(champion)
    return [Comparison(name, ours.get(name), theirs.get(name)) for name in {**ours, **theirs}]


def judge(results: dict[str, Any] | None, champion: dict[str, Any] | None = None) -> Verdict:
    """Whether a model passes: each task beyond chance and the untrained model, and no metric fallen below the champion's.

    Of two models that are equally good but not the same, a metric falls by more than its standard error one time in six.
    """
    rows = [row for row in compare(results, champion) if any(score and score.is_judged for score in (row.candidate, row.champion))]
    ours = {row.name: row.candidate for row in rows if row.candidate}
    reasons = {
        "not a number": [name for name, score in ours.items() if not math.isfinite(score.value)],
        "no better than chance or the untrained model": [name for name, score in ours.items() if not all(map(score.beats, score.bars))],
        "worse than the champion": [_fallen(row) for row in rows if row.word == "worse"],
    }
    if any(reasons.values()):
        return Verdict("failed", "; ".join(f"{what}: {', '.join(names)}" for what, names in reasons.items() if names))
    unmeasured = {"missing": "which was not measured", "other questions": "which was asked other questions"}
    unknown = {why: [row.name for row in rows if row.word == word] for word, why in unmeasured.items()}
    if any(unknown.values()):
        return Verdict("open", "; ".join(f"the champion has {', '.join(names)}, {why}" for why, names in unknown.items() if names))
    is_judged = any(row.champion or (row.candidate and row.candidate.bars) for row in rows)
    return Verdict("passed") if is_judged else Verdict("open", "nothing was scored that can be compared")


def _fallen(row: Comparison) -> str:
    gain = row.gain and Score(abs(row.gain.value), row.gain.stderr)
    return f"{row.name} {row.candidate} (champion {row.champion}), by {gain}"
