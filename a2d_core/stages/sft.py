"""SFT: fine-tune a diffusion checkpoint on conversations; only the assistant's turns are noised and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2d_core.config import TrainConfig, build
from a2d_core.stages import training


def run(
    config: TrainConfig,
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    seed: int = 0,
    processes: int = 1,
    resume_from: str | None = None,
) -> dict[str, Any]:
    """Train on `config.dataset`; write `metrics.jsonl`, `checkpoint-N` and `checkpoint-final` below `output_dir`.

    `processes` > 1 trains with DDP on this machine. `resume_from`: a `checkpoint-N` directory of the same run.
    Returns the held-out NELBO (nats per token), tokens per second, steps, peak memory, and how many conversations
    were dropped for which reason.
    """
    return training.run("sft", config, model_dir, output_dir, seed=seed, processes=processes, resume_from=resume_from)


def work(values: dict[str, Any], model_dir: str, output_dir: str, seed: int, resume_from: str | None) -> dict[str, Any]:
    """What each process does."""
    import torch
    from accelerate import PartialState

    from a2d_core import data, models, trainer

    config = build(TrainConfig, values, "sft")
    model = models.load(model_dir, dtype=torch.float32)
    trainer.check_fits(model, config)
    tokenizer, block_size = model.tokenizer, model.objective.block_size
    with PartialState().main_process_first():  # the others find what the first has cached
        parts = data.load_conversations(config.dataset, config, seed)
        (train_rows, dropped), (eval_rows, _) = (data.conversation_rows(part, tokenizer, config.max_length, block_size) for part in parts)
    held_out = eval_rows.select(range(min(config.max_eval_rows, len(eval_rows))))
    fill: trainer.Fill = "block" if block_size else "batch"
    collate = data.DiffusionCollator(
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        fill_token_id=tokenizer.eos_token_id,
        fill_to=fill,
        block_size=block_size,
    )
    metrics = trainer.fit(
        model, config, train_rows, held_out, collate, output_dir, stage="sft", seed=seed, fill=fill, resume_from=resume_from
    )
    return {"train_rows": len(train_rows), "eval_rows": len(held_out), "dropped": dropped, **metrics}
