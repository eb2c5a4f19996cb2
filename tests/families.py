"""Tiny random causal language models of every supported family, and diffusion models made of them."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from a2d_core import embedded
from a2d_core.config import OBJECTIVES, ConvertConfig
from a2d_core.conversion import convert
from a2d_core.models import DiffusionModel, Spec
from a2d_core.reading import refuse_unsupported

COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    "is_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""A tiny network in the terms of transformers; a family takes the fields that its configuration has."""
NEEDED = {"gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}}
"""Without it the configuration is refused by transformers."""
LATENT = {"num_key_value_heads": 4}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}  # the last two take over keys and values
PADDED_POSITIONS = {"max_position_embeddings": 512}  # their embedding has a row for the padding token's id
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa".split(), LATENT),
    **dict.fromkeys("minicpm3 youtu".split(), LATENT),
    **dict.fromkeys("camembert data2vec-text roberta roberta-prelayernorm xglm xlm-roberta xlm-roberta-xl xmod".split(), PADDED_POSITIONS),
    "codegen": {"rotary_dim": 4},
    "bamba": {"mamba_n_heads": 4},
    **dict.fromkeys("gemma3n_text gemma4_text gemma4_unified_text".split(), SHARED),
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "electra": {"embedding_size": 32},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {"mamba_n_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**LATENT, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "reformer": {"axial_pos_embds": False},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlnet": {"d_head": 8, "d_inner": 64},
    "zamba": {"num_hidden_layers": 6},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}
"""Where a family needs, or is to have, something else."""
FAMILIES = (
    "qwen3", "llama", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "gpt2", "gpt_neox", "granite", "qwen3_moe",
    "cohere", "opt",
)  # fmt: skip
"""The families that the tests of other rooms run on; test_families.py has all."""


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of a model type of transformers, with the kinds of layers that its default has."""
    kind = CONFIG_MAPPING[family]
    default = kind(**NEEDED.get(family, {}))
    known = {*vars(default), *kind.attribute_map}
    values = {
        **{name: value for name, value in COMMON.items() if name in known},
        **NEEDED.get(family, {}),
        **OWN.get(family, {}),
        **changes,
    }
    if "vocab_size_per_layer_input" in known:  # Gemma 3n and 4 have a second embedding
        values["vocab_size_per_layer_input"] = values["vocab_size"]
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "layer_types" in vars(default) and "layer_types" not in values:
        values["layer_types"] = list(islice(cycle(kinds), max(len(kinds), values.get("num_hidden_layers", 2))))
        values["num_hidden_layers"] = len(values["layer_types"])
    return kind(**values)


def network(family: str = "qwen3", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random network of the family; weights large enough for logits that differ clearly between tokens."""
    config = tiny_config(family, **changes)
    refuse_unsupported(config)  # a model made of several would not be tiny
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config).eval()
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
