"""Two processes train as one with the doubled batch does: by DDP, by FSDP2, by ZeRO-2, and on two nodes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from a2d_core import embedded, models
from a2d_core.config import ConvertConfig, TrainConfig
from a2d_core.stages import checks, convert, pretrain, sft

CONFIG = TrainConfig(
    max_length=64, max_steps=4, batch_size=4, gradient_accumulation_steps=2, precision="float32", eval_every=2, save_every=2, log_every=1,
    max_eval_rows=6, max_grad_norm=0.5, lr_scheduler="constant", warmup_ratio=0.0, learning_rate=1e-3,
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a converted tiny model in a directory of that name, once; returns the directory."""
    room = tmp_path_factory.mktemp("distributed")
    (room / "text.txt").write_text("\n\n".join(embedded.corpus()[:60]))
    (room / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in embedded.instructions("train", 80)))

    def train(name: str, stage: ModuleType, objective: str, config: TrainConfig = CONFIG, **how: Any) -> Path:
        source = room / f"{objective}-converted"
        if not source.exists():
            convert.run(ConvertConfig(model="embedded:smoke", block_size=8), objective, source)
        output = room / f"{objective}-{stage.__name__.rpartition('.')[2]}-{name}"
        if not output.exists():
            data = room / ("text.txt" if stage is pretrain else "chats.jsonl")
            stage.run(replace(config, dataset=str(data)), source, output, **how)
        return output

    return train


def one_process(train: Callable[..., Path], stage: ModuleType, objective: str) -> Path:
    return train("one", stage, objective, replace(CONFIG, batch_size=8))


def numbers(output: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def weight_difference(a: Path, b: Path, checkpoint: str = "checkpoint-final") -> float:
    """The largest difference of a weight; both must be normal directories with the same weights, in the same precision."""
    one, other = (models.load(path / checkpoint).network for path in (a, b))
    assert one.dtype == other.dtype
    assert checks.parameters(a / checkpoint) == checks.parameters(b / checkpoint)  # and none twice
    weights = one.state_dict(), other.state_dict()
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def check_same_training(two: Path, one: Path) -> None:
    assert min(numbers(one, "grad_norm")) > CONFIG.max_grad_norm  # every step is clipped
    for key in ("loss", "eval_nelbo", "grad_norm"):
        assert numbers(two, key) == pytest.approx(numbers(one, key), rel=1e-5), key
    assert len(numbers(two, "loss")) == CONFIG.max_steps
    assert weight_difference(two, one) < 1e-5
    assert weight_difference(two, one, "checkpoint-2") < 1e-5


@pytest.mark.parametrize("stage", [pretrain, sft], ids=["pretrain", "sft"])
@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_two_processes_equal_one_with_the_doubled_batch(train: Callable[..., Path], stage: ModuleType, objective: str) -> None:
    check_same_training(train("ddp", stage, objective, processes=2), one_process(train, stage, objective))


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_two_sharded_processes_equal_one_with_the_doubled_batch(train: Callable[..., Path], objective: str) -> None:
    sharded = train("fsdp2", pretrain, objective, processes=2, strategy="fsdp2")
    assert (sharded / "checkpoint-2" / "optimizer_0").is_dir()  # the optimizer's state in parts, which FSDP alone writes
    check_same_training(sharded, one_process(train, pretrain, objective))


def test_a_resumed_sharded_training_equals_an_uninterrupted_one(train: Callable[..., Path]) -> None:
    straight = train("fsdp2", pretrain, "bd3lm", processes=2, strategy="fsdp2")
    resume_from = str(straight / "checkpoint-2")
    resumed = train("resumed", pretrain, "bd3lm", processes=2, strategy="fsdp2", resume_from=resume_from)
    assert numbers(resumed, "loss") == numbers(straight, "loss")
    assert numbers(resumed, "eval_nelbo") == numbers(straight, "eval_nelbo")
    assert weight_difference(resumed, straight) == 0


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: it is an extra")
def test_two_zero2_processes_equal_one_with_the_doubled_batch(train: Callable[..., Path]) -> None:
    check_same_training(train("zero2", pretrain, "bd3lm", processes=2, strategy="zero2"), one_process(train, pretrain, "bd3lm"))


def test_two_nodes_equal_one_process_with_the_doubled_batch(train: Callable[..., Path]) -> None:
    one = one_process(train, pretrain, "bd3lm")
    two = one.with_name("nodes")
    settings = [f"{name}={json.dumps(value)}" for name, value in vars(CONFIG).items() if value != getattr(TrainConfig(), name)]
    command = [sys.executable, "-m", "a2d_core", "pretrain", "--model", str(one.with_name("bd3lm-converted")), "--output-dir", str(two)]
    command += ["--dataset", str(one.with_name("text.txt")), *(word for setting in settings for word in ("--set", setting))]
    outputs = on_two_nodes(command)
    check_same_training(two, one)
    assert ["the checkpoint is" in text for text in outputs] == [True, True]
    assert len({line for text in outputs for line in text.splitlines() if line.startswith("eval_nelbo ")}) == 1

    kept = two.with_name("kept-by-node-0-alone")
    shutil.copytree(two / "checkpoint-2", kept / "checkpoint-2")
    command[command.index(str(two))] = str(kept)
    elsewhere = [*command, "--resume"]
    elsewhere[elsewhere.index(str(kept))] = str(kept.with_name("of-node-1"))
    for text in on_two_nodes([*command, "--resume"], elsewhere, code=2):
        assert "error: node 1 was started with " in text
        assert f"resume_from=None, and node 0 has '{kept}/checkpoint-2'" in text


def on_two_nodes(command: list[str], of_node_1: list[str] | None = None, code: int = 0) -> list[str]:
    """What two nodes on the loopback interface print, which end with that code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--nodes", "2", "--main-address", f"127.0.0.1:{free.getsockname()[1]}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            [*words, *meeting, "--node-rank", str(rank)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank, words in enumerate([command, of_node_1 or command])
    ]
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [code, code], outputs
    return outputs
