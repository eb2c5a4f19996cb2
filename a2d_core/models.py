"""The only room that knows Hugging Face models: load, convert, and prove that a conversion holds.

No modelling file per architecture: an explicit mask and explicit positions go straight through the
causal-LM classes of transformers, and `prove` shows on the model at hand that they were obeyed.
A diffusion checkpoint is a normal Hugging Face directory whose config.json has an `a2d` entry.
"""

# Shapes: B rows, S slots, H hidden, V vocabulary, M scored positions

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from a2d_core import objectives
from a2d_core.attention import Slots, network_mask
from a2d_core.config import ConvertConfig, UserError, require
from a2d_core.loss import Head, weighted_cross_entropy
from a2d_core.objectives import Layout, Objective

KNOWN_MASKS = 4
"""Attention masks that are kept to be used again."""
FLEX_TILE = 128
"""FlexAttention works in tiles of so many slots; a row is padded to a multiple of them."""
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


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
        require(
            bool(self.tokenizer.chat_template),
            f"the tokenizer of '{self.network.name_or_path}' has no chat template: give prompts as plain text (chat=false, --raw)",
        )
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def forward(self, layout: Layout, exclude_mask_token: bool = True) -> tuple[Tensor, Tensor]:
        """The sum of weight x cross-entropy over the scored positions, and their cross-entropies ce_M (detached), in nats.

        The head runs at those positions only, and the loss inside this forward, so that DDP and FSDP see every use of a weight.
        """
        hidden_MH = self.hidden(layout.input_ids_BS, layout.slots, key=layout.key).flatten(0, 1)[layout.source_M]
        weight_VH, bias_V = self._output_embedding(with_mask_token=not exclude_mask_token)
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
        masks = self._known_masks.get(known) if masks is None else masks
        if implementation == "flex_attention" and cache is None:  # few shapes to compile for: lengths differ from batch to batch
            spare = -length % FLEX_TILE
            input_ids_BQ, slots = nn.functional.pad(input_ids_BQ, (0, spare)), slots.padded(spare)
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
        return self.head.logits(hidden, *self._output_embedding())

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

    def _output_embedding(self, with_mask_token: bool = False) -> tuple[Tensor, Tensor | None]:
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


def attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """The plain attention kernel where bfloat16 is trained on a CPU: the fused one's backward takes ten times as long there."""
    is_slow = device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
) -> DiffusionModel:
    """Load a diffusion checkpoint from a directory or the Hub; LoRA adapters are merged into `base`, or else the model they name.

    Raises `UserError` where there is none, or where it is a plain autoregressive one.
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapters(path, base, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    network, tokenizer = _load_network(str(path), dtype or "auto", trust_remote_code=trust_remote_code)
    spec = _read_spec(network.config, path)
    model = DiffusionModel(network, tokenizer, spec).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    model.stored_dtype = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).dtype or network.dtype
    return model


def _load_adapters(path: str | Path, base: str | Path | None, *, trust_remote_code: bool, **options: Any) -> DiffusionModel:
    """The model that the LoRA adapters at `path` were trained on, with them merged into its weights."""
    from a2d_core import lora  # peft takes its time to import

    base = base or lora.base_of(path)
    require(
        Path(base).is_dir() or not Path(base).is_absolute(),
        f"the adapters in '{path}' were trained on '{base}', which is not there: say where it is now with "
        f"python -m a2d_core merge --model {path} --base DIR --output-dir DIR",
    )
    model = load(base, trust_remote_code=trust_remote_code, **options)
    spec = _read_spec(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), path)
    require(
        spec.chain[:-1] == model.spec.chain,
        f"the adapters in '{path}' were not trained on '{base}': its history of stages is another. Give the right model with --base",
    )
    lora.merge(model.network, path)
    model.network.name_or_path, model.spec = str(path), spec
    return model


def _read_spec(config: Any, path: str | Path) -> Spec:
    entry = getattr(config, "a2d", None)
    if not isinstance(entry, dict):
        raise UserError(
            f"'{path}' is not a diffusion checkpoint: its config.json has no 'a2d' entry. Convert it first: "
            f"python -m a2d_core convert --model {path} --output-dir DIR"
        )
    return Spec(**{**entry, "chain": tuple(entry["chain"])})


def convert(config: ConvertConfig, objective: str, source: str | Path, output_dir: str | Path, *, seed: int = 0) -> DiffusionModel:
    """Turn the autoregressive checkpoint at `source` into a diffusion checkpoint with the same weights.

    The mask token is the tokenizer's own, or is added; the conversion is proved before it is saved.
    Raises `UserError` that names the architecture where it cannot be converted.
    """
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    network, tokenizer = _load_network(str(source), dtype, revision=config.revision, trust_remote_code=config.trust_remote_code)
    require(
        tokenizer.eos_token_id is not None,
        f"the tokenizer of '{source}' has no end-of-sequence token: set eos_token in its tokenizer_config.json",
    )
    before = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    mask_token_id = _give_mask_token(network, tokenizer, config.mask_token, seed)
    spec = Spec(objective, config.block_size, mask_token_id, config.right_shift)
    model = DiffusionModel(network, tokenizer, spec).eval()
    model.spec = _measure_head(model)
    prove(model, before, mask_token_id)
    model.save(output_dir, stage={"stage": "convert", "source": str(config.model), "revision": config.revision})
    return model


@torch.no_grad()
def prove(model: DiffusionModel, before: dict[str, Tensor] | None = None, mask_token_id: int | None = None) -> None:
    """Show on this very model that the explicit masks and positions are obeyed; raise `UserError` otherwise.

    1. weights are those of the source; 2. under the full mask an earlier position feels a later token;
    3. under the block-causal mask it does not; 4. slots in another order, with their positions, give the
    same result; 5. a block on top of a KV cache equals the uncached forward.
    """
    network = model.network
    name = f"{type(network).__name__} (model_type '{network.config.model_type}')"
    tolerance = 1e-4 if network.dtype == torch.float32 else 5e-2

    def claim(holds: bool, what: str) -> None:
        require(holds, f"{name} cannot be converted: {what}. Choose a decoder whose attention takes an explicit mask")

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))

    after = network.state_dict()
    for key, weight in (before or {}).items():
        claim(_is_kept(after[key], weight, mask_token_id), f"weight '{key}' changed")

    block, length = 4, 12
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(network.config.get_text_config().vocab_size, 100), (1, length), generator=generator).to(model.device)
    changed = ids.clone()
    changed[0, -block] = (ids[0, -block] + 1) % 100
    position = torch.arange(length, device=model.device)[None]
    one_block = Slots.clean(position, torch.zeros_like(position))
    causal = dataclasses.replace(one_block, block=position // block)

    try:
        full, blocks = model.hidden(ids, one_block), model.hidden(ids, causal)
        moved = (model.hidden(changed, one_block) - full)[:, -block - 1].abs().max()  # a neighbour: within any sliding window
        claim(bool(moved > 1e-6 * full.abs().max()), "an earlier position does not see a later one under the full mask (still causal)")
        claim(
            same(model.hidden(changed, causal)[:, : length - block], blocks[:, : length - block]),
            "a position sees a later block under the block-causal mask (a leak)",
        )
        order = torch.randperm(length, generator=generator).to(model.device)
        shuffled = Slots(*(x[:, order] for x in causal.fields()))
        claim(same(model.hidden(ids[:, order], shuffled), blocks[:, order]), "it does not take positions from position_ids")
        cache = DynamicCache()
        model.hidden(ids[:, :-block], causal[: length - block], cache=cache)
        last = model.hidden(ids[:, -block:], causal[length - block :], causal[: length - block], cache)
        claim(same(last, blocks[:, -block:]), "a block on top of the KV cache differs from the uncached forward")
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{name} cannot be converted: its forward refuses an explicit mask, positions or a cache ({error})") from error


def _load_network(
    path: str, dtype: torch.dtype | str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        _refuse_unsupported(AutoConfig.from_pretrained(path, **options))
        network = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_why_not_loaded(path, error)) from error
    require(
        not getattr(network, "_is_stateful", False),
        f"{type(network).__name__} (model_type '{network.config.model_type}') keeps a recurrent state: it cannot be made bidirectional. "
        "Choose an attention-only decoder, such as Qwen3 or Llama",
    )
    return network, tokenizer


def _refuse_unsupported(config: Any) -> None:
    name = f"model_type '{config.model_type}'"
    require(not config.is_encoder_decoder, f"{name} is an encoder-decoder: only decoder-only language models can be converted")
    strange = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    require(
        not strange,
        f"{name} has {', '.join(sorted(strange))} layers (a recurrent or hybrid model), which cannot be made bidirectional: "
        "choose an attention-only decoder, such as Qwen3 or Llama",
    )


def _why_not_loaded(path: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if Path(path).is_dir():
        return f"cannot load a language model from the directory '{path}': {reason}"
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        return f"model directory '{path}' does not exist"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return f"'{path}' is not a directory here, and the Hub is off (HF_HUB_OFFLINE is set): give a local directory, or unset it"
    if "gated" in reason or "401" in reason or "403" in reason:
        return f"'{path}' on the Hub is gated or private: accept its licence on its page and set HF_TOKEN to a token that may read it"
    return (
        f"cannot load '{path}': it is neither a directory here nor a Hub model that can be reached. Check the name; "
        f"for a private one set HF_TOKEN; without a network set HF_HUB_OFFLINE=1 and give a local directory. ({reason})"
    )


def _give_mask_token(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, seed: int) -> int:
    """The id of the tokenizer's mask token, or of `text` in its vocabulary, or of `text` newly added with a row of its own."""
    if tokenizer.mask_token_id is None:
        is_new = text not in tokenizer.get_vocab()
        tokenizer.add_special_tokens({"mask_token": text})
        rows = network.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if is_new:
            _initialise_row(network, tokenizer.convert_tokens_to_ids(text), seed)
    return int(tokenizer.convert_tokens_to_ids(tokenizer.mask_token))


@torch.no_grad()
def _initialise_row(network: PreTrainedModel, row: int, seed: int) -> None:
    """Draw the mask token's row from the normal distribution of the other rows: of their norm, not near zero, and no token's double."""
    for embedding in (network.get_input_embeddings(), network.get_output_embeddings()):
        others = embedding.weight[:row].float()
        noise = torch.randn(others.shape[1], generator=torch.Generator().manual_seed(seed)).to(others.device)
        embedding.weight[row] = (others.mean(0) + others.std(0) * noise).to(embedding.weight.dtype)


def _is_kept(after: Tensor, before: Tensor, mask_token_id: int | None) -> bool:
    """Whether a weight is that of its source, which new rows may follow; an embedding's row of the mask token may differ."""
    if before.dim() == 0:
        return torch.equal(after, before)
    differs = (after[: len(before)] != before).reshape(len(before), -1).any(1)
    return differs.nonzero().flatten().tolist() in ([], [mask_token_id])


@torch.no_grad()
def _measure_head(model: DiffusionModel) -> Spec:
    """The spec with the scale and soft-cap that stand between the output embedding and the network's logits, measured and proved."""
    network, config = model.network, model.network.config
    ids = torch.arange(8, device=model.device)[None]
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = network(input_ids=ids, use_cache=False).logits.float()
    linear = network.get_output_embeddings()(hidden).float()
    softcap = getattr(config, "final_logit_softcapping", None)
    uncapped = softcap * torch.atanh((expected / softcap).clamp(-1 + 1e-6, 1 - 1e-6)) if softcap else expected
    scale = float((uncapped * linear).sum() / linear.square().sum())
    scale = 1.0 if abs(scale - 1) < 1e-3 else scale
    found = linear * scale if softcap is None else softcap * torch.tanh(linear * scale / softcap)
    tolerance = 1e-3 if network.dtype == torch.float32 else 5e-2
    require(
        bool((found - expected).abs().max() <= tolerance * (1 + expected.abs().max())),
        f"{type(network).__name__} (model_type '{config.model_type}') cannot be converted: its logits are not its output embedding "
        "times a scale, with or without a soft-cap",
    )
    return dataclasses.replace(model.spec, logit_scale=scale, logit_softcap=softcap)
