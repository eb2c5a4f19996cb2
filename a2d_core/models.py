"""A Hugging Face causal language model, run as the denoiser of a diffusion language model.

No modelling file per architecture: an explicit mask and explicit positions go straight through the
causal-LM classes of transformers, and `conversion.prove` shows on the model at hand that they are obeyed.
A diffusion checkpoint is a normal Hugging Face directory whose config.json has an `a2d` entry.
"""

# Shapes: B rows, S slots, Q query slots, H hidden, V vocabulary, M scored positions

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from a2d_core import objectives, published
from a2d_core.attention import Slots, network_mask
from a2d_core.config import OBJECTIVES, UserError, require
from a2d_core.loss import Head, weighted_cross_entropy
from a2d_core.objectives import Layout, Objective
from a2d_core.reading import load_network, read_config

KNOWN_MASKS = 4
"""Attention masks that are kept to be used again."""
FLEX_TILE = 128
"""FlexAttention works in tiles of so many slots; a row is padded to a multiple of them."""


@dataclass(frozen=True)
class Spec:
    """The `a2d` entry of config.json: what makes a checkpoint a diffusion checkpoint."""

    objective: str
    """mdlm or bd3lm."""
    block_size: int
    """Tokens per block (bd3lm)."""
    mask_token_id: int
    """The mask token."""
    right_shift: bool = False
    """The logit at position i predicts token i + 1 (mdlm)."""
    logit_scale: float = 1.0
    """The network multiplies the output embedding's logits by this (Granite, Cohere)."""
    logit_softcap: float | None = None
    """The network then squashes logits to cap * tanh(logits / cap) (Gemma 2)."""
    block_origin: Literal["document_start", "prompt_end"] = "document_start"
    """Generation begins in the block that the prompt ends in, or, as with the published checkpoints, at a boundary behind it (bd3lm)."""
    chain: tuple[dict[str, Any], ...] = ()
    """The stages that made this checkpoint, oldest first."""

    def to_objective(self) -> Objective:
        """The objective that this checkpoint was converted for."""
        return objectives.make(self.objective, block_size=self.block_size, mask_token_id=self.mask_token_id, right_shift=self.right_shift)


class DiffusionModel(nn.Module):
    """A causal language model of transformers, run as the denoiser of a diffusion language model."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: Spec) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.spec = spec
        self.objective = spec.to_objective()
        self.stored_dtype = network.dtype
        """Precision of the checkpoint on disk, which training in float32 returns to."""
        self._known_masks: dict[Hashable, Any] = {}
        self._no_split_modules = network._no_split_modules  # the layers, by which FSDP shares out the weights

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def context(self) -> int | None:
        """Positions that the network was made for; None where it has no limit."""
        return getattr(self.network.config.get_text_config(), "max_position_embeddings", None)

    def require_room(self, positions: int, what: str, remedy: str) -> None:
        """Raise `UserError` where `what` needs more positions than the context has."""
        fits = self.context is None or positions <= self.context
        require(fits, f"{what} needs {positions} positions, but the model's context is {self.context}: {remedy}")

    def require_chat_template(self, remedy: str) -> None:
        """Raise `UserError` where the tokenizer has no chat template."""
        require(bool(self.tokenizer.chat_template), f"the tokenizer of '{self.network.name_or_path}' has no chat template: {remedy}")

    @property
    def eos_token_id(self) -> int:
        """The end-of-sequence token, which also fills what lies behind an answer."""
        return self.tokenizer.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        configured = getattr(self.network.generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({i for i in [self.eos_token_id, *configured] if i is not None}))

    def stop_at(self, token_id: int) -> None:
        """Let this token end a generation too; it is saved with the checkpoint."""
        if token_id not in self.stop_token_ids:
            self.network.generation_config.eos_token_id = sorted({*self.stop_token_ids, token_id})

    def encode(self, text: str, *, chat: bool = True) -> list[int]:
        """Token ids of a prompt: a user's turn in the tokenizer's chat template, ready to be answered, or the plain text.

        Raises `UserError` where the tokenizer has no chat template.
        """
        if not chat:
            return list(self.tokenizer(text)["input_ids"])
        return self.encode_messages([{"role": "user", "content": text}])

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, ready for the assistant's turn."""
        self.require_chat_template("give prompts as plain text (chat=false, --raw)")
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def forward(self, layout: Layout, exclude_mask_token: bool = True) -> tuple[Tensor, Tensor]:
        """The sum of weight x cross-entropy over the scored positions, and their cross-entropies ce_M (detached), in nats.

        The head runs at those positions only, and the loss inside this forward, so that DDP and FSDP see every use of a weight.
        """
        hidden_MH = self.hidden(layout.input_ids_BS, layout.slots, key=layout.key).flatten(0, 1)[layout.source_M]
        weight_VH, bias_V = self.output_embedding(with_mask_token=not exclude_mask_token)
        head = self.head if exclude_mask_token else dataclasses.replace(self.head, excluded_token=None)
        return weighted_cross_entropy(hidden_MH, weight_VH, bias_V, layout.target_M, layout.weight_M, head)

    @property
    def head(self) -> Head:
        """How the network turns hidden states into logits; the mask token is never a prediction."""
        return Head(self.spec.logit_scale, self.spec.logit_softcap, self.spec.mask_token_id)

    def hidden(
        self,
        input_ids_BQ: Tensor,
        slots: Slots,
        cached: Slots | None = None,
        cache: Cache | None = None,
        key: Hashable | None = None,
        masks: Any = None,
    ) -> Tensor:
        """Final hidden states [B, Q, H]. With a cache, the queries also see the `cached` slots and are appended to it.

        `key`: what the slots are known by; the mask of a key is made once. `masks`: made already, by `masks`.
        """
        implementation, length = self.network.config._attn_implementation, input_ids_BQ.shape[1]
        known = (key, implementation, self.network.dtype, self.device) if key else None
        if implementation == "flex_attention" and cache is None and masks is None:  # few shapes to compile for, though lengths differ
            spare = -length % FLEX_TILE
            input_ids_BQ, slots = nn.functional.pad(input_ids_BQ, (0, spare)), slots.padded(spare)
        masks = self._known_masks.pop(known, None) if masks is None else masks
        if masks is None:
            masks = self.masks(slots, cached.then(slots) if cached is not None else slots)
        if known:
            self._known_masks = dict([*self._known_masks.items(), (known, masks)][-KNOWN_MASKS:])
        with attention_kernel(self.device):
            output = self.network.base_model(
                input_ids=input_ids_BQ,
                attention_mask=masks,
                position_ids=slots.position.expand(len(input_ids_BQ), -1),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state[:, :length]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32, as the network computes them; the mask token's is -inf."""
        return self.head.logits(hidden, *self.output_embedding())

    def set_attention(self, implementation: str) -> None:
        """Choose the attention kernels: `sdpa`, `eager` or `flex_attention`; `auto` is FlexAttention on CUDA, where the family has it.

        Raises `UserError` where the family does not have it.
        """
        has_flex = bool(self.network._supports_flex_attn)
        if implementation == "auto":
            implementation = "flex_attention" if has_flex and self.device.type == "cuda" else self.network.config._attn_implementation
        require(
            implementation != "flex_attention" or has_flex,
            f"{type(self.network).__name__} has no FlexAttention in transformers: set attention=auto or attention=sdpa",
        )
        try:
            self.network.set_attn_implementation(implementation)
        except ValueError as error:
            raise UserError(f"{type(self.network).__name__} cannot run attention={implementation}: {error}") from None

    def save(self, directory: str | Path, stage: dict[str, Any] | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint directory, or where there are LoRA adapters, theirs; `stage` is appended to the chain of stages."""
        spec = dataclasses.replace(self.spec, chain=(*self.spec.chain, stage)) if stage else self.spec
        self.network.config.a2d = dataclasses.asdict(spec)
        if self.has_adapters:
            from a2d_core import lora  # peft takes its time to import

            lora.save(self.network, directory, state_dict)
        else:
            self.network.save_pretrained(directory, state_dict=state_dict)
        self.tokenizer.save_pretrained(directory)

    def export(self, directory: str | Path) -> None:
        """Write a checkpoint directory in the published A2D format; the `a2d` entry stays, so that `load` knows what it knew.

        Raises `UserError` where the format has no such family.
        """
        renamed = published.to_published(self.network.config.to_dict())
        self.save(directory)
        path = Path(directory) / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values.update({key: renamed[key] for key in ("model_type", "architectures")})
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are in the network, beside its frozen weights."""
        return hasattr(self.network, "peft_config")

    def checkpoint_activations(self, *, are_compiled: bool = False) -> None:
        """Keep only the input of each layer for the backward pass, which computes the rest again, with the same attention kernel.

        `are_compiled`: the layers will be; then the kernel is the compiled code's own, and no context can be given.
        """

        def kernels() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), attention_kernel(self.device)

        options = {"use_reentrant": False} if are_compiled else {"use_reentrant": False, "context_fn": kernels}
        enable = getattr(self.network, "activation_checkpointing_enable", self.network.gradient_checkpointing_enable)  # the older name
        enable(options)

    def compile_layers(self) -> None:
        """Compile each layer in place: names of weights stay, layers of one class share their code, and so do rows of any length.

        Raises `UserError` where there is no C++ compiler, which torch.compile needs on a CPU and on a GPU.
        """
        compilers = [os.environ.get("CXX"), "g++", "clang++"]
        require(
            any(shutil.which(name) for name in filter(None, compilers)), "compile=true needs a C++ compiler: install g++, or leave it out"
        )
        kinds = set(self.network._no_split_modules or ())
        for layer in self.network.modules():
            if type(layer).__name__ in kinds:
                layer.compile(dynamic=True)

    def output_embedding(self, with_mask_token: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V] of the output embedding; of a frozen one, with the mask token's trained row only if asked for."""
        output = self.network.get_output_embeddings()
        frozen = getattr(output, "original_module", output)  # behind peft's wrapper, whose weight is a copy at every use
        return (output if with_mask_token else frozen).weight, getattr(frozen, "bias", None)

    def masks(self, query: Slots, key: Slots) -> Any:
        """The attention mask in the form that the network takes, or one for each kind of layer."""
        config = self.network.config
        implementation = config._attn_implementation
        layers = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if not layers:  # one kind of layer throughout: Mistral and Phi-3 slide in all of them
            return network_mask(query, key, implementation, self.network.dtype, window)
        masks = {"full_attention": network_mask(query, key, implementation, self.network.dtype)}
        if "sliding_attention" in layers:
            masks["sliding_attention"] = network_mask(query, key, implementation, self.network.dtype, window)
        return masks


def multiplies_bfloat16() -> bool:
    """Whether the hardware has bfloat16 matrix products of its own: on other CPUs they are slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.12 may not tell
    return bool(capabilities.get("avx512_bf16", False))


class _Float32Attention(TorchFunctionMode):
    """Under autocast, fused attention takes its inputs and its mask in float32 all the same."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            output = function(*args, **kwargs)
        return output.to(torch.get_autocast_dtype("cpu"))


def attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """Attention in float32 where bfloat16 is trained on a CPU: the fused kernel's backward takes up to six times as long in bfloat16."""
    is_slow = device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return _Float32Attention() if is_slow else nullcontext()


def load(
    path: str | Path,
    *,
    objective: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
) -> DiffusionModel:
    """Load a diffusion checkpoint from a directory or the Hub, also one in the published A2D format (`published`).

    LoRA adapters are merged into `base`, or else the model they name. `objective`: what it has to be for; published
    checkpoints do not say it, and need it. Raises `UserError` where there is none, where it is a plain autoregressive one, or
    one for another objective.
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapters(path, base, objective=objective, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    network, tokenizer = load_network(str(path), dtype or "auto", trust_remote_code=trust_remote_code)
    entry = _entry(network.config, path, objective)
    is_published = "mask_token_id" not in entry
    if is_published:
        entry["mask_token_id"] = published_mask_token(network, tokenizer)
    model = DiffusionModel(network, tokenizer, Spec(**entry))
    for token in published.ENDS_OF_TURN if is_published else ():
        if token in tokenizer.get_vocab():
            model.stop_at(tokenizer.convert_tokens_to_ids(token))
    model.stored_dtype = read_config(str(path), trust_remote_code=trust_remote_code).dtype or network.dtype
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _load_adapters(path: str | Path, base: str | Path | None, *, trust_remote_code: bool, **options: Any) -> DiffusionModel:
    """The model that the LoRA adapters at `path` were trained on, with them merged into its weights."""
    from a2d_core import lora  # peft takes its time to import

    base = base or lora.base_of(path)
    require(
        Path(base).is_dir() or not Path(base).is_absolute(),
        f"the adapters in '{path}' were trained on '{base}', which is not there: say where it is now with "
        f"python -m a2d_core merge --model {path} --base DIR --output-dir DIR",
    )
    spec = Spec(**_entry(read_config(str(path), trust_remote_code=trust_remote_code), path, options["objective"]))
    model = load(base, trust_remote_code=trust_remote_code, **{**options, "objective": spec.objective})
    require(
        spec.chain[:-1] == model.spec.chain,
        f"the adapters in '{path}' were not trained on '{base}': its history of stages is another. Give the right model with --base",
    )
    lora.merge(model.network, path)
    model.network.name_or_path, model.spec = str(path), spec
    return model


def _entry(config: Any, path: str | Path, objective: str | None) -> dict[str, Any]:
    """The `a2d` entry of a configuration, as arguments of `Spec`; that of a published checkpoint lacks the mask token's id."""
    entry = getattr(config, "a2d", None)
    if not isinstance(entry, dict):
        raise UserError(
            f"'{path}' is not a diffusion checkpoint: its config.json has no 'a2d' entry. Convert it first: "
            f"python -m a2d_core convert --model {path} --output-dir DIR"
        )
    found = entry["objective"] or objective
    require(bool(found), f"'{path}' does not say what it was trained for: add --objective {' or --objective '.join(OBJECTIVES)}")
    require(objective in (None, found), f"'{path}' is a checkpoint for {found}, not for {objective}: ask for {found}")
    return {**entry, "objective": found, "chain": tuple(entry["chain"])}


def published_mask_token(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The mask token of a published checkpoint, with a row in its weights; where its tokenizer has none, it is the first id behind it.

    Raises `UserError` where the weights have no row for it.
    """
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": published.MASK_TOKEN})
    mask_token_id = int(tokenizer.convert_tokens_to_ids(tokenizer.mask_token))
    rows = network.get_input_embeddings().weight.shape[0]
    require(
        mask_token_id < rows, f"the mask token's id is {mask_token_id}, and the checkpoint has only {rows} rows: its tokenizer is another's"
    )
    return mask_token_id
