"""The presets: each resolves for both objectives; bases, objectives and overrides lie over one another in that order."""

import json
import re

import pytest

from a2d_core import presets
from a2d_core.config import OBJECTIVES, UserError, to_dict


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", presets.names())
def test_every_preset_resolves(name, objective):
    raw = presets.read(name)
    recipe = presets.resolve(json.loads(json.dumps(raw)), objective, seed=3)
    assert (recipe.name, recipe.objective, recipe.seed) == (name, objective, 3)
    assert presets.summary(name)


def test_the_default_preset_changes_nothing_but_the_conversations():
    recipe = presets.resolve(presets.read("default"), "bd3lm")
    assert recipe == type(recipe)(name="default", objective="bd3lm")


def test_the_eight_gpu_presets_ask_for_what_training_needs():
    for name, platform in (("qwen3-0.6b-8gpu", "kubernetes"), ("qwen3-0.6b-batch", "batch")):
        compute = presets.resolve(presets.read(name), "bd3lm").compute
        assert (compute.platform, compute.train.gpu, compute.train.processes) == (platform, 8, 8)
        assert compute.train.retries > 0
        assert compute.train.shared_memory_mb
        assert compute.image
        assert compute.generate.gpu == compute.convert.gpu == 1


def test_one_gpu_and_eight_take_the_same_optimizer_steps():
    one, eight = (presets.resolve(presets.read(name), "mdlm") for name in ("qwen3-0.6b", "qwen3-0.6b-8gpu"))
    rows = [r.sft.batch_size * r.sft.gradient_accumulation_steps * r.compute.train.processes for r in (one, eight)]
    assert rows[0] == rows[1]


def test_the_smoke_preset_is_tiny_with_less_work():
    tiny, smoke = (presets.resolve(presets.read(name), "bd3lm") for name in ("tiny", "smoke"))
    assert smoke.convert.block_size == tiny.convert.block_size
    assert smoke.sample == tiny.sample
    assert smoke.sft.max_steps < tiny.sft.max_steps / 100


def test_a_file_lies_over_its_base(tmp_path):
    path = write(tmp_path, "mine.toml", 'base = "tiny"\nseed = 5\n[sft]\nmax_steps = 9\n')
    recipe = presets.resolve(presets.read(path), "bd3lm")
    tiny = presets.resolve(presets.read("tiny"), "bd3lm")
    assert (recipe.name, recipe.seed, recipe.sft.max_steps) == ("mine", 5, 9)
    assert recipe.sft.learning_rate == tiny.sft.learning_rate
    assert recipe.convert == tiny.convert


def test_a_base_is_looked_for_beside_the_file_that_names_it(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path, "base.toml", "seed = 4\n")
    assert presets.read(write(tmp_path / "below", "child.toml", 'base = "../base.toml"\n')) == {"seed": 4, "name": "child"}


def test_an_objective_has_fields_of_its_own(tmp_path):
    path = write(tmp_path, "a.toml", "[sft]\nmax_steps = 1\nbatch_size = 3\n[mdlm.sft]\nmax_steps = 2\n")
    raw = presets.read(path)
    assert presets.resolve(raw, "bd3lm").sft.max_steps == 1
    assert presets.resolve(raw, "mdlm").sft.max_steps == 2
    assert presets.resolve(raw, "mdlm").sft.batch_size == 3


def test_a_plain_field_wins_over_an_objectives_field_of_the_base(tmp_path):
    write(tmp_path, "base.toml", "[mdlm.sft]\nmax_steps = 2\nbatch_size = 5\n")
    raw = presets.read(write(tmp_path, "child.toml", 'base = "base.toml"\n[sft]\nmax_steps = 1\n'))
    assert presets.resolve(raw, "mdlm").sft.max_steps == 1
    assert presets.resolve(raw, "mdlm").sft.batch_size == 5


def test_overrides_and_seed_win_over_everything(tmp_path):
    raw = presets.read(write(tmp_path, "a.toml", "seed = 1\n[mdlm.sft]\nmax_steps = 2\n"))
    recipe = presets.resolve(raw, "mdlm", ["sft.max_steps=3", "seed=8"])
    assert (recipe.sft.max_steps, recipe.seed) == (3, 8)
    assert presets.resolve(raw, "mdlm", ["seed=8"], seed=9).seed == 9


def test_a_resolved_recipe_reads_back_from_json(tmp_path):
    recipe = presets.resolve(presets.read("qwen3-0.6b-8gpu"), "mdlm", ["sft.max_steps=3"])
    plain = to_dict(recipe)
    del plain["objective"]
    assert presets.resolve(presets.read(write(tmp_path, "r.json", json.dumps(plain))), "mdlm") == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "unknown preset 'tinny': did you mean 'tiny'"),
        ("xyz", "unknown preset 'xyz': choose one of default, published-sft, qwen"),
        ("nowhere/x.toml", "no recipe file at '.*nowhere/x.toml'"),
    ],
)
def test_an_unknown_preset_is_named_with_what_there_is(name, message):
    with pytest.raises(UserError, match=message):
        presets.read(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sft\n", "is not a valid TOML recipe"),
        ("day = 2024-01-01\n", "is not a valid TOML recipe"),
        ("base = 3\n", "base=3 must be the name of a preset"),
        ('base = "a.toml"\n', "preset 'a' is built on itself: a -> a"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        presets.read(write(tmp_path, "a.toml", text))


@pytest.mark.parametrize(
    ("text", "objective", "overrides", "message"),
    [
        ("", "ar", [], "unknown objective 'ar'"),
        ("[sftt]\n", "mdlm", [], "unknown field 'sftt': did you mean 'sft'"),
        ("[mdlm.sftt]\n", "mdlm", [], "unknown field 'sftt'"),
        ("mdlm = 3\n", "mdlm", [], "mdlm must be a table"),
        ('objective = "mdlm"\n', "mdlm", [], "a recipe serves both objectives"),
        ("", "mdlm", ["max_steps=3"], "override 'max_steps=3' names no stage"),
        ("", "mdlm", ["sft.max_stps=3"], "unknown field 'sft.max_stps'"),
        ("", "bd3lm", ["convert.block_size=7"], "is not a multiple of convert.block_size=7"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, text, objective, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        presets.resolve(presets.read(write(tmp_path, "a.toml", text)), objective, overrides)
