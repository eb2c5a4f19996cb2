"""Strategies: what accelerate makes of the configurations, and what is refused before any process starts."""

import os

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin

from a2d_core import launch, strategies
from a2d_core.config import STRATEGIES, StepCompute, UserError


@pytest.fixture
def written(tmp_path):
    """Write an accelerate configuration; returns its path."""

    def written(**values):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return written


@pytest.fixture
def with_deepspeed(monkeypatch):
    monkeypatch.setattr(strategies, "find_spec", lambda name: name)


def test_ddp_has_no_plugin():
    made = strategies.environment(strategies.file("ddp"), 2)
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "OMP_NUM_THREADS"} & set(made)


def test_fsdp2_becomes_the_plugin_that_is_meant(monkeypatch):
    for name, value in strategies.environment(strategies.file("fsdp2"), 2).items():
        monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


def test_zero2_becomes_the_environment_that_is_meant(with_deepspeed):
    made = strategies.environment(strategies.file("zero2"), 2)
    assert made["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert made["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert made["ACCELERATE_GRADIENT_CLIPPING"] == made["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert made["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == made["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "none"


def test_zero2_without_deepspeed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs DeepSpeed: pip install 'a2d-core\[deepspeed\]'"):
        strategies.environment(strategies.file("zero2"), 2)


def test_a_configuration_of_ones_own_passes_its_settings_on(written):
    fsdp = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False, "fsdp_offload_params": True}
    path = written(distributed_type="FSDP", fsdp_config=fsdp, num_processes=4, num_machines=2, gpu_ids="2,3")
    made = strategies.environment(strategies.file(str(path)), 4, 2)
    assert (made["FSDP_OFFLOAD_PARAMS"], made["CUDA_VISIBLE_DEVICES"]) == ("true", "2,3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 8}, "8 processes on 1 nodes, and 2 on 1 were asked for"),
        ({"distributed_type": "MULTI_GPU", "num_machines": 2}, "on 2 nodes, and 2 on 1"),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}, "leave out mixed_precision: bf16"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp_version: 2"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "zero_stage must be 1 or 2, not 3"),
        ({"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM is none of"),
        ({"distributed_type": "FSDP", "fsdp": {}}, "not an accelerate configuration"),
        ({"strategy": "FSDP"}, "not an accelerate configuration"),
    ],
)
def test_a_contradiction_is_refused(written, with_deepspeed, values, message):
    with pytest.raises(UserError, match=message):
        strategies.environment(written(**values), 2)


def test_an_unknown_strategy_is_refused_before_any_process_starts(tmp_path):
    with pytest.raises(UserError, match=f"unknown strategy 'zero9': choose one of {', '.join(STRATEGIES)}"):
        launch.run("nowhere:nothing", {}, processes=2, strategy="zero9")
    with pytest.raises(UserError, match="unknown strategy"):
        StepCompute(strategy="zero9")
    with pytest.raises(UserError, match=f"no accelerate configuration '{tmp_path}/none.yaml'"):
        launch.run("nowhere:nothing", {}, processes=1, strategy=f"{tmp_path}/none.yaml")
