"""Register: the finished checkpoint becomes a version of a model in the MLflow registry, a candidate for review."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2d_core import gate, registry, review, tracking
from a2d_core.config import Recipe, UserError, require
from a2d_core.settings import to_dict
from a2d_core.stages import checks


def run(
    model_dir: str | Path,
    recipe: Recipe,
    *,
    tags: dict[str, str],
    results: dict[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
    facts: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Register a checkpoint in the active MLflow run, with all that a reviewer asks; return {"name", "version", "uri"}.

    `facts` are what each stage returned. Raises `UserError` where the weights are not those that the last stage wrote.
    """
    written = [stage["weights_sha256"] for stage in (facts or {}).values() if "weights_sha256" in stage]
    name, spec = model_name(recipe), checks.read_spec(model_dir)
    record = {
        "results": results,
        "samples": samples or [],
        "recipe": to_dict(recipe),
        "chain": spec["chain"] if spec else [],
        "facts": facts or {},
    }
    own = {"objective": recipe.objective, "base_model": recipe.convert.model, "preset": recipe.name}
    numbers = tracking.evaluation_numbers(results)
    made = registry.register(
        model_dir,
        name=name,
        tags={**own, **tags},
        metrics=numbers,
        sample=recipe.sample,
        record=record,
        written=written[-1] if written else None,
    )
    version = registry.read(name, made["version"])
    registry.describe(version, review.markdown(review.build(version, registry.champion(name))))
    return made


def judge(recipe: Recipe, results: dict[str, Any] | None) -> dict[str, str]:
    """The verdict of the gate on an evaluation, beside that of the model's champion, as tags: gate, gate.why, gate.champion."""
    champion = registry.champion(model_name(recipe))
    verdict = gate.judge(results, champion.results if champion else None)
    tags = {"gate": verdict.word, "gate.why": verdict.why, "gate.champion": str(champion.number) if champion else ""}
    return {tag: value for tag, value in tags.items() if value}


def model_name(recipe: Recipe) -> str:
    """The name of the registered model: `register.name` with {preset} and {objective} filled in.

    Raises `UserError` for other braces, and for a name that MLflow does not take.
    """
    template = recipe.register.name
    try:
        name = template.format(preset=recipe.name, objective=recipe.objective)
    except (AttributeError, LookupError, ValueError):
        raise UserError(f"register.name='{template}' may contain {{preset}} and {{objective}}, and no other braces") from None
    require(bool(name) and not set(name) & set("/:'"), f"register.name='{template}' gives '{name}': use a name without '/', ':' and quotes")
    return name
