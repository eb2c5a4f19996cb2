"""LoRA: few weights are trained, the merged model is the trained one, and a run can be resumed to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import byte_model, convert_both, diffusion_model, save_source
from test_trainer import CONFIG, losses, text_rows

from a2d_core import embedded, lora, models, trainer
from a2d_core.__main__ import main
from a2d_core.attention import Slots
from a2d_core.config import SampleConfig, TrainConfig, UserError
from a2d_core.data import DiffusionCollator
from a2d_core.stages import checks, sample, sft

LORA = replace(CONFIG, lora_rank=4, learning_rate=1e-2)
MASK_ID = 99


def outputs(model: models.DiffusionModel) -> torch.Tensor:
    """Logits of a canvas with mask tokens, without the mask token's own."""
    ids = torch.randint(3, 95, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 5:] = model.spec.mask_token_id
    position = torch.arange(12).expand(2, -1)
    slots = Slots.clean(position, torch.zeros_like(position))
    with torch.no_grad():
        return model.logits(model.hidden(ids, slots))[..., : model.spec.mask_token_id]


def saved(folder: Path, family: str = "qwen3", **changes: object) -> models.DiffusionModel:
    """A random diffusion model in `folder`, loaded from there."""
    diffusion_model("mdlm", family=family, **changes).save(folder, {"stage": "convert"})
    return models.load(folder, device="cpu")


def attached(model: models.DiffusionModel, config: TrainConfig = LORA) -> models.DiffusionModel:
    lora.attach(model.network, config, model.spec.mask_token_id, in_bfloat16=False)
    return model


def shaken(model: models.DiffusionModel) -> models.DiffusionModel:
    """Move what can be trained, as training would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.network.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def fit(model: models.DiffusionModel, config: TrainConfig, folder: Path, **options: str) -> models.DiffusionModel:
    collate = DiffusionCollator(model.objective, model.eos_token_id)
    trainer.fit(model, config, text_rows(), text_rows(8), collate, folder, stage="sft", **options)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    byte_model().save(tmp_path / "base", {"stage": "convert"})
    return tmp_path / "base"


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma3_text", "gpt2", "opt", "cohere", "phi3", "qwen3_moe"])
def test_merged_adapters_give_the_outputs_of_unmerged_ones_in_every_family(family: str, tmp_path: Path) -> None:
    """Tied and untied embeddings, biases, Conv1D, a scaled embedding, fused projections, experts in one tensor."""
    model = saved(tmp_path / "base", family)
    plain = outputs(model)
    attached(model)
    assert torch.equal(outputs(model), plain), "fresh adapters change nothing"
    shaken(model).save(tmp_path / "adapter", {"stage": "sft"})
    merged = models.load(tmp_path / "adapter", device="cpu")
    expected = outputs(model)
    assert (expected - plain).abs().max() > 1e-2
    assert torch.allclose(outputs(merged), expected, rtol=1e-5, atol=1e-5)
    assert not any("peft" in type(module).__module__ for module in merged.network.modules())
    merged.save(tmp_path / "merged")
    assert torch.equal(outputs(models.load(tmp_path / "merged", device="cpu")), outputs(merged))


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_embedding_only_the_mask_tokens_row_is_trained(tied: bool, tmp_path: Path) -> None:
    model = shaken(attached(saved(tmp_path / "base", tie_word_embeddings=tied)))
    model.save(tmp_path / "adapter", {"stage": "sft"})
    before, after = (models.load(tmp_path / name, device="cpu").network for name in ("base", "adapter"))
    for of in ("get_input_embeddings", "get_output_embeddings"):
        rows = (getattr(before, of)().weight != getattr(after, of)().weight).any(1).nonzero().flatten().tolist()
        assert rows == ([MASK_ID] if tied or of == "get_input_embeddings" else [])


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradients_are_those_of_the_weights_that_the_adapters_stand_for(tied: bool, exclude: bool, tmp_path: Path) -> None:
    """dL/dA = scale x B.T dL/dW, and the mask token's row has the gradient of its row in the merged embedding."""
    model = shaken(attached(saved(tmp_path / "base", tie_word_embeddings=tied)))
    model.save(tmp_path / "adapter", {"stage": "sft"})
    merged = models.load(tmp_path / "adapter", device="cpu")
    ids = torch.arange(3, 19).reshape(2, 8)
    is_masked = torch.rand(1, 2, 8, generator=torch.Generator().manual_seed(3)) < 0.6
    layout = model.objective.layout(model.objective.streams(ids, torch.ones_like(ids)), is_masked, torch.ones(1, 2, 8))
    totals = [one(layout, exclude)[0] for one in (model, merged)]
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=1e-5)
    for total in totals:
        total.backward()
    layer = model.network.model.layers[0].mlp.up_proj
    full = merged.network.model.layers[0].mlp.up_proj.weight.grad
    expected = layer.scaling["default"] * layer.lora_B["default"].weight.T @ full
    assert torch.allclose(layer.lora_A["default"].weight.grad, expected, rtol=1e-3, atol=1e-4)
    row = model.network.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].grad[0]
    assert torch.allclose(row, merged.network.get_input_embeddings().weight.grad[MASK_ID], rtol=1e-3, atol=1e-4)
    assert all((p.grad is not None) == p.requires_grad for p in model.network.parameters())


def test_lora_training_resumes_to_the_bit_from_checkpoints_that_hold_adapters_only(base: Path, tmp_path: Path) -> None:
    straight = fit(models.load(base), LORA, tmp_path / "straight")
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", checkpoint)
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    resumed = fit(models.load(base), LORA, tmp_path / "resumed", resume_from=str(checkpoint))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    finals = [models.load(tmp_path / name / "checkpoint-final") for name in ("straight", "resumed")]
    assert torch.equal(*map(outputs, finals)) and not torch.equal(outputs(finals[0]), outputs(models.load(base)))


def test_the_final_checkpoint_is_the_merged_model_in_the_precision_of_its_base(base: Path, tmp_path: Path) -> None:
    model = models.load(base)
    model.network.to(torch.bfloat16)
    model.save(base)
    trained = fit(models.load(base), LORA, tmp_path / "out")
    exact = models.load(tmp_path / "out" / "adapter", dtype=torch.float32)
    assert torch.allclose(outputs(trained), outputs(exact), rtol=1e-4, atol=1e-4)
    final = models.load(tmp_path / "out" / "checkpoint-final")
    assert {p.dtype for p in final.parameters()} == {torch.bfloat16} and [s["stage"] for s in final.spec.chain] == ["convert", "sft"]
    for name, weight in exact.network.state_dict().items():
        assert torch.equal(final.network.state_dict()[name], weight.bfloat16()), name


def test_adapters_train_merge_sample_and_evaluate_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = convert_both(save_source(tmp_path / "source", layers=1), tmp_path)["bd3lm"]
    config = TrainConfig(
        dataset="embedded:tasks", max_length=64, max_steps=2, batch_size=4, max_eval_rows=4, lora_rank=2, precision="float32"
    )
    sft.run(config, base, tmp_path / "sft", seed=0, processes=1, resume_from=None)
    assert main(["merge", "--model", str(tmp_path / "sft" / "adapter"), "--output-dir", str(tmp_path / "merged")]) == 0
    names = ("merged/model.safetensors", "sft/checkpoint-final/model.safetensors")
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1
    drawn = SampleConfig(prompts=("Reverse: abc",), max_new_tokens=8)
    texts = [sample.run(drawn, tmp_path / name, tmp_path / "samples" / name)["samples"][0]["answer"] for name in ("merged", "sft/adapter")]
    assert texts[0] == texts[1]
    assert main(["merge", "--model", str(base), "--output-dir", str(tmp_path / "no")]) == 2
    assert "holds no LoRA adapters" in capsys.readouterr().err


def test_a_base_that_was_moved_is_given_by_hand_and_another_one_is_refused(tmp_path: Path) -> None:
    attached(saved(tmp_path / "base")).save(tmp_path / "adapter", {"stage": "sft"})
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"were trained on '.*/base', which is not there: .* --base DIR"):
        models.load(tmp_path / "adapter")
    assert models.load(tmp_path / "adapter", base=tmp_path / "moved").spec.chain[-1]["stage"] == "sft"
    diffusion_model("mdlm").save(tmp_path / "other", {"stage": "another"})
    with pytest.raises(UserError, match="its history of stages is another"):
        models.load(tmp_path / "adapter", base=tmp_path / "other")


def test_layers_that_do_not_exist_are_refused_with_names_of_some_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM has no layer .*lora_targets=\['attention'\].*such as down_proj, .*q_proj"):
        attached(saved(tmp_path / "base"), replace(LORA, lora_targets=("attention",)))
    chosen = attached(saved(tmp_path / "base"), replace(LORA, lora_targets=("q_proj", "v_proj")))
    assert sum("lora_A" in name for name, _ in chosen.network.named_parameters()) == 4


@pytest.mark.parametrize(("rank", "message"), [(8, "do not fit the model .*keep lora_rank"), (0, "does not fit the model")])
def test_a_checkpoint_of_another_rank_or_of_none_is_not_resumed(rank: int, message: str, base: Path, tmp_path: Path) -> None:
    fit(models.load(base), replace(LORA, max_steps=2), tmp_path / "out")
    with pytest.raises(UserError, match=message):
        fit(models.load(base), replace(LORA, lora_rank=rank), tmp_path / "more", resume_from=str(tmp_path / "out" / "checkpoint-2"))


def test_the_disk_that_adapters_need_is_estimated_from_their_rank(base: Path) -> None:
    model = attached(models.load(base))
    trained = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    assert trained <= checks.parameters(base, LORA.lora_rank) < checks.parameters(base)


@pytest.mark.parametrize("changes", [{"lora_rank": -1}, {"lora_targets": ("q_proj",)}, {"lora_rank": 4, "lora_alpha": 0}])
def test_settings_without_meaning_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match="lora_"):
        replace(CONFIG, **changes)


def test_two_processes_train_the_adapters_that_one_does(tmp_path: Path) -> None:
    base = convert_both(save_source(tmp_path / "source", layers=1), tmp_path)["bd3lm"]
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text("".join(json.dumps(row) + "\n" for row in embedded.instructions("train", 40)))
    config = replace(LORA, dataset=str(conversations), max_length=64, batch_size=2, max_eval_rows=4, learning_rate=1e-3)
    sft.run(config, base, tmp_path / "two", seed=0, processes=2, resume_from=None)
    sft.run(replace(config, batch_size=4), base, tmp_path / "one", seed=0, processes=1, resume_from=None)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    two, one, before = (
        models.load(tmp_path / name).network.state_dict() for name in ("two/checkpoint-final", "one/checkpoint-final", base)
    )
    assert max(float((two[k] - one[k]).abs().max()) for k in one) < 1e-5 < max(float((before[k] - one[k]).abs().max()) for k in one)
