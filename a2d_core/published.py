"""The published A2D format: config.json says model_type `a2d-qwen2`, `a2d-qwen3` or `a2d-llama`, and nothing about the objective.

The networks are those of transformers under another name, with the same weights by the same names.
Source: github.com/ZHZisZZ/dllm, dllm/pipelines/a2d, and its samplers for the conventions.
"""

from __future__ import annotations

from typing import Any

from a2d_core.config import require

FAMILIES = {
    "a2d-llama": ("A2DLlamaLMHeadModel", "LlamaForCausalLM"),
    "a2d-qwen2": ("A2DQwen2LMHeadModel", "Qwen2ForCausalLM"),
    "a2d-qwen3": ("A2DQwen3LMHeadModel", "Qwen3ForCausalLM"),
}
"""Published model type -> its class, and that of transformers."""
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""What ends a turn of the published chat models, whatever their tokenizer says of the end of a text."""
BLOCK_SIZE = 32
"""Tokens per block of the published bd3lm checkpoints, which do not say it."""
MASK_TOKEN = "<|mask|>"


def entry(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `a2d` entry of a config.json, or what is known of a published one: all but the objective and the mask token's id."""
    if config.get("a2d") is None and config.get("model_type") in FAMILIES:
        return {"objective": None, "block_size": BLOCK_SIZE, "block_origin": "prompt_end", "chain": ()}
    return config.get("a2d")


def to_plain(config: dict[str, Any]) -> dict[str, Any]:
    """A published config.json in the terms of transformers; any other as it is."""
    if config.get("model_type") not in FAMILIES:
        return config
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    model_type = config["model_type"]
    return {**kept, "model_type": model_type.removeprefix("a2d-"), "architectures": [FAMILIES[model_type][1]], "a2d": entry(config)}


def to_published(config: dict[str, Any]) -> dict[str, Any]:
    """The other way round; raises `UserError` where the format has no such family."""
    model_type = f"a2d-{config['model_type']}"
    require(
        model_type in FAMILIES,
        f"the published A2D format has {', '.join(FAMILIES)}, and none for model_type '{config['model_type']}': "
        "leave the checkpoint as it is, a normal Hugging Face directory",
    )
    return {**config, "model_type": model_type, "architectures": [FAMILIES[model_type][0]]}
