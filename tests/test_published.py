"""Checkpoints in the published A2D format (made here, tiny): they are read, used, trained, and written again, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import network
from safetensors import safe_open

from a2d_core import __main__ as cli
from a2d_core import conversion, embedded, harness, models
from a2d_core.config import ConvertConfig, UserError
from a2d_core.stages import checks

MASK = "<|mask|>"


def publish(folder: Path, family: str = "qwen3", *, has_mask: bool = True, spare: int = 3, **changes) -> Path:
    """Write what `convert` and training of the published code write: the weights of the family, and another model type."""
    tokenizer = embedded.build_tokenizer()
    rows = len(tokenizer) + 1 + spare
    if has_mask:
        tokenizer.add_special_tokens({"mask_token": MASK})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False)
    network(family, vocab_size=rows, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **changes).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    name = f"A2D{family.capitalize()}LMHeadModel"
    published = {"model_type": f"a2d-{family}", "architectures": [name], "auto_map": {"AutoConfig": f"modeling_{family}.Config"}}
    (folder / "config.json").write_text(json.dumps({**config, **published}))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_published_checkpoint_is_read_with_its_conventions(family, tied, tmp_path):
    folder = publish(tmp_path, family, tie_word_embeddings=tied)
    model = models.load(folder, objective="bd3lm")
    assert type(model.network).__name__ == {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family] + "ForCausalLM"
    assert (model.spec.objective, model.spec.block_size, model.spec.block_origin) == ("bd3lm", 32, "prompt_end")
    assert model.tokenizer.convert_ids_to_tokens(model.spec.mask_token_id) == MASK
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.stop_token_ids
    state = model.network.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights(folder).items())
    conversion.prove(model)


def test_its_objective_has_to_be_said(tmp_path):
    folder = publish(tmp_path)
    assert checks.read_spec(folder)["objective"] is None
    with pytest.raises(UserError, match="does not say what it was trained for: add --objective mdlm or --objective bd3lm"):
        models.load(folder)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    models.load(publish(tmp_path / "a"), objective="mdlm").save(tmp_path / "b")
    with pytest.raises(UserError, match="is a checkpoint for mdlm, not for bd3lm: ask for mdlm"):
        models.load(tmp_path / "b", objective="bd3lm")


def test_a_head_of_its_own_is_kept_although_the_configuration_says_tied(tmp_path):
    folder = publish(tmp_path / "a", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    head = weights(folder)["lm_head.weight"]
    model = models.load(folder, objective="mdlm")
    model.save(tmp_path / "b")
    assert torch.equal(models.load(tmp_path / "b").network.lm_head.weight, head)


def test_a_mask_token_that_its_tokenizer_lacks_has_the_first_id_behind_it(tmp_path):
    folder = publish(tmp_path, has_mask=False)
    before = weights(folder)["model.embed_tokens.weight"]
    model = models.load(folder, objective="mdlm")
    assert model.spec.mask_token_id == len(embedded.build_tokenizer()) + 1  # behind <|im_end|>
    assert torch.equal(model.network.get_input_embeddings().weight, before)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_an_export_is_read_back_to_the_bit(family, tmp_path):
    tokenizer = embedded.build_tokenizer()
    network(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, dtype=torch.bfloat16).save_pretrained(tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "s")
    conversion.convert(ConvertConfig(block_size=4), "bd3lm", tmp_path / "s", tmp_path / "ours")
    ours = models.load(tmp_path / "ours")
    assert cli.main(["export", "--model", str(tmp_path / "ours"), "--output-dir", str(tmp_path / "theirs")]) == 0
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == f"a2d-{family}" and config["architectures"] == [f"A2D{family.capitalize()}LMHeadModel"]
    back = models.load(tmp_path / "theirs")
    assert back.spec == ours.spec and back.stop_token_ids == ours.stop_token_ids and back.stored_dtype == ours.stored_dtype
    assert back.tokenizer.get_vocab() == ours.tokenizer.get_vocab() and back.tokenizer.mask_token == ours.tokenizer.mask_token
    back.save(tmp_path / "again")
    first, second, third = (weights(tmp_path / name) for name in ("ours", "theirs", "again"))
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(weight, second[name]) and torch.equal(weight, third[name]) for name, weight in first.items())


def test_a_family_that_the_format_lacks_is_not_exported(tmp_path):
    tokenizer = embedded.build_tokenizer()
    network("gpt2", vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "s")
    model = conversion.convert(ConvertConfig(), "mdlm", tmp_path / "s", tmp_path / "ours")
    with pytest.raises(UserError, match="none for model_type 'gpt2'"):
        model.export(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_convert_says_what_a_published_checkpoint_does_not_and_keeps_its_mask_token(tmp_path):
    folder = publish(tmp_path / "a", has_mask=False)
    model = conversion.convert(ConvertConfig(block_size=8), "bd3lm", folder, tmp_path / "b")
    assert (model.spec.block_size, model.spec.block_origin) == (8, "prompt_end")
    assert all(torch.equal(weight, weights(tmp_path / "b")[name]) for name, weight in weights(folder).items())
    with pytest.raises(UserError, match="is a diffusion checkpoint already"):
        conversion.convert(ConvertConfig(), "bd3lm", tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_it_is_sampled_evaluated_and_trained_like_ours(objective, tmp_path, capsys):
    folder = publish(tmp_path / "a", max_position_embeddings=512)
    options = ["--model", str(folder), "--objective", objective, "--preset", "smoke"]
    assert cli.main(["sample", *options, "--output-dir", str(tmp_path / "b"), "--set", "max_new_tokens=8", "--prompt", "hi"]) == 0
    assert cli.main(["sft", *options, "--output-dir", str(tmp_path / "c"), "--set", "max_steps=1"]) == 0
    trained = models.load(tmp_path / "c" / "checkpoint-final")
    assert trained.spec.objective == objective and trained.spec.block_origin == "prompt_end"
    lm = {"mdlm": harness.MDLM, "bd3lm": harness.BD3LM}[objective](pretrained=folder)
    assert lm.model.spec.objective == objective
    capsys.readouterr()
    assert cli.main(["sample", "--model", str(folder), "--output-dir", str(tmp_path / "d")]) == 2
    assert "add --objective mdlm or --objective bd3lm" in capsys.readouterr().err


def test_it_is_not_taken_for_output_of_ours_that_may_be_overwritten(tmp_path):
    folder = publish(tmp_path)
    with pytest.raises(UserError, match="does not look like the output of a stage"):
        checks.output_directory(folder, overwrite=True)
