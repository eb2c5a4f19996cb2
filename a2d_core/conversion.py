"""Conversion: an autoregressive checkpoint becomes a diffusion checkpoint, and is proved to obey explicit masks and positions.

No family is taken at its word. `prove` runs the network at hand, once for each attention kernel that it has.
"""

# Shapes: B rows, S slots, H hidden, N layers, Q query slots

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from a2d_core.attention import Slots, may_attend
from a2d_core.config import ConvertConfig, UserError, require
from a2d_core.models import DiffusionModel, Spec, published_mask_token
from a2d_core.reading import load_network

KERNELS = ("sdpa", "eager")
"""Attention kernels of which a family is proved; FlexAttention computes the same masks, and is compared with these in the tests."""
FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError)
"""What a network's code raises where it is given something that it was not written for."""
SLOTS = 13
"""Slots of the rows that prove something: few, and more than two blocks of 4."""


def convert(config: ConvertConfig, objective: str, source: str | Path, output_dir: str | Path, *, seed: int = 0) -> DiffusionModel:
    """Turn the autoregressive checkpoint at `source` into a diffusion checkpoint with the same weights.

    The mask token is the tokenizer's own, or is added; the conversion is proved before it is saved.
    Raises `UserError` that names the architecture where it cannot be converted.
    """
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    network, tokenizer = load_network(
        str(source), dtype, revision=config.revision, trust_remote_code=config.trust_remote_code, allow_pickle=config.allow_pickle
    )
    entry = getattr(network.config, "a2d", None)
    require(
        not (entry and entry["objective"]),
        f"'{source}' is a diffusion checkpoint already: train it, sample from it, or convert what it was made of",
    )
    require(
        tokenizer.eos_token_id is not None,
        f"the tokenizer of '{source}' has no end-of-sequence token: set eos_token in its tokenizer_config.json",
    )
    before = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    # A published checkpoint has a trained mask token; what it does not say of itself is said here.
    mask_token_id = published_mask_token(network, tokenizer) if entry else give_mask_token(network, tokenizer, config.mask_token, seed)
    origin: Any = entry["block_origin"] if entry else "document_start"
    spec = Spec(objective, config.block_size, mask_token_id, config.right_shift, block_origin=origin)
    model = DiffusionModel(network, tokenizer, spec).eval()
    _prove_weights(model, before)
    model.spec = measure_head(model)
    for kernel in kernels(model):
        with attention(model, kernel):
            prove(model)
    model.save(output_dir, stage={"stage": "convert", "source": str(config.model), "revision": config.revision})
    return model


# --- proofs ---------------------------------------------------------------------------------------


def kernels(model: DiffusionModel) -> list[str]:
    """The attention kernels that this family has, its own choice first."""
    own = model.network.config._attn_implementation
    return [own, *(k for k in KERNELS if k != own and (k == "eager" or model.network._supports_sdpa))]


@contextmanager
def attention(model: DiffusionModel, kernel: str) -> Iterator[None]:
    """Another attention kernel for the time being."""
    own = model.network.config._attn_implementation
    model.set_attention(kernel)
    try:
        yield
    finally:
        model.set_attention(own)


@torch.no_grad()
def prove(model: DiffusionModel) -> None:
    """Show on this very model that explicit masks and positions are obeyed; raise `UserError` otherwise.

    1. Every layer lets a position depend on exactly those that its mask shows it: all of them, later ones too, in one block,
       and in the layout of training. 2. Nothing outside the layers mixes positions. 3. Slots in another order, with their
    positions, give the same result. 4. Blocks of one token are the autoregressive network. 5. A block on top of a KV cache
    equals the uncached forward.
    """
    _prove_masks(model)
    _prove_results(model)


def _claim(model: DiffusionModel, holds: bool, what: str) -> None:
    kernel = model.network.config._attn_implementation
    require(holds, f"{_refusal(model)}: {what} (attention={kernel}). Choose a decoder whose attention takes an explicit mask")


def _refusal(model: DiffusionModel) -> str:
    return f"{type(model.network).__name__} (model_type '{model.network.config.model_type}') cannot be converted"


def _hidden(model: DiffusionModel, *args: Any) -> Tensor:
    """`model.hidden`; raises `UserError` where the network's code does not take what it is given."""
    try:
        return model.hidden(*args)
    except FORWARD_ERRORS as error:
        reason = f"its forward refuses an explicit mask, positions or a cache ({type(error).__name__}: {error})"
        raise UserError(f"{_refusal(model)}: {reason}") from error


def _prove_masks(model: DiffusionModel) -> None:
    """Claim 1, exactly: by which inputs have a gradient."""
    position = torch.arange(SLOTS, device=model.device)[None]
    one_block = Slots.clean(position, torch.zeros_like(position))
    of_training = Slots(
        position=torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 0, 1]]),
        block=torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 0, 0, 0]]),
        document=torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]]),
        view=torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]]),
        valid=torch.ones(1, SLOTS, dtype=torch.bool),
    )
    for slots in (one_block, of_training.map(lambda x: x.to(model.device))):
        reach_NQS = layer_reach(model, _tokens(model, SLOTS), slots)
        _claim(model, len(reach_NQS) > 0, "its layers cannot be told apart, so that nothing can be shown of each")
        for layer, reach_QS in enumerate(reach_NQS):
            allowed_QS = may_attend(slots, slots, window(model, layer))[0]
            for query, key in (allowed_QS & ~reach_QS).nonzero().tolist()[:1]:
                _claim(model, False, f"in layer {layer} slot {query} does not see slot {key} (still causal)")
            for query, key in (reach_QS & ~allowed_QS).nonzero().tolist()[:1]:
                _claim(model, False, f"in layer {layer} slot {query} sees slot {key}, which is masked (a leak)")


def _prove_results(model: DiffusionModel) -> None:
    """Claims 2 to 5, by what comes out."""
    tolerance = 1e-4 if model.network.dtype == torch.float32 else 5e-2

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))

    block, length = 4, 12
    ids = _tokens(model, length)
    position = torch.arange(length, device=model.device)[None]
    blocks = Slots.clean(position, position // block)
    alone = dataclasses.replace(Slots.clean(position, torch.zeros_like(position)), document=position)
    changed = ids.clone()
    changed[0, length // 2] = ids[0, 0]
    others = position[0] != length // 2
    is_alone = same(_hidden(model, changed, alone)[:, others], _hidden(model, ids, alone)[:, others])
    _claim(model, is_alone, "a position depends on another that is masked in every layer (a leak outside of the attention)")

    in_blocks = _hidden(model, ids, blocks)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).to(model.device)
    _claim(
        model, same(_hidden(model, ids[:, order], blocks[:, order]), in_blocks[:, order]), "it does not take positions from position_ids"
    )
    causal = model.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    _claim(
        model,
        same(_hidden(model, ids, Slots.clean(position, position)), causal),
        "blocks of one token differ from the autoregressive network",
    )
    cache = DynamicCache()
    _hidden(model, ids[:, :-block], blocks[:, :-block], None, cache)
    last = _hidden(model, ids[:, -block:], blocks[:, -block:], blocks[:, :-block], cache)
    _claim(model, same(last, in_blocks[:, -block:]), "a block on top of the KV cache differs from the uncached forward")


def layer_reach(model: DiffusionModel, ids_BS: Tensor, slots: Slots) -> Tensor:
    """reach_NQS: whether layer N lets its output at slot Q depend on what enters the layers at slot S, by the gradient.

    Row q of a batch asks for query q. Each layer is cut off from the one before it; keys and values that it takes over from an
    earlier layer (as in Gemma 3n) count as its own.
    """
    queries = ids_BS.shape[1]
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        entering.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((entering[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering[-1]})

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        leaving.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_pre_hook(cut, with_kwargs=True) for layer in layers_of(model.network)]
    hooks += [layer.register_forward_hook(keep) for layer in layers_of(model.network)]
    try:
        with torch.enable_grad():
            _hidden(model, ids_BS.expand(queries, -1), slots)
    finally:
        for hook in hooks:
            hook.remove()
    index = torch.arange(queries, device=model.device)
    reach = []
    for layer, output in enumerate(leaving):
        with torch.enable_grad():
            asked = output[..., index, index, :]
        direction = torch.randn(asked.shape, generator=torch.Generator().manual_seed(0)).to(asked)  # a plain sum over a norm is constant
        gradients = torch.autograd.grad(asked, entering[: layer + 1], direction, retain_graph=True, allow_unused=True)
        seen = [(gradient != 0).any(-1).reshape(-1, queries, queries).any(0) for gradient in gradients if gradient is not None]
        reach.append(torch.stack(seen).any(0))
    return torch.stack(reach) if reach else torch.empty(0)


def layers_of(network: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, in order: the list that has as many members as the configuration says."""
    count = network.config.get_text_config().num_hidden_layers
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    return list(next((found for found in lists if len(found) == count), ()))


def window(model: DiffusionModel, layer: int) -> int | None:
    """Width of the sliding window of a layer; None where it sees everything."""
    config = model.network.config
    kinds = getattr(config, "layer_types", None)
    is_sliding = kinds[layer] == "sliding_attention" if kinds else True
    return getattr(config, "sliding_window", None) if is_sliding else None


def _tokens(model: DiffusionModel, length: int) -> Tensor:
    """A row [1, S] of different tokens, all of them ordinary."""
    rows = model.network.get_input_embeddings().weight.shape[0]
    return torch.arange(rows // 4, rows // 4 + length, device=model.device)[None]


def _prove_weights(model: DiffusionModel, before: dict[str, Tensor]) -> None:
    """Weights are those of the source; new rows may follow them, and an embedding's row of the mask token may differ."""
    after = model.network.state_dict()
    for key, weight in before.items():
        now = after.get(key)
        if now is not None and now.dim():
            now = now[: len(weight)]
        kept = now is not None and now.shape == weight.shape
        rows = (now != weight).reshape(len(weight) if weight.dim() else 1, -1).any(1).nonzero().flatten().tolist() if kept else None
        require(rows in ([], [model.spec.mask_token_id]), f"{_refusal(model)}: weight '{key}' changed")


@torch.no_grad()
def measure_head(model: DiffusionModel) -> Spec:
    """The spec with the scale and soft-cap that stand between the output embedding and the network's logits, measured and proved.

    Raises `UserError` where something else stands between them.
    """
    network, config = model.network, model.network.config
    name, ids = _refusal(model), _tokens(model, 8)
    try:
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = network(input_ids=ids, use_cache=False).logits.float()
        linear = network.get_output_embeddings()(hidden).float()
    except FORWARD_ERRORS as error:
        raise UserError(f"{name}: its logits do not come from its last hidden state ({type(error).__name__}: {error})") from error
    softcap = getattr(config, "final_logit_softcapping", None)
    uncapped = softcap * torch.atanh((expected / softcap).clamp(-1 + 1e-6, 1 - 1e-6)) if softcap else expected
    scale = float((uncapped * linear).sum() / linear.square().sum())
    scale = 1.0 if abs(scale - 1) < 1e-3 else scale
    found = linear * scale if softcap is None else softcap * torch.tanh(linear * scale / softcap)
    tolerance = 1e-3 if network.dtype == torch.float32 else 5e-2
    require(
        bool((found - expected).abs().max() <= tolerance * (1 + expected.abs().max())),
        f"{name}: its logits are not its output embedding times a scale, with or without a soft-cap",
    )
    return dataclasses.replace(model.spec, logit_scale=scale, logit_softcap=softcap)


# --- the mask token -------------------------------------------------------------------------------


def give_mask_token(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, seed: int) -> int:
    """The id of the tokenizer's mask token, or of `text` among its special tokens, or of `text` newly added with a row of its own.

    Raises `UserError` where that would be a token that also means something else.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    is_new = False
    if tokenizer.mask_token_id is None or tokenizer.mask_token_id in taken:
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        is_new = text not in tokenizer.get_vocab()
        require(
            is_new or (text in added and tokenizer.convert_tokens_to_ids(text) not in taken),
            f"'{text}' is already a token of this tokenizer that stands for something else: choose another with convert.mask_token=TEXT",
        )
        tokenizer.add_special_tokens({"mask_token": text})
    mask_token_id = int(tokenizer.convert_tokens_to_ids(tokenizer.mask_token))
    rows, needed = network.get_input_embeddings().weight.shape[0], max(len(tokenizer), mask_token_id + 1)
    if needed > rows:
        network.resize_token_embeddings(needed, mean_resizing=False)
    for embedding in (network.get_input_embeddings(), network.get_output_embeddings()):
        is_there = embedding is not None and embedding.weight.shape[0] > mask_token_id
        require(is_there, f"{type(network).__name__} cannot be converted: its embeddings cannot be given a row for a mask token")
    if is_new or mask_token_id >= rows:
        _initialise_row(network, mask_token_id, seed)
    return mask_token_id


@torch.no_grad()
def _initialise_row(network: PreTrainedModel, row: int, seed: int) -> None:
    """Draw the mask token's row from the normal distribution of the other rows: of their norm, not near zero, and no token's double."""
    for embedding in (network.get_input_embeddings(), network.get_output_embeddings()):
        others = embedding.weight[:row].float()
        noise = torch.randn(others.shape[1], generator=torch.Generator().manual_seed(seed)).to(others.device)
        embedding.weight[row] = (others.mean(0) + others.std(0) * noise).to(embedding.weight.dtype)
