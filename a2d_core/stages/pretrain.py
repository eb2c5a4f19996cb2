"""Pretrain: continue the pretraining of a converted checkpoint on text, with the diffusion objective."""

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
    Returns the held-out NELBO (nats per token), tokens per second, steps, and peak memory.
    """
    return training.run("pretrain", config, model_dir, output_dir, seed=seed, processes=processes, resume_from=resume_from)


def work(values: dict[str, Any], model_dir: str, output_dir: str, seed: int, resume_from: str | None) -> dict[str, Any]:
    """What each process does."""
    import torch
    from accelerate import PartialState

    from a2d_core import data, models, trainer

    config = build(TrainConfig, values, "pretrain")
    model = models.load(model_dir, dtype=torch.float32)
    trainer.check_fits(model, config)
    tokenizer = model.tokenizer
    with PartialState().main_process_first():  # the others find what the first has cached
        texts = data.load_documents(config.dataset, config, seed)
        rows = [data.pretraining_rows(part, tokenizer, config.text_field, config.max_length, config.insert_eos) for part in texts]
    held_out = rows[1].select(range(min(config.max_eval_rows, len(rows[1]))))
    collate = data.DiffusionCollator(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, fill_token_id=tokenizer.eos_token_id)
    metrics = trainer.fit(model, config, rows[0], held_out, collate, output_dir, stage="pretrain", seed=seed, resume_from=resume_from)
    return {"train_rows": len(rows[0]), "eval_rows": len(held_out), **metrics}
