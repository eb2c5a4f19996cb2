"""Pretrain: continue the pretraining of a converted checkpoint on text, with the diffusion objective."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2d_core import launch
from a2d_core.config import TrainConfig
from a2d_core.stages import training

if TYPE_CHECKING:  # heavy, and needed where the work is done
    from datasets import Dataset

    from a2d_core import trainer
    from a2d_core.models import DiffusionModel


def run(
    config: TrainConfig,
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    seed: int = 0,
    processes: int = 1,
    strategy: str = "ddp",
    nodes: launch.Nodes = launch.ONE_NODE,
    resume_from: str | None = None,
    objective: str | None = None,
) -> dict[str, Any]:
    """Train on `config.dataset`; write `metrics.jsonl`, `checkpoint-N` and `checkpoint-final` below `output_dir`.

    `processes` of this node share the training by `strategy`; of several `nodes`, which share `output_dir`, each calls this.
    `resume_from`: a `checkpoint-N` directory of the same run.
    Returns the held-out NELBO (nats per token), tokens per second, steps, peak memory, and how many documents were
    dropped for which reason.
    """
    return training.run(
        "pretrain",
        config,
        model_dir,
        output_dir,
        seed=seed,
        processes=processes,
        strategy=strategy,
        nodes=nodes,
        resume_from=resume_from,
        objective=objective,
    )


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
