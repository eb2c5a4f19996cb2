"""Tiny random causal language models of every supported family, and diffusion models made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from a2d_core import embedded
from a2d_core.config import OBJECTIVES, ConvertConfig
from a2d_core.models import DiffusionModel, Spec, convert

VOCAB = 100
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 6, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 6}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 8.0}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}


def network(family: str = "qwen3", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random network of the family; weights large enough for logits that differ clearly between tokens."""
    config_name, class_name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**COMMON, **own, **changes})
    made = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(6.0)
    return made


def diffusion_model(objective: str = "bd3lm", *, block_size: int = 4, right_shift: bool = False, **options: Any) -> DiffusionModel:
    """A random diffusion model whose tokenizer is the embedded one; the mask is the vocabulary's last token."""
    made = network(**options)
    spec = Spec(objective, block_size, made.config.vocab_size - 1, right_shift)
    return DiffusionModel(made, embedded.build_tokenizer(), spec).eval()


def byte_model(objective: str = "bd3lm", *, block_size: int = 4, **changes: Any) -> DiffusionModel:
    """A random Qwen3 with the embedded tokenizer's vocabulary and a mask token behind it."""
    tokenizer = embedded.build_tokenizer()
    return diffusion_model(
        objective, block_size=block_size, vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip


def uniform_(model: DiffusionModel) -> DiffusionModel:
    """Make every logit zero."""
    with torch.no_grad():
        model.network.get_output_embeddings().weight.zero_()
    return model


def save_source(directory: Path, *, layers: int, **changes: Any) -> Path:
    """Write a tiny random autoregressive Qwen3 with the embedded tokenizer into a directory, and return it."""
    tokenizer = embedded.build_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def convert_both(source: Path, folder: Path) -> dict[str, Path]:
    """Objective -> the directory of the converted model, with blocks of 8."""
    for objective in OBJECTIVES:
        convert(ConvertConfig(block_size=8), objective, source, folder / objective)
    return {objective: folder / objective for objective in OBJECTIVES}
