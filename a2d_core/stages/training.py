"""What pretrain and sft share: look before the work, run it in one process or several, say what to do about full memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2d_core import launch
from a2d_core.config import TrainConfig, to_dict
from a2d_core.stages import checks


def run(
    stage: str, config: TrainConfig, model_dir: str | Path, output_dir: str | Path, *, seed: int, processes: int, resume_from: str | None
) -> dict[str, Any]:
    """Call `work` of the stage's module in each of `processes` processes, and return what the first one returns."""
    checks.room_for_checkpoints(config, model_dir, output_dir)
    call = {"values": to_dict(config), "model_dir": str(model_dir), "output_dir": str(output_dir), "seed": seed, "resume_from": resume_from}
    with checks.memory_advice(stage, config):
        return launch.run(f"a2d_core.stages.{stage}:work", call, processes=processes)
