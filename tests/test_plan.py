"""The plan: what a recipe would cost, counted like the network counts, without weights, a network, or much time."""

import json
from dataclasses import replace

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from a2d_core import __main__ as cli
from a2d_core import embedded, objectives, plan, presets
from a2d_core.config import OBJECTIVES, TrainConfig


def resolve(preset="tiny", objective="bd3lm", *overrides):
    return presets.resolve(presets.read(preset), objective, overrides)


def parameters(config):
    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())


def test_the_table_of_models_holds_what_they_are():
    tokenizer = embedded.build_tokenizer()
    for name, size in embedded.SIZES.items():
        config, shape = size.config(tokenizer), plan.SHAPES[f"embedded:{name}"]
        assert shape.parameters == parameters(config)
        assert (shape.vocabulary, shape.hidden, shape.layers) == (config.vocab_size, config.hidden_size, config.num_hidden_layers)
        assert (shape.attention, shape.intermediate) == (config.num_attention_heads * config.head_dim, config.intermediate_size)
    shape = plan.SHAPES["Qwen/Qwen3-0.6B"]
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    )
    values = (151936, 1024, 28, 16, 8, 128, 3072)  # of its config.json
    assert shape.parameters == parameters(Qwen3Config(**dict(zip(names, values, strict=True)), tie_word_embeddings=True))
    assert (shape.vocabulary, shape.hidden, shape.layers, shape.attention, shape.intermediate) == (*values[:3], 16 * 128, 3072)


def test_the_coder_in_the_table_is_what_its_config_says():
    values = {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864}
    config = Qwen2Config(**values, vocab_size=151936, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
    shape = plan.SHAPES["Qwen/Qwen2.5-Coder-0.5B-Instruct"]
    assert shape.parameters == parameters(config)
    assert (shape.vocabulary, shape.attention, *values.values()) == (151936, 896, shape.hidden, shape.layers, shape.intermediate)


def test_a_model_of_ones_own_is_counted_from_its_configuration(tmp_path):
    model = families.byte_model("bd3lm")
    model.network.config.save_pretrained(tmp_path)
    shape, _ = plan.find_shape(str(tmp_path))
    assert shape.parameters == sum(weight.numel() for weight in model.network.parameters())
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("block", [8, 32])
def test_positions_and_pairs_are_those_of_the_layout(block):
    """Block 32 in rows of 32 is MDLM."""
    views, length = 2, 32
    objective = objectives.make("bd3lm" if block < length else "mdlm", block_size=block, mask_token_id=0)
    ids = torch.ones(1, length, dtype=torch.long)
    streams = objective.streams(ids, ids)
    layout = objective.layout(streams, torch.ones(views, 1, length, dtype=torch.bool), torch.ones(views, 1, length))
    from a2d_core.attention import network_mask

    sees = network_mask(layout.slots, layout.slots, "sdpa", torch.float32)
    rows = layout.input_ids_BS.shape[0]
    pairs = int(sees.expand(rows, *sees.shape[1:]).sum())
    assert plan.slots(TrainConfig(max_length=length, views=views), block) == (layout.input_ids_BS.numel(), pairs)


def test_flops_are_six_a_weight_and_token_where_the_body_is_everything():
    shape = replace(plan.SHAPES["Qwen/Qwen3-0.6B"], attention=0, vocabulary=0)
    config = TrainConfig(max_length=64)
    assert plan.row_flops(shape, config, block=64) == 6 * shape.parameters * 64
    assert plan.row_flops(shape, replace(config, gradient_checkpointing=True), block=64) == 8 * shape.parameters * 64


def test_the_published_recipe_costs_what_paper_and_pencil_say():
    """Qwen3-0.6B has 440,467,456 weights beside its embedding, 28 layers of attention 2,048 wide, and a head of 151,936 x 1,024."""
    recipe = resolve("published-sft", "mdlm")
    token = 6 * 440_467_456 + 12 * 28 * 2048 * 1024 + 6 * 151_936 * 1024 * 0.5005  # weights; attention to 1,024; the head where masked
    stage = plan.estimate(recipe)["stages"]["sft"]
    assert stage["tokens"] == stage["steps"] * 2048 * 1024
    assert stage["flops"] == pytest.approx(stage["tokens"] * token, rel=1e-6)
    assert stage["flops"] / (6 * 596_049_920 * stage["tokens"]) == pytest.approx(1.07, abs=0.01)  # beside 6 N D


def test_a_strategy_shares_out_what_it_says():
    shape, config = plan.SHAPES["Qwen/Qwen3-0.6B"], TrainConfig(precision="bfloat16")
    held = {name: [plan.memory(shape, config, 512, n, name) / shape.parameters for n in (2, 8)] for name in ("ddp", "zero2", "fsdp2")}
    assert held["ddp"][0] == held["ddp"][1]
    assert held["zero2"][0] - held["zero2"][1] == pytest.approx(14 / 2 - 14 / 8)
    assert held["fsdp2"][0] - held["fsdp2"][1] == pytest.approx(16 / 2 - 16 / 8)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_masked_share_is_the_mean_over_the_times(schedule):
    from a2d_core import noise

    config = TrainConfig(schedule=schedule, t_min=0.1, t_max=0.8)
    t = torch.linspace(config.t_min, config.t_max, 10_001, dtype=torch.float64)
    assert plan.masked_share(config) == pytest.approx(float((1 - noise.alpha(t, schedule)).mean()), abs=1e-4)


def test_steps_tokens_and_processes_hang_together():
    one, eight = (plan.estimate(resolve(name))["stages"]["sft"] for name in ("qwen3-0.6b", "qwen3-0.6b-8gpu"))
    assert (one["steps"], one["tokens"], one["flops"]) == (eight["steps"], eight["tokens"], eight["flops"])
    one, eight = (plan.estimate(resolve(name))["hours"] for name in ("qwen3-0.6b", "qwen3-0.6b-8gpu"))
    assert {row["hardware"] for row in eight} == {"8 x A100", "8 x H100", "8 x H200"}
    assert eight[0]["hours"] == pytest.approx(one[0]["hours"] / 8, rel=0.01)
    assert eight[0]["gpu_hours"] == pytest.approx(8 * eight[0]["hours"])


def test_a_node_selector_names_the_gpu():
    recipe = resolve("qwen3-0.6b-8gpu")
    recipe = replace(recipe, compute=replace(recipe.compute, node_selector={"gpu-model": "nvidia-l40s"}))
    assert [row["hardware"] for row in plan.estimate(recipe)["hours"]] == ["8 x L40S"]


def test_local_data_are_counted(tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n' * 200)
    (tmp_path / "text.txt").write_text("x" * 12_800)
    recipe = resolve("tiny", "bd3lm", f"sft.dataset={tmp_path}/chats.jsonl", "sft.max_steps=-1", f"pretrain.dataset={tmp_path}/text.txt",
                     "evaluate.text_dataset=none")  # fmt: skip
    stages = plan.estimate(recipe)["stages"]
    assert (stages["sft"]["rows"], stages["sft"]["steps"]) == (190, 3)  # 5 % are held out; 64 rows a step
    assert stages["pretrain"]["rows"] == 95  # a token a byte, 128 a row


def test_what_cannot_be_known_is_said_and_the_rest_is_told():
    cost = plan.estimate(resolve("tiny", "bd3lm", "convert.model=nobody/nothing", "sft.dataset=nobody/chats", "sft.max_steps=-1"))
    assert cost["model"]["parameters"] is None and cost["stages"]["sft"]["steps"] is None
    assert cost["stages"]["pretrain"]["tokens"] == 500 * 16 * 128
    text = plan.text(cost)
    assert "the size of 'nobody/nothing'" in text
    assert "the number of rows of 'nobody/chats'" in text


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_is_planned(preset, objective, capsys):
    assert cli.main(["plan", "--preset", preset, "--objective", objective]) == 0
    out = capsys.readouterr().out
    for words in ("parameters", "FLOPs", "GPU-hours", f"registers a2d-{preset}-{objective}", "assumed"):
        assert words in out
    assert "missing" not in out
    assert cli.main(["plan", "--preset", preset, "--objective", objective, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert all(stage["flops"] > 0 and stage["memory_gib"] > 0 for stage in cost["stages"].values())
