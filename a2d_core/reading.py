"""Reading the network and the tokenizer of a Hugging Face directory or Hub id: what is wrong with it, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from a2d_core import published
from a2d_core.config import UserError, require

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_ADVICE = "choose an attention-only decoder, such as Qwen3 or Llama"
_PARTS = ("vision", "audio", "text", "encoder", "decoder")
_AGAIN = "download or copy it again"


def load_network(
    path: str, dtype: torch.dtype | str, *, revision: str | None = None, trust_remote_code: bool = False, allow_pickle: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer at `path`; raises `UserError` with the remedy where that fails."""
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(path, **options)
    refuse_unsupported(config)
    if Path(path).is_dir():
        check_files(Path(path), allow_pickle=allow_pickle)
    try:
        network, told = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=None if allow_pickle else True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(_why_not_loaded(path, error)) from error
    missing = sorted(told["missing_keys"])
    require(
        not missing, f"'{path}' lacks {len(missing)} weights of the network, such as '{missing[:1]}': the checkpoint is damaged; {_AGAIN}"
    )
    _agree_on_tied_weights(network)
    return network, _load_tokenizer(path, config, options)


def read_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> transformers.PreTrainedConfig:
    """The configuration at `path`, that of a published A2D checkpoint in the terms of transformers.

    Raises `UserError` where there is none that can be read.
    """
    if (Path(path) / "config.json").is_file():
        _read_json(Path(path) / "config.json")
    try:
        values, _ = transformers.PreTrainedConfig.get_config_dict(path, revision=revision)
        if values.get("model_type") in published.FAMILIES:
            plain = published.to_plain(values)
            return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_why_not_loaded(path, error)) from error


def refuse_unsupported(config: Any) -> None:
    """Raise `UserError` where the configuration alone tells that a model cannot be converted."""
    name = f"model_type '{config.model_type}'"
    require(not config.is_encoder_decoder, f"{name} is an encoder-decoder: only decoder-only language models can be converted")
    parts = sorted(part for part in config.sub_configs if any(word in part for word in _PARTS))
    require(
        not parts, f"{name} is made of several models ({', '.join(parts)}): convert a checkpoint of the text model alone, if there is one"
    )
    strange = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    require(
        not strange,
        f"{name} has {', '.join(sorted(strange))} layers, which do not take an explicit attention mask of who sees whom: {_ADVICE}",
    )
    network = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    require(not getattr(network, "_is_stateful", False), f"{name} keeps a recurrent state, which cannot be made bidirectional: {_ADVICE}")


def check_files(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise `UserError` where the files of a model directory show, before any weight is read, that some are damaged or not there."""
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = {folder / name for name in _read_json(index).get("weight_map", {}).values()}
        absent = sorted(path.name for path in named if not path.is_file())
        require(not absent, f"'{folder}' lacks {', '.join(absent)}, which {index.name} names: {_AGAIN}")
        shards = sorted(named)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    require(
        bool(shards) or allow_pickle or not pickles,
        f"'{folder}' has its weights as pickles ({', '.join(pickles)}), which can run code when they are read: take a checkpoint in "
        "safetensors, or, if you trust its source, set convert.allow_pickle=true",
    )
    require(
        bool(shards or pickles),
        f"'{folder}' has no weights: there is no *.safetensors file in it; {_AGAIN}",
    )
    for path in shards:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{path}' is damaged ({error}): {_AGAIN}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}): {_AGAIN}") from None
    require(isinstance(values, dict), f"'{path}' is damaged (it holds no names with values): {_AGAIN}")
    return dict(values)


def _load_tokenizer(path: str, config: Any, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, **options)
    except Exception as error:  # transformers has no error of its own for this: OSError, ValueError, TypeError, ImportError, ...
        if "trust_remote_code" in str(error):
            raise UserError(_why_not_loaded(path, error)) from error
        raise UserError(
            f"'{path}' has no tokenizer that can be read ({' '.join(str(error).split())}): put the tokenizer's files beside the weights "
            "(tokenizer.json and tokenizer_config.json)"
        ) from error
    require(
        len(tokenizer.get_vocab()) > 1,
        f"'{path}' has no tokenizer: put the tokenizer's files beside the weights (tokenizer.json and tokenizer_config.json)",
    )
    return tokenizer


def _agree_on_tied_weights(network: PreTrainedModel) -> None:
    """Where a checkpoint has a head of its own although its configuration says tied, transformers keeps it; so does what we save."""
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if head is not None and getattr(network.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        network.config.tie_word_embeddings = False


def _why_not_loaded(path: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return (
            f"'{path}' comes with Python code of its own, which is not run unasked: read it, and if you trust it, convert the model with "
            "convert.trust_remote_code=true"
        )
    if "model type" in reason and "not recognize" in reason:
        return f"'{path}' is of a model type that transformers {transformers.__version__} does not know: upgrade transformers. ({reason})"
    if "ignore_mismatched_sizes" in reason:
        return f"'{path}' has weights of other shapes than its config.json says: the two are not from the same checkpoint"
    if Path(path).is_dir():
        return f"cannot load a language model from the directory '{path}': {reason}"
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        return f"model directory '{path}' does not exist"
    if HF_HUB_OFFLINE:
        return f"'{path}' is not a directory here, and the Hub is off (HF_HUB_OFFLINE is set): give a local directory, or unset it"
    if "gated" in reason or "401" in reason or "403" in reason:
        return f"'{path}' on the Hub is gated or private: accept its licence on its page and set HF_TOKEN to a token that may read it"
    if "safetensors" in reason:
        return f"'{path}' on the Hub has no weights in safetensors ({reason}): if you trust its pickles, set convert.allow_pickle=true"
    return (
        f"cannot load '{path}': it is neither a directory here nor a Hub model that can be reached. Check the name; "
        f"for a private one set HF_TOKEN; without a network set HF_HUB_OFFLINE=1 and give a local directory. ({reason})"
    )
