"""Generation, held against a reference: one row at a time, no cache, everything visible recomputed, token by token in Python."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, byte_model, diffusion_model
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import policies, sampling
from a2d_core.attention import Slots
from a2d_core.cache import SlotCache
from a2d_core.config import SampleConfig, UserError
from a2d_core.models import DiffusionModel

CONFIG = SampleConfig(max_new_tokens=9, batch_size=3)
OBJECTIVES = ["mdlm", "bd3lm"]


def double(objective: str, **options: object) -> DiffusionModel:
    model = diffusion_model(objective, **options).double()
    model.network.config.dtype = torch.float64
    if options.get("family") == "qwen3_moe":
        model.network.set_experts_implementation("eager")  # the grouped product takes no float64
    return model


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def log_probabilities(model: DiffusionModel, tokens: list[int], given: set[int], lead: int, config: SampleConfig) -> torch.Tensor:
    """[L, V] of the tokens that are visible, in float64; the guided ones where there is guidance."""
    position = torch.arange(len(tokens))[None]
    slots = Slots.clean(position, model.objective.block_of(position, lead))
    output = model.network.get_output_embeddings()

    def logits(ids: list[int]) -> torch.Tensor:
        hidden = model.hidden(torch.tensor([ids]), slots)
        return model.head.logits(hidden, output.weight, getattr(output, "bias", None), torch.float64)[0]

    found = logits(tokens)
    if config.guidance:
        without = [model.spec.mask_token_id if i in given else token for i, token in enumerate(tokens)]
        found = (1 + config.guidance) * found - config.guidance * logits(without)
    found[:, [model.spec.mask_token_id, *config.suppressed_tokens]] = -torch.inf
    return found


def reference(model: DiffusionModel, prompt: list[int], config: SampleConfig) -> tuple[list[int], int]:
    """Greedy generation by the definitions."""
    mask, size = model.spec.mask_token_id, model.objective.block_size
    begin, end = len(prompt), len(prompt) + config.max_new_tokens
    tokens = prompt + [mask] * config.max_new_tokens
    lead = -begin % size if size and config.block_origin == "prompt_end" else 0
    first = (begin + lead) // size * size - lead if size else begin
    width = size or min(config.block_size or config.max_new_tokens, config.max_new_tokens)
    at_once = 1 if config.steps_per_block is None else -(-width // config.steps_per_block)
    stops, nfe = set(model.stop_token_ids), 0

    def answer() -> list[int] | None:
        for i in range(begin, end):
            if tokens[i] == mask:
                return None
            if tokens[i] in stops:
                return tokens[begin:i]
        return tokens[begin:]

    for start in range(first, end, width):
        active = range(max(start, begin), min(start + width, end))
        sure: dict[int, float] = {}  # log-probability of what this stretch has revealed
        while answer() is None and (opened := [i for i in active if tokens[i] == mask]):
            seen = min(start + width, end) if size else end
            logits = log_probabilities(model, tokens[:seen], set(range(begin)), lead, config)
            nfe += 2 if config.guidance else 1
            best, score, entropy = {}, {}, {}
            for i in opened:
                row = logits[i - int(model.objective.right_shift)].clone()
                if i < begin + config.min_new_tokens:
                    row[[stop for stop in stops if stop < len(row)]] = -torch.inf
                row = row.log_softmax(-1)
                top = row.topk(2)
                best[i] = (int(top.indices[0]), float(top.values[0]))
                entropy[i] = -float((row.exp() * row.clamp(min=-1e9)).sum())
                margin = float(top.values[0].exp() - top.values[1].exp())
                score[i] = {"confidence": best[i][1], "margin": margin, "entropy": -entropy[i]}[config.policy]
            ranked = sorted(opened, key=lambda i: -score[i])
            again = max(0, min(math.floor(config.remasking * len(sure)), len(opened) - at_once))
            chosen = set(ranked[: at_once + again])
            if config.threshold is not None:
                chosen |= {i for i in opened if best[i][1] >= math.log(config.threshold)}
            if config.entropy_budget is not None:
                spent = [entropy[i] for i in ranked]
                chosen |= {i for n, i in enumerate(ranked) if sum(spent[: n + 1]) - max(spent[: n + 1]) <= config.entropy_budget}
            for i in sorted(sure, key=lambda i: sure[i])[:again]:
                tokens[i] = mask
                del sure[i]
            for i in chosen:
                tokens[i], sure[i] = best[i]
    return answer() or [], nfe


HOW_MANY = st.one_of(
    st.builds(dict, steps_per_block=st.sampled_from([None, 1, 2, 3])),
    st.builds(dict, threshold=st.sampled_from([0.3, 0.9])),
    st.builds(dict, entropy_budget=st.sampled_from([0.0, 0.5, 3.0])),
    st.builds(dict, steps_per_block=st.sampled_from([3, 4]), remasking=st.sampled_from([0.4, 0.9])),
)


@settings(max_examples=60, deadline=None)
@given(
    objective=st.sampled_from(OBJECTIVES),
    family=st.sampled_from(["qwen3", "gpt2", "gemma2", "gemma3_text", "olmo2", "mistral"]),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    how_many=HOW_MANY,
    policy=st.sampled_from(["confidence", "margin", "entropy"]),
    more=st.sampled_from([
        {}, {"block_size": 3}, {"min_new_tokens": 4}, {"suppressed_tokens": (5, 17, 60)}, {"block_origin": "prompt_end"}, {"guidance": 0.7},
    ]),
    is_static=st.booleans(),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_batched_and_cached_generation_equals_the_reference(
    objective: str, family: str, lengths: list[int], how_many: dict, policy: str, more: dict, is_static: bool, seed: int
) -> None:
    refused = {"mdlm": "block_origin", "bd3lm": "guidance"}[objective]
    more = {name: value for name, value in more.items() if name != refused}
    model = double(objective, family=family, seed=seed)
    config = replace(CONFIG, policy=policy, cuda_graph=is_static, **how_many, **more)
    prompts = prompts_of(lengths, seed)
    found = sampling.generate(model, prompts, config)
    assert [(g.tokens, g.nfe) for g in found] == [reference(model, prompt, config) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_family_generates_as_the_reference_does(objective: str, family: str) -> None:
    model = double(objective, family=family)
    prompts = prompts_of([13, 2, 7, 8])
    found = sampling.generate(model, prompts, CONFIG)
    assert [(g.tokens, g.nfe) for g in found] == [reference(model, prompt, CONFIG) for prompt in prompts]


@pytest.mark.parametrize("more", [{}, {"block_size": 3}, {"guidance": 1.0}])
def test_the_right_shift_is_read_at_the_position_before(more: dict) -> None:
    model, config = double("mdlm", right_shift=True), replace(CONFIG, **more)
    prompts = prompts_of([3, 7])
    assert [(g.tokens, g.nfe) for g in sampling.generate(model, prompts, config)] == [reference(model, p, config) for p in prompts]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "policy": "random"}])
def test_a_row_does_not_depend_on_its_companions(objective: str, more: dict) -> None:
    model, prompts, lengths = double(objective), prompts_of([13, 2, 7, 8, 3]), [9, 1, 14, 6, 9]
    config = replace(CONFIG, **more)

    def answers(batch_size: int, count: int) -> list[sampling.Generation]:
        return sampling.generate(
            model, prompts[:count], replace(config, batch_size=batch_size), max_new_tokens=lengths[:count],
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    together = answers(5, 5)
    for other in (answers(1, 5), answers(2, 5), [*answers(3, 3), *together[3:]]):
        assert [(g.tokens, g.nfe, pytest.approx(g.logprob)) for g in other] == [(g.tokens, g.nfe, g.logprob) for g in together]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("right_shift", [False, True])
def test_an_approximate_cache_is_exact_where_a_block_takes_one_evaluation(cache: str, right_shift: bool) -> None:
    model, prompts = double("mdlm", right_shift=right_shift), prompts_of([13, 2, 7])
    config = replace(CONFIG, block_size=3, steps_per_block=1)
    assert sampling.generate(model, prompts, replace(config, cache=cache)) == sampling.generate(model, prompts, config)


@pytest.mark.parametrize("right_shift", [False, True])
def test_the_prefix_cache_is_exact_where_nothing_before_the_block_sees_it(right_shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a causal mask what lies before a block does not change with it."""
    model, prompts = double("mdlm", right_shift=right_shift), prompts_of([13, 2, 7])
    config, masks = replace(CONFIG, block_size=3), DiffusionModel.masks
    causal = lambda self, query, key: masks(self, replace(query, block=query.position), replace(key, block=key.position))  # noqa: E731
    monkeypatch.setattr(DiffusionModel, "masks", causal)
    exact, prefix = (sampling.generate(model, prompts, replace(config, cache=cache)) for cache in ("exact", "prefix"))
    assert [g.tokens for g in exact] == [g.tokens for g in prefix]


def test_block_diffusion_computes_every_final_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt once, each block once per evaluation, and once more with the first evaluation of the block behind it."""
    model, computed = diffusion_model("bd3lm"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest, **options: computed.append(ids.shape) or hidden(ids, *rest, **options))
    sampling.generate(model, prompts_of([16, 16]), replace(CONFIG, max_new_tokens=8, steps_per_block=2))
    assert computed == [(2, 12), (2, 8), (2, 4), (2, 8), (2, 4)]


def test_the_cache_is_written_in_place() -> None:
    cache = SlotCache(rows=2, slots=6)
    place = cache.place(torch.tensor([[0, 1], [4, 5]]), torch.tensor([[True, True], [True, False]]), torch.tensor([0, 1]))
    new = torch.randn(2, 3, 2, 5)
    seen, _ = cache.write(place, (2, 5)).update(new, new, 0)
    assert torch.equal(seen[0, :, :2], new[0]) and torch.equal(seen[1, :, 4], new[1, :, 0]) and seen[1, :, :4].eq(0).all()
    stored = cache.layers[0].keys
    again, _ = cache.write(place, (1, 3)).update(-new, -new, 0)
    assert cache.layers[0].keys is stored and again.data_ptr() == seen.data_ptr() and torch.equal(again[0, :, :2], -new[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "more", [{}, {"temperature": 1.0}, {"temperature": 50.0}, {"temperature": 9.0, "top_k": 99}, {"temperature": 9.0, "top_p": 0.99}]
)
def test_the_mask_token_and_suppressed_tokens_are_never_produced(objective: str, more: dict) -> None:
    model = diffusion_model(objective)
    with torch.no_grad():
        model.network.get_output_embeddings().weight[[model.spec.mask_token_id, 7]] *= 1000
    config = replace(CONFIG, max_new_tokens=40, suppressed_tokens=(7,), **more)
    for generation in sampling.generate(model, prompts_of([2, 5, 9]), config, generator=torch.Generator().manual_seed(0)):
        assert not {model.spec.mask_token_id, 7} & set(generation.tokens)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_draw_is_repeated_by_its_generator(objective: str) -> None:
    model, config = byte_model(objective), replace(CONFIG, temperature=1.0, top_p=0.9, policy="random")
    first, again, other = (
        sampling.generate(model, prompts_of([4, 6]), config, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def ending_model(objective: str) -> DiffusionModel:
    """A model that is sure of nothing but the end."""
    model = byte_model(objective)
    head = model.network.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[model.eos_token_id] = 10
    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_generation_ends_before_the_stop_token(objective: str) -> None:
    (generation,) = sampling.generate(ending_model(objective), [[5, 6, 7]], CONFIG)
    assert generation.tokens == [] and generation.text == "" and generation.finished and generation.nfe <= 9


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_stop_token_comes_before_the_minimum_length(objective: str) -> None:
    (generation,) = sampling.generate(ending_model(objective), [[5, 6, 7]], replace(CONFIG, min_new_tokens=6))
    assert len(generation.tokens) == 6 and generation.finished


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stop_text_ends_an_answer_and_is_cut_with_what_follows(objective: str) -> None:
    model, prompts = byte_model(objective), prompts_of([3, 6, 9])
    config = replace(CONFIG, max_new_tokens=24, block_size=4, suppressed_tokens=(257, 258))
    whole = sampling.generate(model, prompts, config)
    stops = [[generation.text[5:7]] for generation in whole]
    for full, cut, (stop,) in zip(whole, sampling.generate(model, prompts, config, stop=stops), stops, strict=True):
        assert cut.text == full.text.split(stop)[0] and cut.finished
        assert cut.tokens == full.tokens[: len(cut.tokens)] and model.tokenizer.decode(cut.tokens).startswith(cut.text)
        assert cut.nfe < full.nfe
    (first, *_) = sampling.generate(model, prompts, replace(config, stop=(stops[0][0],)))
    assert first.text == whole[0].text.split(stops[0][0])[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_is_given_up_when_it_deviates_from_what_is_expected(objective: str) -> None:
    model, prompts = byte_model(objective), prompts_of([3, 6, 9])
    config = replace(CONFIG, max_new_tokens=12, block_size=4)
    free = sampling.generate(model, prompts, config)
    wanted = [list(free[0].tokens), [*free[1].tokens[:-1], 5], [token ^ 1 for token in free[2].tokens]]
    same, last, none = sampling.generate(model, prompts, config, expected=wanted)
    assert (same.tokens, same.nfe) == (free[0].tokens, free[0].nfe)
    assert last.tokens != wanted[1] and none.tokens != wanted[2]
    assert none.nfe == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("more", [{"threshold": 0.5}, {"steps_per_block": 3, "remasking": 0.6}, {"temperature": 1.0, "block_size": 3}])
def test_the_events_of_a_stream_replay_its_generations(objective: str, more: dict) -> None:
    model, config, prompts = byte_model(objective), replace(CONFIG, **more), prompts_of([3, 6, 9, 4])
    drawn = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = sampling.generate(model, prompts, config, generator=drawn[0])
    replayed: list[dict[int, int]] = [{} for _ in prompts]
    finished, nfe = {}, [0] * len(prompts)
    for event in sampling.stream(model, prompts, config, generator=drawn[1]):
        if event.generation is not None:
            finished[event.prompt] = event.generation
            continue
        assert event.nfe == nfe[event.prompt] + 1 and event.prompt not in finished
        nfe[event.prompt] = event.nfe
        for position in event.remasked:
            del replayed[event.prompt][position]
        for position, token, probability in event.revealed:
            assert position not in replayed[event.prompt] and 0 <= probability <= 1 + 1e-6
            replayed[event.prompt][position] = token
    assert [finished[i] for i in range(len(prompts))] == expected
    for prompt, tokens, generation in zip(prompts, replayed, expected, strict=True):
        assert [tokens[len(prompt) + i] for i in range(len(generation.tokens))] == generation.tokens


def test_fixed_steps_bound_the_evaluations_and_remasking_does_not_add_any() -> None:
    model = diffusion_model("bd3lm", block_size=4)
    for more in ({}, {"remasking": 0.9}):
        (two,) = sampling.generate(model, prompts_of([8]), replace(CONFIG, max_new_tokens=12, steps_per_block=2, **more))
        assert two.nfe <= 6
    (one,) = sampling.generate(model, prompts_of([8]), replace(CONFIG, max_new_tokens=12, threshold=1e-9))
    assert one.nfe <= 3


# --- the small decisions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(None, 0.7, [1, 3]), (None, 0.01, [1]), (2, 1.0, [1, 3]), (3, 0.6, [1, 3]), (3, 0.5, [1])]
)
def test_top_p_keeps_the_smallest_sufficient_set_and_top_k_the_largest(top_k: int | None, top_p: float, kept: list[int]) -> None:
    weight = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.0, 5.0, 0.0, 5.0]])
    floor = policies.kept_floor(weight, top_k, top_p)
    assert (weight >= floor)[0].nonzero()[:, 0].tolist() == kept


def test_top_p_sorts_the_whole_vocabulary_where_the_first_tokens_do_not_make_it_up() -> None:
    weight = torch.rand(3, 4 * policies.NUCLEUS)
    ordered = weight.sort(descending=True).values
    needed = ((ordered.cumsum(-1) - ordered) < 0.9 * weight.sum(-1, keepdim=True)).sum(-1)
    assert (needed > policies.NUCLEUS).all() and torch.equal((weight >= policies.kept_floor(weight, None, 0.9)).sum(-1), needed)


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.3, 1.0, 7.0]), min_size=1, max_size=200), u=st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_running_sum_and_never_takes_what_has_no_weight(weights: list[float], u: float) -> None:
    if sum(weights) == 0:
        weights[0] = 1.0
    weight = torch.tensor([weights])
    (index,), (total,) = policies.draw(weight, torch.tensor([u], dtype=torch.float32))
    assert weights[index] > 0 and total == pytest.approx(sum(weights))
    upto = torch.tensor(weights).double().cumsum(0)
    slack = 1e-5 * float(upto[-1])
    assert upto[index] - weights[index] - slack <= u * upto[-1] <= upto[index] + slack


@given(logits=st.lists(st.sampled_from([policies.NEVER, -3.0, 0.0, 2.5]), min_size=1, max_size=3 * policies.GROUP))
def test_of_equally_high_logits_the_first_is_found(logits: list[float]) -> None:
    (best,), (index,) = policies.highest(torch.tensor([logits]))
    assert best == max(logits) and index == logits.index(max(logits))


@pytest.mark.parametrize(("more", "bend"), [({}, 1.0), ({"temperature": 0.5}, 2.0)])
def test_draws_follow_the_softmax_though_the_vocabulary_is_read_in_chunks(more: dict, bend: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies.CHUNK, "cpu", 17)
    model = diffusion_model("mdlm")
    reader = policies.Reader(model, replace(CONFIG, **{"temperature": 1.0, **more}), seed=3)
    model.requires_grad_(False)
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) * 0.05
    count = 40_000
    proposal = reader.read([(1.0, hidden.expand(count, -1))], None, (torch.arange(count),))
    log_p = model.logits(hidden)[0].log_softmax(-1)
    expected = (log_p * bend).softmax(-1)
    assert torch.allclose(proposal.logprob, log_p[proposal.token], atol=1e-5)
    share = proposal.token.bincount(minlength=len(expected)) / count
    assert float((share - expected).abs().sum()) < 0.05


@pytest.mark.parametrize("width", [1, 33])
def test_the_margin_does_not_depend_on_the_chunks_in_which_the_vocabulary_is_read(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden = diffusion_model("mdlm").requires_grad_(False), torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    model.spec = replace(model.spec, mask_token_id=0)  # so that the last chunk, of one token, may have the best
    keys = (torch.arange(200),)
    whole = policies.Reader(model, replace(CONFIG, policy="margin"), seed=0).read([(1.0, hidden)], None, keys)
    monkeypatch.setitem(policies.CHUNK, "cpu", width)
    found = policies.Reader(model, replace(CONFIG, policy="margin"), seed=0).read([(1.0, hidden)], None, keys)
    assert (whole.token == len(model.output_embedding()[0]) - 1).any() and torch.equal(found.token, whole.token)
    assert torch.allclose(found.margin, whole.margin, atol=1e-5)


def test_a_confident_position_goes_before_any_budget_and_a_large_budget_takes_all() -> None:
    score, entropy, is_open = (
        torch.tensor([[3.0, 1.0, 2.0, 9.0]]),
        torch.tensor([[0.5, 2.0, 1.0, 0.0]]),
        torch.tensor([[True, True, True, False]]),
    )
    taken = [policies.reveal_within_budget(score, entropy, is_open, budget)[0].tolist() for budget in (0.0, 0.5, 1.5)]
    assert taken == [[True, False, False, False], [True, False, True, False], [True, True, True, False]]
    assert all(a <= b for smaller, larger in pairwise(taken) for a, b in zip(smaller, larger, strict=True))


# --- what is refused ------------------------------------------------------------------------------


def test_what_exceeds_the_context_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"needs 130 positions, but the model's context is 128.*max_new_tokens=120"):
        sampling.generate(diffusion_model(), prompts_of([10]), replace(CONFIG, max_new_tokens=120))


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        ("bd3lm", {"guidance": 1.0}, "never saw a mask token"),
        ("bd3lm", {"cache": "dual"}, "bd3lm's cache is exact"),
        ("mdlm", {"block_origin": "prompt_end"}, "an mdlm canvas has one"),
    ],
)
def test_what_an_objective_cannot_do_is_refused(objective: str, more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampling.generate(diffusion_model(objective), prompts_of([3]), replace(CONFIG, **more))


def test_a_prompt_with_a_mask_token_or_without_any_is_refused() -> None:
    model = diffusion_model()
    with pytest.raises(UserError, match="infill"):
        sampling.generate(model, [[5, model.spec.mask_token_id, 6]], CONFIG)
    with pytest.raises(UserError, match="no tokens"):
        sampling.generate(model, [[]], CONFIG)
