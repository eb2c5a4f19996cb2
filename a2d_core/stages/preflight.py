"""Preflight: what a later stage would refuse, perhaps after hours, is refused before the first one trains."""

from __future__ import annotations

from pathlib import Path

from a2d_core.config import Recipe, TrainConfig

SHIPPED = {"pretrain": "embedded:corpus", "sft": "embedded:tasks", "text": "embedded:corpus", "tasks": "a2d_words"}
"""What needs no look, because it comes with the package."""


def inputs(recipe: Recipe) -> None:
    """Open the data sets and tasks of every stage that is switched on; raises `UserError` as the stages would."""
    evaluate = recipe.evaluate
    if recipe.pretrain.enabled and recipe.pretrain.dataset != SHIPPED["pretrain"]:
        _documents(recipe.pretrain, recipe.seed)
    if recipe.sft.enabled and (recipe.sft.dataset != SHIPPED["sft"] or recipe.sft.streaming):
        from a2d_core import data

        data.load_conversations(recipe.sft.dataset, recipe.sft, recipe.seed)
    if evaluate.enabled and evaluate.text_dataset not in (None, SHIPPED["text"]):
        _documents(evaluate.reading(), recipe.seed)
    if evaluate.enabled and not set(evaluate.tasks) <= {SHIPPED["tasks"]}:
        from a2d_core import tasks

        tasks.load(evaluate)


def checkpoint(recipe: Recipe, model_dir: str | Path) -> None:
    """See that the converted checkpoint suits every training stage that is switched on; raises `UserError` as the stages would."""
    from a2d_core import models, trainer

    model = models.load(model_dir)
    for config in (recipe.pretrain, recipe.sft):
        if config.enabled:
            trainer.check_fits(model, config)
    if recipe.evaluate.enabled and recipe.evaluate.text_dataset is not None:
        length = recipe.evaluate.text_length
        model.require_room(length, f"evaluate.text_length={length}", "lower it")
    if recipe.sft.enabled:
        remedy = f"sft needs one: put a chat_template.jinja into the directory of {recipe.convert.model}, start from another model, or set "
        model.require_chat_template(remedy + "sft.enabled=false")


def _documents(config: TrainConfig, seed: int) -> None:
    from a2d_core import data  # heavy, and needless for what is shipped

    if config.streaming:
        data.open_stream(config, seed)
    else:
        data.load_documents(config.dataset, config, seed)
