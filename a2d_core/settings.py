"""From plain values (TOML, JSON, `stage.field=value`) to configurations, and back; and what their fields mean."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, TypeVar

from a2d_core.config import NOT_THE_ANSWER, SampleConfig, UserError, require

T = TypeVar("T")


def build(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Make a configuration dataclass from nested plain values (TOML, JSON), checking names and types.

    Raises `UserError` that names the field, the value, and what would be right.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    made = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            raise UserError(f"unknown field '{path}': {meant(name, known)}")
        made[name] = _coerce(hints[name], value, path)
    try:
        return cls(**made)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where and not str(error).startswith(where) else str(error)) from None


def meant(name: str, known: Sequence[str], otherwise: str = "") -> str:
    """What to say of an unknown name: the known one that is nearest to it, or else all of them, `otherwise` behind."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(known)}{otherwise}"


def to_dict(config: Any) -> dict[str, Any]:
    """The plain, JSON-serialisable form of a configuration; `build` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `stage.field=value` into its path and value; values are JSON where they parse as such, else text.

    Raises `UserError` for a text of another form.
    """
    path, equals, value = text.partition("=")
    require(bool(equals) and bool(path.strip()), f"override '{text}' is not of the form stage.field=value, such as sft.max_steps=100")
    return path.strip().split("."), _literal(value.strip())


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested plain values with each `stage.field=value` applied; `build` then checks the names.

    Raises `UserError` where a field is taken for a stage.
    """
    merged = json.loads(json.dumps(values))
    for text in overrides:
        path, value = parse_override(text)
        node = merged
        for key in path[:-1]:
            node = node.setdefault(key, {})
            require(isinstance(node, dict), f"override '{text}': '{key}' is a field, not a stage")
        node[path[-1]] = value
    return merged


def parameters(config: SampleConfig) -> dict[str, Any]:
    """What a single call of a served model may set otherwise, with 0 or "" for None: such parameters have no null."""
    null = {"block_origin": ""}
    return {name: null.get(name, 0) if value is None else value for name, value in vars(config).items() if name not in NOT_THE_ANSWER}


def with_parameters(config: SampleConfig, given: dict[str, Any]) -> SampleConfig:
    """The configuration with the parameters of a call; raises `UserError` where they are unknown or out of range."""
    unset = {f.name for f in dataclasses.fields(config) if f.default is None}
    changes = {name: None if name in unset and not value else value for name, value in given.items()}
    return build(SampleConfig, {**to_dict(config), **changes}, "sample")


def describe(cls: type) -> dict[str, str]:
    """Field name -> the one-line meaning that stands under it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    meanings = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            meanings[statement.target.id] = str(following.value.value)  # type: ignore[union-attr]
    return meanings


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type hint of a field, turning lists into tuples and ints into floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{path} is a group of fields, not {value!r}: set {path}.FIELD=VALUE")
        return build(typing.cast(type, hint), value, path)
    if origin is Literal:
        require(value in args, f"{path}={value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        require(isinstance(items, (list, tuple)), f"{path}={value!r} must be a list")
        return tuple(_coerce(args[0], item, path) for item in items)
    if origin is dict:
        require(isinstance(value, dict), f"{path}={value!r} must be a table of names and values")
        return dict(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), f"{path}={value!r} must be of type {hint.__name__}")
    return value
