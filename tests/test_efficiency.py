"""What saves memory and time leaves the results as they are: activation checkpointing, and torch.compile."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import byte_model, diffusion_model
from test_trainer import CONFIG, answer_rows, losses
from torch._dynamo.utils import counters

from a2d_core import lora, models, trainer
from a2d_core.config import TrainConfig, UserError
from a2d_core.data import DiffusionCollator


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces, guards and differentiates, but runs the traced graph as it is: seconds where C++ takes a minute."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))


def step(model: models.DiffusionModel, rows: int, length: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a random batch and its gradients by name."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 95, (rows, length), generator=generator)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, -3:] = False
    streams = model.objective.streams(ids, torch.ones_like(ids), valid)
    is_masked = (torch.rand(1, *streams.chunk_BT.shape, generator=generator) < 0.5) & streams.is_maskable_BT
    layout = model.objective.layout(streams, is_masked, torch.ones(is_masked.shape))
    model.train().zero_grad()
    total, _ = model(layout)
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * (1e-6 + gradient.abs().max()), name


def model_with(rank: int, family: str = "qwen3") -> models.DiffusionModel:
    model = diffusion_model(family=family)
    if rank:
        model.network.name_or_path = "somewhere"
        lora.attach(model.network, TrainConfig(lora_rank=rank), model.spec.mask_token_id, in_bfloat16=False)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_activation_checkpointing_gives_the_same_gradients_with_fewer_saved_activations(rank: int, dtype: torch.dtype | None) -> None:
    results, saved = [], []
    for is_checkpointed in (False, True):
        model, elements = model_with(rank), []
        if is_checkpointed:
            model.checkpoint_activations()
        keep = functools.partial(lambda elements, tensor: (elements.append(tensor.numel()), tensor)[1], elements)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype, enabled=dtype is not None):
            results.append(step(model, 4, 32))
        saved.append(sum(elements))
    assert_same(results[1], results[0], 1e-6)
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize(("rank", "is_checkpointed"), [(0, False), (4, True)], ids=["all-weights", "lora-checkpointed"])
def test_compiled_layers_give_the_same_gradients_from_one_graph_for_all_layers_and_lengths(
    rank: int, is_checkpointed: bool, quick_compiler: None
) -> None:
    plain, compiled = model_with(rank), model_with(rank)
    if is_checkpointed:
        compiled.checkpoint_activations(are_compiled=True)
    names = list(compiled.state_dict())
    compiled.compile_layers()
    assert list(compiled.state_dict()) == names
    for rows, length in ((4, 16), (3, 20), (2, 40)):
        assert_same(step(compiled, rows, length), step(plain, rows, length), 1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_compiled_run_trains_evaluates_and_saves_as_a_plain_one_does(quick_compiler: None, tmp_path: Path) -> None:
    finals = []
    for compiles in (False, True):
        model, folder = byte_model(), tmp_path / str(compiles)
        collate = DiffusionCollator(model.objective, model.eos_token_id, "block")
        config = replace(CONFIG, compile=compiles, learning_rate=1e-4)
        trainer.fit(model, config, answer_rows(), answer_rows(8), collate, folder, stage="sft", fill="block")
        finals.append(models.load(folder / "checkpoint-final").network.state_dict())
    assert 0 < counters["stats"]["unique_graphs"] <= 4 and not counters["recompile_limit"]
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)
    assert max(float((finals[0][name] - finals[1][name]).abs().max()) for name in finals[0]) < 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and there is no g++")
def test_what_the_cpp_compiler_makes_of_a_layer_computes_the_same() -> None:
    torch._dynamo.reset()
    plain, compiled = model_with(0), model_with(0)
    compiled.compile_layers()
    ids = torch.arange(3, 27).reshape(2, 12)
    layout = plain.objective.layout(plain.objective.streams(ids, torch.ones_like(ids)), (ids % 2 == 0)[None], torch.ones(1, 2, 12))
    with torch.no_grad():
        assert compiled(layout)[0].item() == pytest.approx(plain(layout)[0].item(), rel=1e-5)


def test_without_a_cpp_compiler_compile_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler"):
        byte_model().compile_layers()
