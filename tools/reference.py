"""Write docs/REFERENCE.md from the code: every field of a recipe, every preset, every option of the command line.

python tools/reference.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from a2d_core import presets  # noqa: E402
from a2d_core.__main__ import _type_name, parser  # noqa: E402
from a2d_core.config import OBJECTIVES, ComputeConfig, Recipe, StepCompute, Toleration  # noqa: E402
from a2d_core.settings import describe, to_dict  # noqa: E402

PAGE = ROOT / "docs" / "REFERENCE.md"
STAGES = {
    "convert": ("convert",),
    "pretrain, sft": ("pretrain", "sft"),
    "sample": ("sample",),
    "evaluate": ("evaluate",),
    "register": ("register",),
    "tracking": ("tracking",),
}
INTRODUCTION = """# Reference

This page is written by `python tools/reference.py` from `a2d_core/config.py`, `a2d_core/presets/` and the command line's parser. A test
checks that it is up to date.

## How a field is set

| where | form | example |
|---|---|---|
| a command | `--set FIELD=VALUE` for the command's own stage, `--set STAGE.FIELD=VALUE` for another that it reads | `--set max_steps=100` |
| `plan` | `--set STAGE.FIELD=VALUE` | `--set sft.max_steps=100` |
| the flow | `--overrides 'STAGE.FIELD=VALUE ...'` | `--overrides 'sft.max_steps=100 pretrain.enabled=false'` |
| a recipe of your own | TOML: `FIELD = VALUE` under `[STAGE]`, or under `[mdlm.STAGE]` for one objective | `[sft]` `max_steps = 100` |

Values are JSON (`3`, `1e-4`, `true`, `null`, `["a", "b"]`) or else plain text. From lowest to highest priority: the defaults, the preset's
base, the preset, its table for the objective, overrides. `compute` cannot be overridden in the flow, which reads it from the recipe before
a run starts.
"""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells)]


def fields(default: Any) -> list[str]:
    """A line for each field of a configuration: its name, default, type and meaning."""
    meanings = describe(type(default))
    rows = []
    for field in dataclasses.fields(default):
        if not dataclasses.is_dataclass(getattr(default, field.name)):
            value = json.dumps(getattr(default, field.name), ensure_ascii=False)
            rows.append((f"`{field.name}`", f"`{value}`", _type_name(str(field.type)), meanings[field.name]))
    return table(("field", "default", "type", "meaning"), rows)


def stages() -> list[str]:
    """The fields of each stage."""
    lines = []
    for title, names in STAGES.items():
        lines += ["", f"## {title}", "", *fields(getattr(Recipe, names[0]))]
        first, *others = (to_dict(getattr(Recipe, name)) for name in names)
        for name, other in zip(names[1:], others, strict=True):
            differing = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in other.items() if value != first[key])
            lines += ["", f"`{name}` has another default: {differing}."]
    lines += ["", "## compute", "", *fields(ComputeConfig())]
    steps = ", ".join(f"`compute.{field.name}`" for field in dataclasses.fields(ComputeConfig) if field.type == "StepCompute")
    lines += ["", f"Each of {steps} has these:", "", *fields(StepCompute())]
    return [*lines, "", "A toleration has these:", "", *fields(Toleration(key=""))]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def preset(name: str) -> list[str]:
    """What a preset changes, for both objectives."""
    recipes = [flat(to_dict(presets.resolve(presets.read(name), objective))) for objective in OBJECTIVES]
    plain = flat(to_dict(Recipe(name=name, objective="mdlm")))
    rows = []
    for key in recipes[0]:
        values = [json.dumps(recipe[key], ensure_ascii=False) for recipe in recipes]
        if key not in ("name", "objective") and any(value != json.dumps(plain.get(key), ensure_ascii=False) for value in values):
            rows.append((f"`{key}`", f"`{values[0]}`", "the same" if values[1] == values[0] else f"`{values[1]}`"))
    told = table(("field", *OBJECTIVES), rows) if rows else ["It changes nothing."]
    return ["", f"### {name}", "", presets.summary(name), "", *told]


def commands(group: argparse.ArgumentParser, path: str) -> list[str]:
    """The options of a command, and of the commands below it."""
    lines, rows = [], []
    for action in group._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                lines += commands(below, f"{path} {name}")
        elif action.dest not in ("help", "arguments"):
            shown = ", ".join(action.option_strings) or str(action.metavar)
            choices = "{" + ",".join(map(str, action.choices or ())) + "}"
            takes = f" {action.metavar or (choices if action.choices else action.dest.upper())}"
            takes = takes if action.option_strings and action.nargs != 0 else ""
            rows.append((f"`{shown}{takes}`", ("required; " if action.required and action.option_strings else "") + (action.help or "")))
    if rows:
        description = (group.description or "").strip()
        return [*lines, "", f"### {path}", "", *([description, ""] if description else []), *table(("option", "meaning"), rows)]
    return lines


def page() -> str:
    """The whole page."""
    shown = [line for name in presets.names() for line in preset(name)]
    introduction = (
        "What each preset changes of the defaults. `python -m a2d_core plan --preset NAME` prints the whole recipe, and its cost."
    )
    lines = [INTRODUCTION.rstrip(), *stages(), "", "## Presets", "", introduction, *shown]
    lines += ["", "## Commands", "", "`python -m a2d_core COMMAND --help` says the same, and lists the fields that `--set` takes."]
    return "\n".join([*lines, *commands(parser(), "")]).replace("###  ", "### ") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(page().splitlines())} lines")
