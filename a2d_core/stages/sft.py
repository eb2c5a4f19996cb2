"""SFT: fine-tune a diffusion checkpoint on conversations; only the assistant's turns are noised and scored."""

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
    Returns the held-out NELBO (nats per token), tokens per second, steps, peak memory, and how many assistant turns
    were dropped for which reason.
    """
    return training.run(
        "sft",
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
