"""The recipes that need the Hub, run on tiny stand-ins of the same schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from a2d_core import models, presets
from a2d_core.stages import convert, sft


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def published_data(tmp_path: Path) -> str:
    """Twenty conversations in the schema of each data set of the published recipe; some of them are long, some are not Python."""
    talks = [
        [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": str(i)},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"{i} " * (3 + i)},
        ]
        for i in range(20)
    ]
    code = [{"instruction": f"print {i}", "output": ("```python\n" if i % 2 else "```c\n") + f"print({i})"} for i in range(20)]
    return "+".join(
        [
            write(tmp_path / "tulu-3-sft-mixture", [{"id": str(i), "messages": talk} for i, talk in enumerate(talks)]),
            write(tmp_path / "smoltalk", [{"messages": talk, "source": "x"} for talk in talks]),
            write(tmp_path / "opc-sft-stage1", code) + "[lang:python]",
            write(tmp_path / "opc-sft-stage2", code) + "[lang:python]",
        ]
    )


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_published_recipe_trains_on_stand_ins(objective: str, published_data: str, tmp_path: Path) -> None:
    recipe = presets.resolve(presets.read("published-sft"), objective)
    assert (recipe.sft.t_draws, recipe.sft.predict_mask_token, recipe.sft.schedule, recipe.sft.t_min) == (
        "per_sequence",
        True,
        "linear",
        1e-3,
    )
    assert (recipe.sft.supervise, recipe.sft.too_long, recipe.sft.group_by_length) == ("last", "truncate", True)
    step = recipe.sft.batch_size * recipe.sft.gradient_accumulation_steps * recipe.compute.train.processes
    assert (step, recipe.sft.epochs, recipe.sft.max_length) == (2048, 10, 1024 if objective == "mdlm" else 512)
    convert.run(replace(recipe.convert, model="embedded:smoke", block_size=8), objective, tmp_path / "converted")
    small = replace(
        recipe.sft, dataset=published_data, max_length=64, max_steps=2, batch_size=8, gradient_accumulation_steps=2, precision="float32",
        log_every=1, eval_every=2, save_every=2, num_workers=1,
    )  # fmt: skip
    result = sft.run(small, tmp_path / "converted", tmp_path / "sft")
    assert result["train_rows"] + result["eval_rows"] == 60 - sum(
        result["dropped"].values()
    )  # 20 + 20 + 10 + 10 conversations, one row each
    assert torch.isfinite(torch.tensor(result["eval_nelbo"])) and result["steps"] == 2
    assert models.load(tmp_path / "sft" / "checkpoint-final").spec.chain[-1]["config"]["t_draws"] == "per_sequence"
