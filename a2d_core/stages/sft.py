"""SFT: fine-tune a diffusion checkpoint on conversations; only the assistant's turns are noised and scored."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from a2d_core.config import TrainConfig
from a2d_core.stages import training

if TYPE_CHECKING:  # heavy, and needed where the work is done
    from datasets import Dataset

    from a2d_core import trainer
    from a2d_core.models import DiffusionModel


run = partial(training.run, "sft")
"""Train: see `training.run`, whose other arguments these are."""


def prepare(config: TrainConfig, model: DiffusionModel, seed: int) -> tuple[Dataset, Dataset, trainer.Fill, dict[str, Any]]:
    """Training and held-out rows; their fill; and the facts: what was dropped of the training part and why, and packing's padding."""
    from a2d_core import data

    model.stop_at(data.end_of_turn(model.tokenizer))
    block_size = model.objective.block_size
    (train_rows, facts), (eval_rows, _) = (
        data.conversation_rows(
            part,
            model.tokenizer,
            config.max_length,
            block_size,
            supervise=config.supervise,
            too_long=config.too_long,
            pack=pack,
            num_workers=config.num_workers,
        )
        for part, pack in zip(data.load_conversations(config.dataset, config, seed), (config.pack, False), strict=True)
    )
    return train_rows, eval_rows, "block" if block_size else "batch", facts
