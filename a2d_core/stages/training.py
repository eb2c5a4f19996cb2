"""What pretrain and sft share: look before the work, run it in one process or several, say what to do about full memory."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from a2d_core import checkpoints, launch
from a2d_core.config import TrainConfig, require
from a2d_core.settings import build, to_dict
from a2d_core.stages import checks


def run(
    stage: str,
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

    `processes` of this node share the training by `strategy`; of several `nodes` each calls this. Where they do not share their
    files, node 0 gets the weights, and every node its part of a checkpoint; what they resume from must be all parts together.
    `resume_from`: a `checkpoint-N` directory of the same run. The rows are those that the stage's module prepares.
    Returns the held-out NELBO (nats per token), tokens per second, steps, peak memory, and how many documents or assistant
    turns were dropped for which reason.
    """
    if resume_from:
        checkpoints.check(Path(resume_from))
    checks.room_for_checkpoints(config, model_dir, output_dir)
    call = {
        "stage": stage,
        "values": to_dict(config),
        "model_dir": str(model_dir),
        "output_dir": str(output_dir),
        "seed": seed,
        "resume_from": resume_from,
        "objective": objective,
        "share_files": nodes.share_files,
    }
    paths = ("model_dir", "output_dir", "resume_from")
    with checks.memory_advice(stage, config):
        facts = launch.run("a2d_core.stages.training:work", call, processes=processes, strategy=strategy, nodes=nodes, paths=paths)
    if nodes.rank > 0:
        return facts
    return {**facts, "weights_sha256": checkpoints.digest(Path(output_dir, "checkpoint-final"), as_sealed=True)}


def work(
    stage: str,
    values: dict[str, Any],
    model_dir: str,
    output_dir: str,
    seed: int,
    resume_from: str | None,
    objective: str | None,
    share_files: bool,
) -> dict[str, Any]:
    """What each process does; `prepare` of the stage's module makes the rows, and says how they are filled.

    Raises `UserError` where model, data and strategy do not go together.
    """
    import torch
    from accelerate import PartialState

    from a2d_core import data, models, trainer

    config = build(TrainConfig, values, stage)
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    require(
        not (is_sharded and config.lora_rank),
        f"{stage}.lora_rank={config.lora_rank} does not fit strategy fsdp2: adapters are small, and ddp or zero2 trains them",
    )
    dtype = None if config.lora_rank else torch.float32  # frozen weights may stay as they are
    model = models.load(model_dir, objective=objective, dtype=dtype, device="cpu" if is_sharded else None)  # a GPU gets its own part alone
    trainer.check_fits(model, config)
    state = PartialState()
    with state.main_process_first() if share_files else state.local_main_process_first():  # the others find what the first has cached
        train_rows, eval_rows, fill, facts = import_module(f"a2d_core.stages.{stage}").prepare(config, model, seed)
    held_out = eval_rows.select(range(min(config.max_eval_rows, len(eval_rows))))
    collate = data.DiffusionCollator(model.objective, model.eos_token_id, fill)
    metrics = trainer.fit(
        model, config, train_rows, held_out, collate, output_dir,
        stage=stage, seed=seed, fill=fill, resume_from=resume_from, share_files=share_files,
    )  # fmt: skip
    sizes = {"train_rows": len(train_rows), "data_digest": data.digest(train_rows)} if not config.streaming else {}  # a stream has no end
    return {**sizes, "eval_rows": len(held_out), **facts, **metrics}
