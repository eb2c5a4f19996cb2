"""Repeat: run an evaluation again from its record, and compare what came out, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a2d_core import review
from a2d_core.config import EvaluateConfig, SampleConfig, UserError, require
from a2d_core.settings import build
from a2d_core.stages import evaluate

Row = dict[str, Any]

NOT_COMPARED = ("seconds", "paths")
"""What a repetition may differ in and yet be equal."""


def run(earlier: Path, output_dir: Path, *, model_dir: str | None = None) -> tuple[Row, list[str], list[str]]:
    """Repeat the evaluation whose files are in `earlier`, with the model at `model_dir` or else where it was.

    Returns its results, how the settings, the weights, the versions and the machine differ from then, and how the results do.
    Raises `UserError` where a directory that it needs is not there, or the settings are not those of this version.
    """
    then = read(earlier)["record"]
    paths = {**then["paths"], **({"model": model_dir} if model_dir else {})}
    for role, path in paths.items():
        require(
            path is None or Path(path).is_dir(), f"the {role} of that evaluation, '{path}', is not there: put it back, or give --model DIR"
        )
    try:
        config, sample = build(EvaluateConfig, then["evaluate"], "evaluate"), build(SampleConfig, then["sample"], "sample")
    except UserError as error:
        raise UserError(
            f"another version ({then['code']}) made that evaluation, with settings that this one does not have: {error}"
        ) from None
    results = evaluate.run(
        config,
        sample,
        paths["model"],
        output_dir,
        seed=then["seed"],
        processes=then["processes"],
        **{f"{role}_dir": paths[role] for role in ("baseline", "pretrained", "source")},
    )
    (theirs, ours), (before, after) = (list(map(part, (read(earlier), read(output_dir)))) for part in (_settings, _outcome))
    return results, differences(theirs, ours), differences(before, _as_then(before, after))


def read(directory: Path) -> Row:
    """The record, the results and the samples of an evaluation; raises `UserError` where one of its files is not there."""
    files = {"record": "evaluation.json", "results": "results.json", "samples": "samples.jsonl"}
    for name in files.values():
        require((directory / name).is_file(), f"'{directory}' holds no {name}: it is no evaluation that can be repeated")
    texts = {part: (directory / name).read_text(encoding="utf-8") for part, name in files.items()}
    samples = [json.loads(line) for line in texts["samples"].splitlines()]
    return {"record": json.loads(texts["record"]), "results": json.loads(texts["results"]), "samples": samples}


def _settings(one: Row) -> Row:
    return {name: value for name, value in one["record"].items() if name not in NOT_COMPARED}


def _outcome(one: Row) -> Row:
    """Results and samples, without the champion's numbers, which may be another's by now."""
    tasks = [{name: value for name, value in row.items() if name != "champion"} for row in one["results"]["tasks"]]
    return {"results": {**one["results"], "tasks": tasks}, "samples": one["samples"]}


def _as_then(then: Any, now: Any) -> Any:
    """Without the fields that a later version of this program has added."""
    if isinstance(then, dict) and isinstance(now, dict):
        return {name: _as_then(then[name], value) for name, value in now.items() if name in then}
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [_as_then(*pair) for pair in zip(then, now, strict=True)]
    return now


def differences(then: Any, now: Any) -> list[str]:
    """In words, the places where two JSON values differ."""
    return [f"{where}: then {_short(before)}, now {_short(after)}" for where, before, after in review.differences(then, now)]


def _short(value: Any) -> str:
    text = f"{len(value)} rows" if isinstance(value, list) and len(value) > 3 else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}…"
