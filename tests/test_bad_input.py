"""Bad input: what is wrong with a checkpoint is said in one sentence, with the remedy."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from families import network
from safetensors.torch import load_file, save_file

from a2d_core import __main__ as cli
from a2d_core import conversion, embedded, models, reading
from a2d_core.config import ConvertConfig, UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a tiny autoregressive Qwen3."""
    tokenizer = embedded.build_tokenizer()
    made = network(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False)
    made.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path, message: str, **options) -> None:
    """It is refused with this message, in one line, by convert, and nothing is left behind."""
    with pytest.raises(UserError, match=message) as error:
        conversion.convert(ConvertConfig(**options), "mdlm", source, source.parent / "out")
    assert "\n" not in str(error.value) and not (source.parent / "out").exists()


def weights(source: Path) -> Path:
    return source / "model.safetensors"


@pytest.mark.parametrize("kept", [4, 100, 5000], ids=["no header", "half a header", "half the weights"])
def test_damaged_weights_are_named(source, kept):
    weights(source).write_bytes(weights(source).read_bytes()[:kept])
    refused(source, r"model.safetensors' is damaged .*: download or copy it again")


def test_weights_that_are_missing_are_not_drawn_at_random(source):
    state = load_file(weights(source))
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights(source), metadata={"format": "pt"})
    refused(source, r"lacks 1 weight.*model.layers.1.mlp.up_proj.weight.*download or copy it again")


def test_weights_of_another_shape_are_not_replaced(source):
    state = load_file(weights(source))
    state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
    save_file(state, weights(source), metadata={"format": "pt"})
    refused(source, "weights of other shapes than its config.json says")


def test_a_missing_shard_is_named(source):
    made = network(vocab_size=len(embedded.build_tokenizer()))
    weights(source).unlink()
    made.save_pretrained(source, max_shard_size="20KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refused(source, f"lacks {shards[1].name}, which model.safetensors.index.json names: download or copy it again")
    (source / "model.safetensors.index.json").write_text("{")
    refused(source, "model.safetensors.index.json' is damaged")


def test_a_directory_without_weights_says_so(source):
    weights(source).unlink()
    refused(source, r"has no weights: there is no \*.safetensors file")


def test_a_missing_tokenizer_is_named(source):
    for path in source.glob("tokenizer*"):
        path.unlink()
    refused(source, r"has no tokenizer.*put the tokenizer's files beside the weights \(tokenizer.json and tokenizer_config.json\)")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_configuration_is_named(source, text):
    (source / "config.json").write_text(text)
    refused(source, r"config.json' is damaged .*: download or copy it again")


def test_pickles_are_refused_unless_they_are_allowed(source):
    state = load_file(weights(source))
    weights(source).unlink()
    torch.save(state, source / "pytorch_model.bin")
    refused(source, r"weights as pickles \(pytorch_model.bin\).*convert.allow_pickle=true")
    conversion.convert(ConvertConfig(allow_pickle=True), "mdlm", source, source.parent / "out")
    assert torch.equal(models.load(source.parent / "out").network.lm_head.weight[: len(state["lm_head.weight"])], state["lm_head.weight"])


def test_a_pickle_that_runs_code_does_not_run_even_where_it_is_allowed(source):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (source / "harmed",))

    weights(source).unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    refused(source, "pickles")
    refused(source, "cannot load", allow_pickle=True)
    assert not (source / "harmed").exists()


def test_remote_code_is_refused_unless_it_is_allowed(source):
    config = json.loads((source / "config.json").read_text())
    remote = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}}
    (source / "config.json").write_text(json.dumps({**config, **remote}))
    (source / "mine.py").write_text(
        "from pathlib import Path\nfrom transformers import Qwen3Config, Qwen3ForCausalLM\n"
        f"Path({str(source / 'ran')!r}).touch()\n"
        "class MyConfig(Qwen3Config):\n    model_type = 'mine'\n"
        "class MyModel(Qwen3ForCausalLM):\n    config_class = MyConfig\n"
    )
    refused(source, "Python code of its own.*read it, and if you trust it.*convert.trust_remote_code=true")
    assert not (source / "ran").exists()
    model = conversion.convert(ConvertConfig(trust_remote_code=True), "mdlm", source, source.parent / "out")
    assert type(model.network).__name__ == "MyModel" and (source / "ran").exists()


def test_an_unknown_model_type_says_which_transformers_there_is(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "of_tomorrow"}))
    refused(source, r"model type that transformers \d.* does not know: upgrade transformers")


def test_the_command_line_ends_with_the_message_alone(source, capsys):
    weights(source).write_bytes(b"x" * 20)
    assert cli.main(["convert", "--model", str(source), "--output-dir", str(source.parent / "out")]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_several_models_in_one_are_refused_by_name():
    from transformers import CONFIG_MAPPING

    with pytest.raises(UserError, match=r"'gemma3' is made of several models \(text_config, vision_config\)"):
        reading.refuse_unsupported(CONFIG_MAPPING["gemma3"]())
