"""Register: the finished checkpoint becomes a version of a model in the MLflow registry, a candidate for review."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2d_core import registry
from a2d_core.config import Recipe, RegisterConfig, SampleConfig, UserError


def run(
    config: RegisterConfig, model_dir: str | Path, *, name: str, tags: dict[str, str], metrics: dict[str, Any], sample: SampleConfig
) -> dict[str, Any]:
    """Register a checkpoint under `name` in the active MLflow run; return {"name", "version", "uri"}."""
    registered = registry.register(model_dir, name=name, tags=tags, metrics=metrics, sample=sample)
    print(f"registered {registered['name']} version {registered['version']}: alias candidate, review pending")
    return registered


def model_name(recipe: Recipe) -> str:
    """The name of the registered model: `register.name` with {preset} and {objective} filled in."""
    try:
        return recipe.register.name.format(preset=recipe.name, objective=recipe.objective).replace(".", "-")
    except (KeyError, IndexError, ValueError):
        raise UserError(f"register.name='{recipe.register.name}' may contain {{preset}} and {{objective}}, and no other braces") from None


def gate(results: dict[str, Any] | None) -> str:
    """What the evaluation says to a reviewer: `passed` where every task beats chance and the untrained model by two
    standard errors, `failed`, or `open` where nothing was scored that can be compared."""
    bars = [(t, [b for b in (t["chance"], t["baseline"]) if b is not None]) for t in (results or {}).get("tasks", [])]
    judged = [t["value"] - 2 * (t["stderr"] or 0.0) > max(lower) for t, lower in bars if lower]
    return "open" if not judged else "passed" if all(judged) else "failed"
