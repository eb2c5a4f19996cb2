"""The configuration: names, types and values are checked when it is made, and a mistake is named."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2d_core import settings
from a2d_core.config import (
    ComputeConfig,
    ConvertConfig,
    EvaluateConfig,
    Recipe,
    RegisterConfig,
    SampleConfig,
    StepCompute,
    TrackingConfig,
    TrainConfig,
    UserError,
)

PARTS = [ConvertConfig, TrainConfig, SampleConfig, EvaluateConfig, RegisterConfig, TrackingConfig, StepCompute, ComputeConfig]


def small(**values) -> Recipe:
    return settings.build(Recipe, {"name": "test", "objective": "bd3lm", **values})


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_every_field_has_a_meaning(cls):
    assert set(settings.describe(cls)) == {field.name for field in dataclasses.fields(cls)}
    assert all(meaning.endswith(".") and "\n" not in meaning for meaning in settings.describe(cls).values())


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_plain_values_make_the_same_configuration_again(cls):
    assert settings.build(cls, settings.to_dict(cls())) == cls()


def test_a_recipe_survives_the_way_through_plain_values():
    recipe = small(sft={"max_steps": 7}, compute={"train": {"gpu": 2, "processes": 2}, "node_selector": {"a": "b"}})
    assert settings.build(Recipe, settings.to_dict(recipe)) == recipe


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().max_steps = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sft": {"max_step": 3}}, "unknown field 'sft.max_step': did you mean 'max_steps'"),
        ({"stf": {}}, "unknown field 'stf': did you mean 'sft'"),
        ({"sft": {"zzz": 3}}, "unknown field 'sft.zzz': choose one of enabled, dataset"),
        ({"sft": 3}, "sft is a group of fields, not 3: set sft.FIELD=VALUE"),
        ({"sft": {"max_steps": "many"}}, "sft.max_steps='many' must be of type int"),
        ({"sft": {"max_steps": True}}, "sft.max_steps=True must be of type int"),
        ({"sft": {"max_steps": 1.5}}, "sft.max_steps=1.5 must be of type int"),
        ({"sft": {"insert_eos": 1}}, "sft.insert_eos=1 must be of type bool"),
        ({"sft": {"max_steps": 0}}, "sft: max_steps must be -1 .* or at least 1, not 0"),
        ({"sft": {"schedule": "square"}}, "sft.schedule='square' is not one of linear, cosine"),
        ({"sft": {"t_min": 0.5, "t_max": 0.4}}, "t_min=0.5, t_max=0.4"),
        ({"sft": {"prompt_field": "q"}}, "go together, not prompt_field=q, response_field=None"),
        ({"sft": {"max_length": 100}}, "sft.max_length=100 is not a multiple of convert.block_size=32: use 96"),
        ({"sample": {"prompts": 3}}, "sample.prompts=3 must be a list"),
        ({"sample": {"threshold": 0}}, r"threshold must lie in \(0, 1\], not 0"),
        ({"sample": {"top_p": 1.5}}, r"top_p must lie in \(0, 1\], not 1.5"),
        ({"convert": {"right_shift": True}}, "right_shift=true does not fit bd3lm"),
        ({"convert": {"mask_token": ""}}, "mask_token must not be empty"),
        ({"compute": {"platform": "kubernetes"}}, "compute.platform=kubernetes needs compute.image"),
        ({"compute": {"platform": "slurm"}}, "compute.platform='slurm' is not one of local, kubernetes, batch"),
        ({"compute": {"train": {"gpu": 1, "processes": 2}}}, "2 processes on 1 GPUs"),
        ({"compute": {"train": {"nodes": 0}}}, "compute nodes must be at least 1, not 0"),
        ({"compute": {"generate": {"nodes": 2}}}, "compute.generate.nodes=2: only training runs on several nodes"),
        ({"objective": "ar"}, "unknown objective 'ar': choose one of mdlm, bd3lm"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_the_remedy(values, message):
    with pytest.raises(UserError, match=message):
        small(**values)


def test_whole_numbers_serve_as_fractions_and_one_text_as_a_list():
    recipe = small(sft={"epochs": 3}, sample={"prompts": "hello"})
    assert recipe.sft.epochs == 3.0
    assert isinstance(recipe.sft.epochs, float)
    assert recipe.sample.prompts == ("hello",)


def test_the_masked_objective_has_no_blocks_to_fit():
    assert settings.build(Recipe, {"name": "x", "objective": "mdlm", "sft": {"max_length": 100}}).sft.max_length == 100


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("sft.max_steps=100", ["sft", "max_steps"], 100),
        ("sft.learning_rate = 1e-4", ["sft", "learning_rate"], 1e-4),
        ("sft.enabled=false", ["sft", "enabled"], False),
        ("sft.enabled=True", ["sft", "enabled"], True),
        ("sample.threshold=none", ["sample", "threshold"], None),
        ('sample.prompts=["a=b", "c"]', ["sample", "prompts"], ["a=b", "c"]),
        ("convert.model=Qwen/Qwen3-0.6B", ["convert", "model"], "Qwen/Qwen3-0.6B"),
        ("convert.mask_token=a=b", ["convert", "mask_token"], "a=b"),
        ('convert.model="12"', ["convert", "model"], "12"),
    ],
)
def test_an_override_is_a_path_and_a_value(text, path, value):
    assert settings.parse_override(text) == (path, value)


@pytest.mark.parametrize("text", ["sft.max_steps", "=3", " =3", ""])
def test_an_override_without_path_or_value_is_refused(text):
    with pytest.raises(UserError, match=r"is not of the form stage\.field=value"):
        settings.parse_override(text)


def test_overrides_win_in_their_order_and_leave_the_original_alone():
    values = {"sft": {"max_steps": 1}}
    assert settings.apply_overrides(values, ["sft.max_steps=2", "sft.max_steps=3", "sample.top_p=0.5"]) == {
        "sft": {"max_steps": 3},
        "sample": {"top_p": 0.5},
    }
    assert values == {"sft": {"max_steps": 1}}
    with pytest.raises(UserError, match="'max_steps' is a field, not a stage"):
        settings.apply_overrides(values, ["sft.max_steps.x=2"])


@given(st.data())
def test_any_number_that_a_field_takes_comes_back_from_its_override(data):
    fields = {name: hint for name, hint in typing.get_type_hints(TrainConfig).items() if hint in (int, float)}
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(st.integers(2, 10**6) if fields[name] is int else st.floats(0.002, 0.9))
    values = settings.apply_overrides({}, [f"sft.{name}={value!r}"])
    assert getattr(settings.build(TrainConfig, values["sft"], "sft"), name) == value
