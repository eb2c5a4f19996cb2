"""Presets: named recipes in TOML, built on one another with `base = "other"`.

    raw = read("tiny")                                              # plain nested dict, `base` resolved
    recipe = resolve(raw, "bd3lm", overrides=["sft.max_steps=100"])  # checked, frozen

A stage is a table (`[sft]`); `[mdlm.sft]` and `[bd3lm.sft]` are laid over it for that objective
alone. A file lays its tables over those of its base: a plain `[sft]` field of the file also wins
over an objective's field of the base. The first comment of a file says what the preset is for.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from a2d_core.config import OBJECTIVES, Recipe, UserError, check_objective, require
from a2d_core.settings import apply_overrides, build, meant, parse_override

HERE = Path(__file__).parent
SUFFIXES = (".toml", ".json")


def names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def summary(name: str) -> str:
    """What a shipped preset is for: the first comment of its file, on one line."""
    lines = []
    for line in (HERE / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def read(name_or_path: str) -> dict[str, Any]:
    """Read a preset by name, or a recipe from a .toml or .json file, with its bases merged in.

    Returns plain nested values (JSON-serialisable) with the key `name`. Raises `UserError` for an
    unknown name (with the nearest one), a missing or malformed file, and bases that go in a circle.
    """
    return _read(str(name_or_path), Path(), ())


def resolve(raw: dict[str, Any], objective: str, overrides: Iterable[str] = (), seed: int | None = None) -> Recipe:
    """Make the recipe of one objective from `read`'s plain values.

    `overrides` are texts `stage.field=value` and win over the preset, and so does `seed` where it
    is given. Raises `UserError` for an unknown objective, field or value.
    """
    return build(Recipe, flatten(raw, objective, overrides, seed))


def flatten(raw: dict[str, Any], objective: str, overrides: Iterable[str] = (), seed: int | None = None) -> dict[str, Any]:
    """The plain values that `resolve` makes a recipe of, before their names and types are checked.

    Raises `UserError` for an unknown objective, and an override that names no stage.
    """
    check_objective(objective)
    require("objective" not in raw, "a recipe serves both objectives: take 'objective' out of it and give --objective mdlm or bd3lm")
    values = {key: value for key, value in raw.items() if key not in OBJECTIVES}
    values = _merge(values, _table(raw.get(objective, {}), objective))
    overrides = list(overrides)
    for text in overrides:
        path, _ = parse_override(text)
        require(
            len(path) > 1 or path == ["seed"],
            f"override '{text}' names no stage: write stage.field=value, such as sft.max_steps=100",
        )
    values = apply_overrides(values, overrides)
    if seed is not None:
        values["seed"] = seed
    return values | {"name": raw.get("name", "custom"), "objective": objective}


def _read(name_or_path: str, folder: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    path = _locate(name_or_path, folder)
    circle = " -> ".join(child.stem for child in (*children, path))
    require(path not in children, f"preset '{children[0].stem if children else name_or_path}' is built on itself: {circle}")
    own = _parse(path)
    base = own.pop("base", None)
    require(base is None or isinstance(base, str), f"{path}: base={base!r} must be the name of a preset or a path to a file")
    merged = own if base is None else _lay_over(_read(str(base), path.parent, (*children, path)), own)
    return merged | {"name": own.get("name", path.stem)}


def _locate(name_or_path: str, folder: Path) -> Path:
    """The file of a preset; a relative path is looked for in `folder`, the place of the file that names it."""
    if name_or_path in names():
        return HERE / f"{name_or_path}.toml"
    if name_or_path.endswith(SUFFIXES):
        path = (folder / Path(name_or_path).expanduser()).resolve()
        require(path.is_file(), f"no recipe file at '{path}': give the path of a .toml or .json file, or a preset: {', '.join(names())}")
        return path
    raise UserError(f"unknown preset '{name_or_path}': {meant(name_or_path, names(), ', or give the path of a .toml or .json file')}")


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        json.dumps(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a valid {path.suffix[1:].upper()} recipe: {error}") from None
    return _table(values, str(path))


def _lay_over(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Merge a file over its base, dropping the base's per-objective fields that the file sets for both objectives."""
    kept = dict(base)
    for objective in OBJECTIVES:
        if objective in base:
            kept[objective] = _without(_table(base[objective], objective), child)
    return _merge(kept, child)


def _without(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`values` less the fields that `other` sets."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(other.get(key), dict):
            kept[key] = _without(value, other[key])
        elif key not in other:
            kept[key] = value
    return kept


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _table(value: Any, where: str) -> dict[str, Any]:
    require(isinstance(value, dict), f"{where} must be a table of names and values, not {value!r}")
    return value
