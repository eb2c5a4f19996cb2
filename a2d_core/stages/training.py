"""What pretrain and sft share: look before the work, run it in one process or several, say what to do about full memory."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from a2d_core import launch
from a2d_core.config import TrainConfig, build, to_dict
from a2d_core.stages import checks


def run(
    stage: str,
    config: TrainConfig,
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    seed: int,
    processes: int,
    resume_from: str | None,
    objective: str | None,
) -> dict[str, Any]:
    """Train in each of `processes` processes on the rows that the stage's module prepares; return what the first one returns."""
    checks.room_for_checkpoints(config, model_dir, output_dir)
    call = {
        "stage": stage,
        "values": to_dict(config),
        "model_dir": str(model_dir),
        "output_dir": str(output_dir),
        "seed": seed,
        "resume_from": resume_from,
        "objective": objective,
    }
    with checks.memory_advice(stage, config):
        return launch.run("a2d_core.stages.training:work", call, processes=processes)


def work(
    stage: str, values: dict[str, Any], model_dir: str, output_dir: str, seed: int, resume_from: str | None, objective: str | None
) -> dict[str, Any]:
    """What each process does; `prepare` of the stage's module makes the rows, and says how they are filled."""
    import torch
    from accelerate import PartialState

    from a2d_core import data, models, trainer

    config = build(TrainConfig, values, stage)
    model = models.load(model_dir, objective=objective, dtype=torch.float32)
    trainer.check_fits(model, config)
    with PartialState().main_process_first():  # the others find what the first has cached
        train_rows, eval_rows, fill, facts = import_module(f"a2d_core.stages.{stage}").prepare(config, model, seed)
    held_out = eval_rows.select(range(min(config.max_eval_rows, len(eval_rows))))
    collate = data.DiffusionCollator(model.objective, model.eos_token_id, fill)
    metrics = trainer.fit(
        model, config, train_rows, held_out, collate, output_dir, stage=stage, seed=seed, fill=fill, resume_from=resume_from
    )
    sizes = {"train_rows": len(train_rows)} if not config.streaming else {}  # a stream has no length
    return {**sizes, "eval_rows": len(held_out), **facts, **metrics}
