"""Which checkpoints stay: the newest, the best by held-out NELBO, and the final one; there is always one to go on from."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from families import byte_model

from a2d_core import checkpoints, models, trainer
from a2d_core.config import TrainConfig
from a2d_core.data import DiffusionCollator

CONFIG = TrainConfig(
    max_length=16, max_steps=8, batch_size=4, learning_rate=3e-2, lr_scheduler="constant", warmup_ratio=0.0,
    precision="float32", eval_every=1.0, save_every=1.0, log_every=2, keep_checkpoints=2,
)  # fmt: skip


def save(folder, step, *, is_whole=True):
    with checkpoints.whole(folder / f"checkpoint-{step}") as room:
        (room / "weights").write_text(str(step))
    if not is_whole:
        (folder / f"checkpoint-{step}" / "weights").write_text("torn off" * step)


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_and_the_best_of_all_stay_whatever_the_order_of_scores_and_damage(seed, tmp_path):
    draw, history, whole = random.Random(seed), [], []
    keep = draw.randint(1, 3)
    for step in range(1, 13):
        is_whole, is_scored = draw.random() < 0.8, draw.random() < 0.7
        history += [
            {"step": step, "loss": 1.0},
            *([{"step": step, "eval_nelbo": draw.choice([0, 1, 2, 3, math.nan])}] if is_scored else []),
        ]
        save(tmp_path, step, is_whole=is_whole)
        whole += [step] if is_whole else []
        checkpoints.prune(tmp_path, keep, step, history)
        scores = {row["step"]: row["eval_nelbo"] for row in history if row["step"] in whole and row.get("eval_nelbo", math.nan) >= 0}
        best = [step for step in scores if scores[step] == min(scores.values())][-1:]
        assert set(checkpoints.steps(tmp_path)) == {*whole[-keep:], *best}
        assert checkpoints.newest(tmp_path) == (tmp_path / f"checkpoint-{whole[-1]}" if whole else None)


def test_what_an_earlier_run_left_beyond_the_step_stays(tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, 1, 3, [{"step": 9, "eval_nelbo": 2.0}, {"step": 1, "eval_nelbo": 1.0}])
    assert set(checkpoints.steps(tmp_path)) == {1, 3, 9}


def train(folder, config=CONFIG, resume_from=None):
    """Training on one letter, which makes all others less likely: the held-out NELBO is best at the beginning."""
    model = byte_model()
    generator = torch.Generator().manual_seed(3)
    held_out = [{"input_ids": torch.randint(97, 122, (16,), generator=generator).tolist(), "row": i} for i in range(4)]
    rows = [{"input_ids": [97] * 16, "row": i} for i in range(40)]
    trainer.fit(
        model, config, rows, held_out, DiffusionCollator(model.objective, model.eos_token_id), folder, stage="sft", resume_from=resume_from
    )


def scores(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval_nelbo"] for row in rows if "eval_nelbo" in row}


def test_a_training_that_gets_worse_keeps_its_best_checkpoint_also_when_it_is_resumed(tmp_path):
    train(tmp_path, replace(CONFIG, max_steps=5))
    best = min(scores(tmp_path), key=scores(tmp_path).get)
    assert best < 4, "the training was to get worse"
    assert set(checkpoints.steps(tmp_path)) == {best, 4, 5}
    state = tmp_path / "checkpoint-5" / "trainer_state.json"
    train(tmp_path, resume_from=str(tmp_path / "checkpoint-4"))
    assert min(scores(tmp_path), key=scores(tmp_path).get) == best
    assert set(checkpoints.steps(tmp_path)) == {best, 7, 8} and not state.exists()
    assert (tmp_path / "checkpoint-final").is_dir()
    kept = models.load(tmp_path / f"checkpoint-{best}")
    assert kept.network.config.a2d["chain"][-1]["step"] == best
