"""Conversion: what it promises of every family, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, diffusion_model, network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from a2d_core import conversion, embedded, models
from a2d_core.config import ConvertConfig, UserError


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory with a tiny autoregressive model that has the embedded tokenizer."""
    family = getattr(request, "param", "qwen3")
    tokenizer = embedded.build_tokenizer()
    made = network(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    made.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_every_family_converts_with_the_same_weights_and_passes_the_proofs(source: Path, tmp_path: Path) -> None:
    before = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    conversion.convert(ConvertConfig(block_size=4), "bd3lm", source, tmp_path / "out")
    model = models.load(tmp_path / "out")
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight[: len(before[name])] if weight.dim() else weight, before[name]), name
    assert model.tokenizer.mask_token_id == model.spec.mask_token_id == model.network.get_input_embeddings().weight.shape[0] - 1
    assert model.objective.block_size == 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["a2d"]["chain"][0]["stage"] == "convert"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text", "mistral"])
def test_the_proofs_hold_for_sdpa_and_eager_attention(family: str, attention: str) -> None:
    conversion.prove(diffusion_model(family=family, attn_implementation=attention))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_chosen_positions_are_those_of_the_whole_network(family: str) -> None:
    model = diffusion_model(family=family)
    model.spec = conversion.measure_head(model)
    ids = torch.arange(3, 15)[None]
    expected = model.network(input_ids=ids).logits.float()
    hidden = model.network.base_model(input_ids=ids).last_hidden_state
    found = model.logits(hidden)
    allowed = torch.arange(expected.shape[-1]) != model.spec.mask_token_id
    assert torch.allclose(found[..., allowed], expected[..., allowed], atol=1e-3, rtol=1e-3)
    assert (found[..., ~allowed] == -torch.inf).all()


def test_a_network_that_stays_causal_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion_model()
    monkeypatch.setattr(model, "masks", lambda query, key: None)
    with pytest.raises(
        UserError, match=r"Qwen3ForCausalLM \(model_type 'qwen3'\) cannot be converted: in layer 0 slot 0 does not see slot 1"
    ):
        conversion.prove(model)


def test_a_leaking_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion_model()
    everything = lambda query, key: torch.ones(1, 1, query.position.shape[1], key.position.shape[1], dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(model, "masks", everything)
    with pytest.raises(UserError, match="a leak"):
        conversion.prove(model)


@pytest.mark.parametrize(
    ("sees", "message"),
    [
        (lambda mask: mask & torch.ones_like(mask).tril(), r"in layer 1 slot 0 does not see slot 1 \(still causal\)"),
        (lambda mask: torch.ones_like(mask), r"in layer 1 slot 0 sees slot 2, which is masked \(a leak\)"),
    ],
    ids=["causal", "leaking"],
)
def test_one_layer_that_has_a_mask_of_its_own_is_found_and_named(sees: Callable[[Tensor], Tensor], message: str) -> None:
    """The other layer hides it: what comes out of the network moves, and is moved, as it should be."""
    model = diffusion_model()

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": sees(kwargs["attention_mask"])}

    model.network.model.layers[1].register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(UserError, match=message):
        conversion.prove(model)


def test_what_mixes_positions_outside_of_the_layers_is_refused() -> None:
    model = diffusion_model()
    model.network.model.norm.register_forward_hook(lambda _module, _args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserError, match="a leak outside of the attention"):
        conversion.prove(model)


def test_a_window_that_the_network_does_not_have_is_noticed() -> None:
    model = diffusion_model(family="mistral")
    own = model.masks
    model.masks = lambda query, key: own(query, key) & (query.position[0, :, None] - key.position[0] < 3)  # narrower than its 6
    with pytest.raises(UserError, match=r"does not see|differ from the autoregressive network"):
        conversion.prove(model)


def test_every_kernel_of_the_family_is_proved(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved = []
    monkeypatch.setattr(conversion, "prove", lambda model: proved.append(model.network.config._attn_implementation))
    model = conversion.convert(ConvertConfig(), "mdlm", source, tmp_path / "out")
    assert proved == ["sdpa", "eager"] and model.network.config._attn_implementation == "sdpa"


def test_a_network_that_ignores_positions_is_refused() -> None:
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)).eval()
    model = models.DiffusionModel(bloom, embedded.build_tokenizer(), models.Spec("bd3lm", 4, 99))
    with pytest.raises(UserError, match="BloomForCausalLM"):
        conversion.prove(model)


def test_changed_weights_are_noticed() -> None:
    model = diffusion_model()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    with torch.no_grad():
        model.network.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(UserError, match=r"layers\.0\.mlp.up_proj.weight' changed"):
        conversion._prove_weights(model, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2), "'t5' is an encoder-decoder"),
        (transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4), "'mamba' has linear_attention layers"),
        (transformers.Lfm2Config(hidden_size=32, num_hidden_layers=2, layer_types=["conv", "full_attention"]), "'lfm2' has conv layers"),
    ],
    ids=["encoder-decoder", "mamba", "hybrid"],
)
def test_what_cannot_be_converted_is_refused_by_name(config: transformers.PreTrainedConfig, message: str, tmp_path: Path) -> None:
    if config.model_type == "mamba":
        transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    else:
        config.save_pretrained(tmp_path)
    embedded.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        conversion.convert(ConvertConfig(), "mdlm", tmp_path, tmp_path / "out")


def test_an_existing_mask_token_is_used_and_no_row_is_added(source: Path, tmp_path: Path) -> None:
    tokenizer = embedded.build_tokenizer()
    tokenizer.mask_token = "~"
    tokenizer.save_pretrained(source)
    model = conversion.convert(ConvertConfig(), "mdlm", source, tmp_path / "out")
    assert model.spec.mask_token_id == tokenizer.convert_tokens_to_ids("~")
    assert model.network.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_the_row_of_an_existing_mask_token_is_kept_where_others_are_added(source: Path, tmp_path: Path) -> None:
    tokenizer = embedded.build_tokenizer()
    tokenizer.mask_token = "~"
    tokenizer.add_tokens("<|tool|>")  # the weights have no row for it
    tokenizer.save_pretrained(source)
    before = transformers.AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    model = conversion.convert(ConvertConfig(), "mdlm", source, tmp_path / "out")
    after = model.network.get_input_embeddings().weight
    assert len(after) == len(before) + 1 and torch.equal(after[: len(before)], before)


def test_a_new_mask_row_has_the_norm_of_the_others_and_is_no_tokens_double(source: Path, tmp_path: Path) -> None:
    model = conversion.convert(ConvertConfig(), "mdlm", source, tmp_path / "out")
    rows = model.network.get_input_embeddings().weight
    norms, mask = rows[:-1].norm(dim=1), rows[model.spec.mask_token_id]
    assert norms.min() * 0.7 < mask.norm() < norms.max() * 1.3
    assert (rows[:-1] - mask).norm(dim=1).min() > 0.5 * norms.mean()


def test_a_plain_checkpoint_is_not_loaded_as_a_diffusion_model(source: Path) -> None:
    with pytest.raises(UserError, match=r"is not a diffusion checkpoint.*a2d_core convert"):
        models.load(source)


@pytest.mark.parametrize(("path", "message"), [("./nowhere", "does not exist"), ("Qwen/Qwen3-0.6B", "HF_HUB_OFFLINE")])
def test_a_missing_model_is_a_clear_error(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.load(path)


def test_saving_and_loading_changes_nothing(source: Path, tmp_path: Path) -> None:
    made = conversion.convert(ConvertConfig(block_size=8, dtype="bfloat16"), "bd3lm", source, tmp_path / "a")
    loaded = models.load(tmp_path / "a", dtype=torch.float32)
    assert loaded.spec == models.load(tmp_path / "a").spec and loaded.stored_dtype == torch.bfloat16
    loaded.network.to(loaded.stored_dtype)
    loaded.save(tmp_path / "b")
    again = models.load(tmp_path / "b")
    assert again.network.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(made.network.parameters(), again.network.parameters(), strict=True))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_flex_attention_scores_what_the_dense_mask_scores(objective: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run uncompiled, on a CPU: the masks and the padding to tiles are the same as on a GPU."""
    monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention.__call__", lambda self: flex_attention)
    model = diffusion_model(objective, family=family)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    turn = torch.ones_like(ids)
    found = []
    for implementation in (model.network.config._attn_implementation, "flex_attention"):
        model.set_attention(implementation)
        of_turn = []
        for turn[1, :9] in (1, 0):  # rows that are alike, and rows that are not
            streams = model.objective.streams(ids, turn)
            is_masked = (torch.rand(2, *streams.chunk_BT.shape, generator=torch.Generator().manual_seed(1)) < 0.5) & streams.is_maskable_BT
            with torch.no_grad():
                of_turn.append(model(model.objective.layout(streams, is_masked, torch.ones(is_masked.shape)))[1])
        found.append(torch.cat(of_turn))
    assert found[0].sum() > 0 and torch.allclose(*found, atol=1e-4)


def test_a_family_without_flex_attention_says_so() -> None:
    model = diffusion_model("bd3lm", family="gpt2")
    model.set_attention("auto")
    assert model.network.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="GPT2LMHeadModel has no FlexAttention in transformers: set attention=auto"):
        model.set_attention("flex_attention")


def test_bfloat16_training_on_a_cpu_attends_in_float32_and_its_gradient_is_that_of_the_plain_kernel() -> None:
    model = diffusion_model(family="qwen3").train()
    ids = torch.arange(3, 19)[None]
    layout = model.objective.layout(
        model.objective.streams(ids, torch.ones_like(ids)), (torch.arange(16) % 2 == 0)[None, None], torch.ones(1, 1, 16)
    )

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "scaled_dot_product" in str(function):
                seen.append((str(function), args[0].dtype if "backward" not in str(function) else args[1].dtype))
            return function(*args, **(kwargs or {}))

    gradients = []
    for kernel in (nullcontext(), sdpa_kernel(SDPBackend.MATH)):
        seen: list[tuple[str, torch.dtype]] = []
        model.zero_grad(set_to_none=True)
        with kernel, torch.autocast("cpu", torch.bfloat16):
            with Dtypes():
                loss = model(layout)[0]
            loss.backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
        if isinstance(kernel, nullcontext):
            assert {dtype for _, dtype in seen} == {torch.float32}
            assert all("flash" in name for name, _ in seen) and len(seen) == model.network.config.num_hidden_layers
    fused, plain = (torch.cat([grad.flatten() for grad in found]) for found in gradients)
    assert (fused - plain).norm() < 0.03 * plain.norm()
