"""Pretrain: continue the pretraining of a converted checkpoint on text, with the diffusion objective."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from a2d_core.config import TrainConfig
from a2d_core.stages import training

if TYPE_CHECKING:  # heavy, and needed where the work is done
    from datasets import Dataset

    from a2d_core import trainer
    from a2d_core.models import DiffusionModel


run = partial(training.run, "pretrain")
"""Train: see `training.run`, whose other arguments these are."""


def prepare(config: TrainConfig, model: DiffusionModel, seed: int) -> tuple[Any, Dataset, trainer.Fill, dict[str, Any]]:
    """Training and held-out rows of `max_length` tokens, without fill; and how many documents were dropped for which reason.

    With `streaming` the training rows are a stream, and what it drops is counted while it is read.
    """
    from a2d_core import data

    if config.streaming:
        stream, held_out = data.stream_rows(config, model.tokenizer, seed)
        return stream, held_out, None, {"dropped": stream.dropped}
    (train_rows, dropped), (eval_rows, _) = (
        data.pretraining_rows(part, model.tokenizer, config.max_length, config.insert_eos, pack=config.pack, num_workers=config.num_workers)
        for part in data.load_documents(config.dataset, config, seed)
    )
    return train_rows, eval_rows, None, {"dropped": dropped}
