"""What a later stage would refuse is refused before the first one trains."""

import families
import pytest

from a2d_core import presets
from a2d_core.config import UserError
from a2d_core.stages import preflight

OFF = ("pretrain.enabled=false", "sft.enabled=false", "evaluate.enabled=false")


def recipe(*overrides):
    return presets.resolve(presets.read("smoke"), "bd3lm", overrides)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with a context of 128 positions."""
    folder = tmp_path_factory.mktemp("checkpoint")
    families.byte_model("bd3lm", block_size=8).save(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrain.dataset=none.txt"], "'none.txt' does not exist"),
        (["sft.dataset=none.jsonl"], "'none.jsonl' does not exist"),
        (["sft.dataset=embedded:corpse"], "embedded:corpse"),
        (["evaluate.text_dataset=none.txt"], "'none.txt' does not exist"),
        (["evaluate.tasks=a2d_word"], "a2d_word"),
    ],
)
def test_data_and_tasks_are_looked_for_unless_their_stage_is_off(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preflight.inputs(recipe())
    with pytest.raises(UserError, match=message):
        preflight.inputs(recipe(*overrides))
    preflight.inputs(recipe(*overrides, *OFF))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrain.max_length=256"], r"max_length=256 needs 256 positions, but the model's context is 128"),
        (["sft.max_length=256"], r"max_length=256 needs 256 positions, but the model's context is 128"),
        (["evaluate.text_length=256"], r"evaluate\.text_length=256 needs 256 positions, but the model's context is 128"),
    ],
)
def test_lengths_must_fit_the_converted_model(overrides, message, checkpoint):
    preflight.checkpoint(recipe(), checkpoint)
    with pytest.raises(UserError, match=message):
        preflight.checkpoint(recipe(*overrides), checkpoint)
    preflight.checkpoint(recipe(*overrides, *OFF), checkpoint)


def test_sft_needs_a_chat_template(tmp_path):
    model = families.byte_model("bd3lm", block_size=8)
    model.tokenizer.chat_template = None
    model.save(tmp_path)
    with pytest.raises(UserError, match="no chat template: sft needs one"):
        preflight.checkpoint(recipe(), tmp_path)
    preflight.checkpoint(recipe("sft.enabled=false"), tmp_path)
