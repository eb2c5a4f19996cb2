"""Low-rank adapters (LoRA) through peft: put into a network, saved, restored, and merged into its weights.

The network is changed in place: its linear layers gain a low-rank term, its own weights are frozen, and of its
embedding only the mask token's row is trained, because no autoregressive training has ever used it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import Tensor
from transformers import PreTrainedModel

from a2d_core.config import TrainConfig, UserError, require

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Stands before every name in peft's files."""


def base_of(directory: str | Path) -> str:
    """The model that the adapter was trained on: a directory, or a name on the Hub."""
    return str(peft.PeftConfig.from_pretrained(str(directory)).base_model_name_or_path)


def attach(network: PreTrainedModel, config: TrainConfig, mask_token_id: int, *, in_bfloat16: bool, seed: int = 0) -> None:
    """Freeze the network and give it new adapters, which do not yet change its outputs; the same ones for the same seed.

    Adapters are float32. Frozen weights stay bfloat16 where they are so on disk, the compute is bfloat16 and a GPU does it (a
    CPU would sum the mask token's gradient in bfloat16, and lose most of it). Raises `UserError` where no layer fits.
    """
    base, embedding = network.name_or_path, network.get_input_embeddings()
    require(bool(base), "LoRA adapters name the model that they were trained on: train one that was loaded from a directory or the Hub")
    adapters = peft.LoraConfig(
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets) or "all-linear",
        trainable_token_indices={next(name for name, module in network.named_modules() if module is embedding): [mask_token_id]},
        task_type="CAUSAL_LM",
    )
    if not (in_bfloat16 and network.dtype == torch.bfloat16 and network.device.type == "cuda"):
        network.float()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(network, adapters)
    except peft.NoMatchingPeftModuleError as error:
        raise UserError(
            f"{type(network).__name__} has no layer for LoRA adapters (lora_targets={list(config.lora_targets)}): name linear layers, such "
            f"as {', '.join(_linear_layers(network))}, or train all weights with lora_rank=0"
        ) from error


def save(network: PreTrainedModel, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the adapters in peft's format, beside the network's configuration, by which a directory is known."""
    weights = peft.get_peft_model_state_dict(network, state_dict=state_dict, save_embedding_layers=False)
    network.config.save_pretrained(directory)
    network.peft_config["default"].save_pretrained(str(directory))
    safetensors.torch.save_file({PREFIX + name: weight.contiguous() for name, weight in weights.items()}, Path(directory) / WEIGHTS)


def restore(network: PreTrainedModel, directory: str | Path) -> None:
    """Load saved adapters into those of the network; raises `UserError` where they do not fit."""
    path = Path(directory) / WEIGHTS
    require(path.is_file(), f"'{directory}' holds no LoRA adapters ({WEIGHTS}): go on as it was trained, with lora_rank=0")
    weights = {name.removeprefix(PREFIX): weight for name, weight in safetensors.torch.load_file(path).items()}
    expected = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
    shapes, wanted = ({name: weight.shape for name, weight in state.items()} for state in (weights, expected))
    differing = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    require(
        not differing, f"the LoRA adapters in '{directory}' do not fit the model ({', '.join(differing[:3])}): keep lora_rank and targets"
    )
    peft.set_peft_model_state_dict(network, weights)


@torch.no_grad()
def merge(network: PreTrainedModel, directory: str | Path) -> None:
    """Add saved adapters to the network's weights, each sum in float32 and rounded once to the weight's precision."""
    tuner = _inject(network, peft.PeftConfig.from_pretrained(str(directory)))
    restore(network, directory)
    for module in network.modules():
        if isinstance(module, LoraLayer):
            base, dtype = module.get_base_layer(), next(module.get_base_layer().parameters()).dtype
            base.float()
            module.merge()
            base.to(dtype)
        elif isinstance(module, BaseTunerLayer):
            module.merge()
    tuner.unload()
    network.requires_grad_(True)


def _inject(network: PreTrainedModel, adapters: Any) -> peft.LoraModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out|.*_pattern keys did not match")  # peft then does the right thing
        tuner = peft.LoraModel(network, adapters, "default")
    cast_adapter_dtype(network, "default")
    return tuner


def _linear_layers(network: PreTrainedModel) -> list[str]:
    head = network.get_output_embeddings()
    names = {name.split(".")[-1] for name, module in network.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    return sorted(names)[:8]
