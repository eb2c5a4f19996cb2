"""Two processes train as one with the doubled batch does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from a2d_core import embedded, models
from a2d_core.config import ConvertConfig, TrainConfig
from a2d_core.stages import convert, pretrain, sft

CONFIG = TrainConfig(
    max_length=64, max_steps=4, batch_size=4, precision="float32", eval_every=4, save_every=4, log_every=1, max_eval_rows=6
)


@pytest.mark.parametrize("stage", [pretrain, sft], ids=["pretrain", "sft"])
@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_two_processes_equal_one_with_the_doubled_batch(stage: ModuleType, objective: str, tmp_path: Path) -> None:
    convert.run(ConvertConfig(model="embedded:smoke", block_size=8), objective, tmp_path / "converted")
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text("".join(json.dumps(row) + "\n" for row in embedded.instructions("train", 80)))
    config = replace(CONFIG, dataset="embedded:corpus" if stage is pretrain else str(conversations), gradient_accumulation_steps=2)
    two = stage.run(config, tmp_path / "converted", tmp_path / "two", processes=2)
    one = stage.run(replace(config, batch_size=8), tmp_path / "converted", tmp_path / "one", processes=1)
    histories = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("two", "one")]
    for key in ("loss", "eval_nelbo"):
        a, b = ([row[key] for row in history if key in row] for history in histories)
        assert a == pytest.approx(b, rel=1e-5), key
    weights = [models.load(tmp_path / name / "checkpoint-final").network.state_dict() for name in ("two", "one")]
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-5
    assert two["steps"] == one["steps"] == 4 and torch.isfinite(torch.tensor(two["eval_nelbo"]))
