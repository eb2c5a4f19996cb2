"""Generation, held against a reference: one row at a time, no cache, every block recomputed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import byte_model, diffusion_model
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import sampling
from a2d_core.attention import Slots
from a2d_core.config import SampleConfig, UserError
from a2d_core.models import DiffusionModel

CONFIG = SampleConfig(max_new_tokens=9, batch_size=4)


def reference(model: DiffusionModel, prompt: list[int], config: SampleConfig) -> tuple[list[int], int]:
    """Greedy generation by the definition: the visible prefix is run from nothing at every evaluation."""
    end, size = len(prompt) + config.max_new_tokens, model.objective.block_size
    tokens = prompt + [model.spec.mask_token_id] * config.max_new_tokens
    first = len(prompt) // size * size if size else len(prompt)
    width = size or config.block_size or config.max_new_tokens
    at_once = 1 if config.steps_per_block is None else -(-width // config.steps_per_block)
    stops, nfe = set(model.stop_token_ids), 0

    def answer() -> list[int] | None:
        for i in range(len(prompt), end):
            if tokens[i] == model.spec.mask_token_id:
                return None
            if tokens[i] in stops:
                return tokens[len(prompt) : i]
        return tokens[len(prompt) :]

    for start in range(first, end, width):
        while True:
            open_positions = [i for i in range(start, min(start + width, end)) if tokens[i] == model.spec.mask_token_id]
            if not open_positions or answer() is not None:
                break
            seen = min(start + width, end) if size else end
            position = torch.arange(seen)[None]
            slots = Slots.clean(position, model.objective.block_of(position))
            with torch.no_grad():
                probability = model.logits(model.hidden(torch.tensor([tokens[:seen]]), slots))[0].softmax(-1)
            nfe += 1
            best = {i: probability[i - int(model.objective.right_shift)].max(-1) for i in open_positions}
            ranked = sorted(open_positions, key=lambda i: -float(best[i].values))
            chosen = set(ranked[:at_once]) | {i for i in open_positions if config.threshold and best[i].values >= config.threshold}
            for i in chosen:
                tokens[i] = int(best[i].indices)
    return answer() or [], nfe


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


@settings(max_examples=25, deadline=None)
@given(
    objective=st.sampled_from(["mdlm", "bd3lm"]),
    family=st.sampled_from(["qwen3", "gpt2", "gemma3_text", "olmo2"]),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    steps=st.sampled_from([None, 1, 2, 3]),
    threshold=st.sampled_from([None, 0.5, 0.9]),
    width=st.sampled_from([None, 3]),
    seed=st.integers(0, 5),
)
def test_batched_and_cached_generation_equals_the_reference(
    objective: str, family: str, lengths: list[int], steps: int | None, threshold: float | None, width: int | None, seed: int
) -> None:
    model = diffusion_model(objective, family=family, seed=seed).double()
    model.network.config.dtype = torch.float64
    config = replace(CONFIG, steps_per_block=steps, threshold=threshold, block_size=width)
    prompts = prompts_of(lengths, seed)
    found = sampling.generate(model, prompts, config)
    assert [(g.tokens, g.nfe) for g in found] == [reference(model, prompt, config) for prompt in prompts]


def test_the_right_shift_is_read_at_the_position_before() -> None:
    model = diffusion_model("mdlm", right_shift=True).double()
    prompts = prompts_of([3, 7])
    assert [(g.tokens, g.nfe) for g in sampling.generate(model, prompts, CONFIG)] == [reference(model, p, CONFIG) for p in prompts]


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_the_mask_token_is_never_produced(objective: str, temperature: float) -> None:
    model = diffusion_model(objective)
    with torch.no_grad():
        model.network.get_output_embeddings().weight[model.spec.mask_token_id] *= 1000
    config = replace(CONFIG, temperature=temperature, max_new_tokens=40)
    for generation in sampling.generate(model, prompts_of([2, 5, 9]), config, generator=torch.Generator().manual_seed(0)):
        assert model.spec.mask_token_id not in generation.tokens


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_a_draw_is_repeated_by_its_generator(objective: str) -> None:
    model, config = byte_model(objective), replace(CONFIG, temperature=1.0, top_p=0.9, policy="random")
    first, again, other = (
        sampling.generate(model, prompts_of([4, 6]), config, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_generation_ends_before_the_stop_token(objective: str) -> None:
    model = byte_model(objective)
    head = model.network.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[model.eos_token_id] = 10
    (generation,) = sampling.generate(model, [[5, 6, 7]], CONFIG)
    assert generation.tokens == [] and generation.finished and generation.nfe <= 9


def test_fixed_steps_bound_the_evaluations_and_a_threshold_of_zero_confidence_needs_one_per_block() -> None:
    model = diffusion_model("bd3lm", block_size=4)
    (two,) = sampling.generate(model, prompts_of([8]), replace(CONFIG, max_new_tokens=12, steps_per_block=2))
    (one,) = sampling.generate(model, prompts_of([8]), replace(CONFIG, max_new_tokens=12, threshold=1e-9))
    assert two.nfe <= 6 and one.nfe <= 3


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    probability = torch.tensor([[[0.1, 0.5, 0.15, 0.25]]])
    assert sampling.keep_top_p(probability, 0.7)[0, 0].tolist() == pytest.approx([0, 0.5, 0, 0.25])
    assert sampling.keep_top_p(probability, 0.01)[0, 0].tolist() == pytest.approx([0, 0.5, 0, 0])
    assert torch.equal(sampling.keep_top_p(probability, 1.0), probability)


def test_what_exceeds_the_context_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"need 130 positions, but the model's context is 128.*max_new_tokens=120"):
        sampling.generate(diffusion_model(), prompts_of([10]), replace(CONFIG, max_new_tokens=120))
