"""Register: the finished checkpoint becomes a version of a model in the MLflow registry, a candidate for review."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2d_core import registry
from a2d_core.config import Recipe, SampleConfig, UserError, require


def run(model_dir: str | Path, *, name: str, tags: dict[str, str], metrics: dict[str, Any], sample: SampleConfig) -> dict[str, Any]:
    """Register a checkpoint under `name` in the active MLflow run; return {"name", "version", "uri"}."""
    return registry.register(model_dir, name=name, tags=tags, metrics=metrics, sample=sample)


def model_name(recipe: Recipe) -> str:
    """The name of the registered model: `register.name` with {preset} and {objective} filled in.

    Raises `UserError` for other braces, and for a name that MLflow does not take.
    """
    template = recipe.register.name
    try:
        name = template.format(preset=recipe.name, objective=recipe.objective)
    except (KeyError, IndexError, ValueError):
        raise UserError(f"register.name='{template}' may contain {{preset}} and {{objective}}, and no other braces") from None
    require(bool(name) and not set(name) & set("/:"), f"register.name='{template}' gives '{name}': use a name without '/' and ':'")
    return name


def gate(results: dict[str, Any] | None) -> str:
    """What the evaluation says to a reviewer, in one word.

    `passed`: every task lies two standard errors above chance and the untrained model; `failed`: one does not;
    `open`: nothing was scored that can be compared.
    """
    judged = []
    for task in (results or {}).get("tasks", []):
        bars = [bar for bar in (task["chance"], task["baseline"]) if bar is not None]
        if bars and task.get("higher_is_better") is not False:
            judged.append(task["value"] - 2 * (task["stderr"] or 0.0) > max(bars))
    return "open" if not judged else "passed" if all(judged) else "failed"
