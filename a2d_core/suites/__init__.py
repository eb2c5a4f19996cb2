"""Suites: named lists of tasks in TOML, each with its shots, its sampler, and the score that was published for it.

    suite = read("published", "bd3lm")
    for part in parts(suite.entries, EvaluateConfig(), SampleConfig()):
        ...                                  # one call of lm-eval: tasks that share their settings

`[[entries]]` lie over `[defaults]`, and the tables `mdlm` and `bd3lm` of either over its `sample` for that objective. An entry
with a `sample` starts from the defaults of `SampleConfig`, and one without takes the recipe's; so it is with single
fields of `EvaluateConfig`. The first comment of a file says what the suite is for.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2d_core.config import OBJECTIVES, EvaluateConfig, SampleConfig, UserError, check_objective, require
from a2d_core.settings import build, meant, to_dict

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One line of a suite: a task or group, and how it is run."""

    task: str
    """Task or group name of lm-eval."""
    name: str = ""
    """What it is called in the table; empty: the task's name."""
    metric: str | None = None
    """The metric that stands for it, METRIC or METRIC/FILTER; None: the first of the task."""
    num_fewshot: int | None = None
    """Examples before each question; None keeps the recipe's number."""
    apply_chat_template: bool | None = None
    """Whether questions go through the chat template; None does as the recipe says."""
    limit: int | None = None
    """Documents; the recipe's `limit` wins where it is lower."""
    sample: dict[str, Any] | None = None
    """Fields of SampleConfig over its defaults; None takes the recipe's sampler. Its max_new_tokens wins over the task's."""
    published: float | None = None
    """The score that was published for this objective, on the metric's scale."""
    source: str | None = None
    """Where it was published."""
    note: str | None = None
    """What is uncertain about it."""


@dataclass(frozen=True)
class Suite:
    """A file of this directory, for one objective."""

    name: str
    summary: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Part:
    """Entries that share all settings: one call of lm-eval."""

    evaluate: EvaluateConfig
    """Its `tasks` are those of the entries."""
    sample: SampleConfig
    generation: dict[str, Any] = field(default_factory=dict)
    """Arguments of generation that win over the tasks' own."""
    entries: tuple[Entry, ...] = ()


def names() -> list[str]:
    """Names of the suites that ship with the package."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def read(name: str, objective: str) -> Suite:
    """A suite by name, or from a .toml file. Raises `UserError` for an unknown name, and for a malformed file."""
    check_objective(objective)
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"unknown suite '{name}': {meant(name, names(), ', or give the path of a .toml file')}")
    text = path.read_text(encoding="utf-8")
    try:
        file = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from None
    unknown = sorted(set(file) - {"source", "defaults", "entries"})
    require(not unknown, f"{path}: unknown table or field '{', '.join(unknown)}': a suite has source, defaults and entries")
    require(bool(file.get("entries")), f"{path}: a suite needs at least one [[entries]]")
    made = [_entry(file, entry, objective, f"{path.stem}.entries[{i}]") for i, entry in enumerate(file["entries"])]
    twice = sorted({e.name for e in made if [other.name for other in made].count(e.name) > 1})
    require(not twice, f"{path}: two entries are called '{', '.join(twice)}': give them names")
    first = text.partition("\n")[0]
    return Suite(path.stem, first.lstrip("# ") if first.startswith("#") else "", tuple(made))


def _entry(file: dict[str, Any], entry: dict[str, Any], objective: str, where: str) -> Entry:
    values: dict[str, Any] = {}
    sample: dict[str, Any] = {}
    for layer in (file.get("defaults", {}), entry):
        values |= {key: value for key, value in layer.items() if key not in ("sample", *OBJECTIVES)}
        sample |= {**layer.get("sample", {}), **layer.get(objective, {})}
    build(SampleConfig, sample, f"{where}.sample")
    require("task" in values, f"{where} names no task")
    published = values.pop("published", {})
    require(set(published) <= set(OBJECTIVES), f"{where}.published has scores for {', '.join(OBJECTIVES)}, not {', '.join(published)}")
    score = published.get(objective)
    values |= {"name": values.get("name", values["task"]), "sample": sample or None, "published": score}
    return build(Entry, {**values, "source": file.get("source") if score is not None else None}, where)


def parts(config: EvaluateConfig, sample: SampleConfig, objective: str) -> list[Part]:
    """The suite of `config`, or else its tasks, as calls of lm-eval; entries with equal settings share one."""
    if config.suite is None:
        return [Part(config, sample)] if config.tasks else []
    groups: dict[tuple[str, str], list[Part]] = {}
    for entry in read(config.suite, objective).entries:
        part = _part(entry, config, sample)
        key = dataclasses.replace(part.evaluate, tasks=())
        groups.setdefault((repr(key), repr(part.sample) + repr(part.generation)), []).append(part)
    return [_joined(group) for group in groups.values()]


def _part(entry: Entry, config: EvaluateConfig, sample: SampleConfig) -> Part:
    limits = [limit for limit in (entry.limit, config.limit) if limit is not None]
    changes: dict[str, Any] = {"tasks": (entry.task,), "limit": min(limits, default=None)}
    for name in ("num_fewshot", "apply_chat_template"):
        if getattr(entry, name) is not None:
            changes[name] = getattr(entry, name)
    generation = {}
    if entry.sample is not None:
        ours = {name: value for name, value in to_dict(sample).items() if name in ("batch_size", "prompts", "chat", "enabled")}
        sample = build(SampleConfig, {**ours, **entry.sample}, "sample")
        generation = {"max_gen_toks": sample.max_new_tokens} if "max_new_tokens" in entry.sample else {}
    return Part(dataclasses.replace(config, **changes), sample, generation, (entry,))


def _joined(group: Sequence[Part]) -> Part:
    """Parts with equal settings as one; a task that stands twice among them is run once."""
    tasks = tuple(dict.fromkeys(task for part in group for task in part.evaluate.tasks))
    entries = tuple(entry for part in group for entry in part.entries)
    return dataclasses.replace(group[0], evaluate=dataclasses.replace(group[0].evaluate, tasks=tasks), entries=entries)
