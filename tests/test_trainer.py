"""Training: one gradient whatever the split into micro-batches, exact resume, honest evaluation."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from families import byte_model

from a2d_core import embedded, models, trainer
from a2d_core.config import TrainConfig, UserError
from a2d_core.data import DiffusionCollator

CONFIG = TrainConfig(
    max_length=16,
    max_steps=4,
    batch_size=8,
    learning_rate=1e-3,
    precision="float32",
    eval_every=2,
    save_every=2,
    log_every=1,
    lr_scheduler="constant",
)


def text_rows(count: int = 64, length: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(97, 122, (length,), generator=generator).tolist(), "row": i} for i in range(count)]


def answer_rows(count: int = 64) -> list[dict[str, Any]]:
    """Rows of different lengths with a prompt of three to eight tokens."""
    rows = []
    for i, row in enumerate(text_rows(count)):
        ids, prompt = [*row["input_ids"][: 10 + i % 5], embedded.build_tokenizer().eos_token_id], 3 + i % 6
        rows.append({"input_ids": ids, "turn": [0] * prompt + [1] * (len(ids) - prompt), "row": i})
    return rows


def run(
    tmp_path: Path, config: TrainConfig = CONFIG, *, objective: str = "bd3lm", rows: Any = None, fill: trainer.Fill = None, **options: Any
) -> tuple[models.DiffusionModel, dict[str, Any]]:
    model = byte_model(objective)
    collate = DiffusionCollator(model.objective, model.eos_token_id, fill)
    rows = rows or Dataset.from_list(text_rows())
    metrics = trainer.fit(model, config, rows, list(rows)[:10], collate, tmp_path, stage="pretrain", fill=fill, **options)
    return model, metrics


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def distance(a: models.DiffusionModel, b: models.DiffusionModel) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("kind", ["text", "answers"])
def test_gradient_accumulation_4x2_equals_1x8(objective: str, kind: str, tmp_path: Path) -> None:
    rows, fill = (text_rows(), None) if kind == "text" else (answer_rows(), "batch" if objective == "mdlm" else "block")
    whole, _ = run(tmp_path / "a", objective=objective, rows=rows, fill=fill)
    parts, _ = run(tmp_path / "b", replace(CONFIG, batch_size=2, gradient_accumulation_steps=4), objective=objective, rows=rows, fill=fill)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    assert distance(whole, parts) < 2e-4 and distance(whole, byte_model(objective)) > 1e-3


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(at: int, group_by_length: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=6, views=2, batch_size=4, gradient_accumulation_steps=4, group_by_length=group_by_length)
    straight, metrics = run(tmp_path / "straight", config)
    shutil.copytree(tmp_path / "straight" / f"checkpoint-{at}", tmp_path / "resumed" / f"checkpoint-{at}") if at == 4 else None
    if at == 2:  # keep_checkpoints=2 has deleted it: make it again
        run(tmp_path / "resumed", replace(config, max_steps=2))
        state = tmp_path / "resumed" / "checkpoint-2" / "trainer_state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "max_steps": 6}))
    resumed, again = run(tmp_path / "resumed", config, resume_from=str(tmp_path / "resumed" / f"checkpoint-{at}"))
    assert distance(straight, resumed) == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert {k: v for k, v in metrics.items() if "eval" in k} == {k: v for k, v in again.items() if "eval" in k}


def test_grouping_by_length_pads_less_and_keeps_every_row() -> None:
    lengths = [3 + i * 7 % 50 for i in range(96)]
    sampler = trainer.LengthGroups(lengths, 8, seed=0)
    orders = []
    for epoch in (0, 0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == list(range(96))

    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 96, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(orders[0]) < padding(list(range(96))) / 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_was_complete_is_not_trained_further_and_scores_the_same(
    precision: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    config = replace(CONFIG, precision=precision)
    straight, scored = run(tmp_path / "a", config)
    again, metrics = run(tmp_path / "b", config, resume_from=str(tmp_path / "a" / "checkpoint-4"))
    assert distance(straight, again) == 0 and metrics["steps"] == 4
    assert metrics["eval_nelbo"] == scored["eval_nelbo"]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_final_checkpoint_is_a_diffusion_checkpoint_with_its_history(tmp_path: Path) -> None:
    model, _ = run(tmp_path)
    loaded = models.load(tmp_path / "checkpoint-final")
    assert distance(model, loaded) == 0
    record = loaded.spec.chain[-1]
    assert record["stage"] == "pretrain" and record["config"]["max_steps"] == 4
    assert not list((tmp_path / "checkpoint-final").glob("*.bin")) and (tmp_path / "checkpoint-final" / "model.safetensors").exists()


@pytest.mark.parametrize("views", [1, 3])
def test_more_views_are_scored_at_the_same_scale(views: int, tmp_path: Path) -> None:
    """A uniform model's loss is log(V - 1) x the mean of w(t) x (share masked), which is one in expectation for any K."""
    config = replace(CONFIG, max_steps=1, views=views, batch_size=64, learning_rate=1e-9, t_min=0.3)
    model = byte_model("mdlm")
    with torch.no_grad():
        model.network.get_output_embeddings().weight.zero_()
    collate = DiffusionCollator(model.objective, model.eos_token_id)
    trainer.fit(model, config, text_rows(), text_rows(8), collate, tmp_path, stage="pretrain")
    assert losses(tmp_path)[0] == pytest.approx(math.log(model.network.config.vocab_size - 1), rel=0.1)


def test_a_complementary_pair_scores_every_maskable_token_once_at_the_scale_of_the_nelbo() -> None:
    config = replace(CONFIG, views=4, complementary=True)
    maskable = torch.rand(300, 16, generator=torch.Generator().manual_seed(0)) < 0.7
    t, is_masked = trainer.corrupt(
        config, 0, 0, torch.arange(300), (torch.arange(16) // 4).expand(300, -1), maskable, total_rows=300, chunks=4
    )
    assert torch.equal(is_masked[:2] ^ is_masked[2:], maskable.expand(2, -1, -1)) and not (is_masked[:2] & is_masked[2:]).any()
    share = (is_masked / t).sum((1, 2)) / maskable.sum()  # E[w(t) x masked] is one for each view
    assert torch.allclose(share, torch.ones(4), atol=0.1)


def test_complementary_views_that_do_not_pair_are_refused() -> None:
    with pytest.raises(UserError, match="needs an even number of views, not 3"):
        replace(CONFIG, views=3, complementary=True)


def test_evaluation_reports_the_nelbo_with_and_without_the_fill(tmp_path: Path) -> None:
    _, metrics = run(tmp_path, rows=answer_rows(), fill="block")
    assert metrics["eval_nelbo"] > 0 and metrics["eval_nelbo_stderr"] > 0
    assert metrics["eval_nelbo_answer"] != metrics["eval_nelbo"]
    assert metrics["eval_perplexity_bound"] == pytest.approx(2.718281828 ** metrics["eval_nelbo"], rel=1e-4)


def test_the_standard_error_of_one_held_out_row_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = byte_model()
    collate = DiffusionCollator(model.objective, model.eos_token_id)
    metrics = trainer.fit(model, CONFIG, text_rows(), text_rows(1), collate, tmp_path, stage="pretrain")
    assert metrics["eval_nelbo"] > 0 and "eval_nelbo_stderr" not in metrics
    assert f"held-out NELBO {metrics['eval_nelbo']:.4f} nats per token" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    model = byte_model()
    with torch.no_grad():
        model.network.model.norm.weight.fill_(torch.nan)
    collate = DiffusionCollator(model.objective, model.eos_token_id)
    with pytest.raises(UserError, match=r"the loss became nan at step 1: lower learning_rate=0.001"):
        trainer.fit(model, CONFIG, text_rows(), text_rows(8), collate, tmp_path, stage="pretrain")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1024, "max_length=1024 needs .* the model's context is 128"),
        (18, "max_length=18 is not a multiple.*block_size=4: use 16"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused_before_training(length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer.check_fits(byte_model(), replace(CONFIG, max_length=length))


def test_bfloat16_training_keeps_float32_weights(tmp_path: Path) -> None:
    model, metrics = run(tmp_path, replace(CONFIG, precision="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and metrics["train_loss"] > 0
