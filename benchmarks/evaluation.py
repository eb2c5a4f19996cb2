"""Cost of evaluation: likelihoods of the answers to multiple-choice questions, and generation, against the plain methods.

    python benchmarks/evaluation.py [--quick]

Likelihood: the plain method scores one request at a time and batches its noised samples, as the evaluations that come with
published checkpoints do. Each sample has its own clean copy ([x_t | x_0], for block diffusion) and logits at every noised
position. Ours batches requests, shares the clean stream among samples (and the context among short answers), runs the head only
at masked positions, sums short answers and blocks over all masks, and lets the masks of an answer take turns. Both draw the
number n of masked tokens uniformly and stratified, and weight by M / n. The ratio compares the times to an equal standard error,
which is measured over seeds (with the small vocabulary): the plain method's time x squared error over ours. `endings`: four
answers of 8 to 32 tokens after a context of 60 to 100 (like HellaSwag), 8 samples. `letters`: four single tokens after a context
of 200 (like MMLU), for which one sample is exact. Random weights, blocks of 32, Qwen3's vocabulary and a small one.

Generation: answers that end at random, after 60 tokens on average, to prompts of 100 to 200 tokens. They are generated in fixed
batches, each of which runs until its longest answer ends, and through one queue, which refills the rows of those that have ended.
All times are CPU times, which other load on the machine affects little.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import shared
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from a2d_core import embedded, sampling
from a2d_core.config import SampleConfig
from a2d_core.models import DiffusionModel, Spec
from a2d_core.scoring import Answer, Scorer

BLOCK, SAMPLES, CHOICES = 32, 8, 4
SMALL_VOCABULARY, VOCABULARY = 2048, 151936
SHAPE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}


def build(objective: str, vocabulary: int, spread: float) -> DiffusionModel:
    """A random Qwen3 as a diffusion model; the larger the spread of its embeddings, the more its logits differ."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=vocabulary, max_position_embeddings=2048, intermediate_size=768, tie_word_embeddings=True, **SHAPE)
    network = Qwen3ForCausalLM(config)
    with torch.no_grad():
        network.model.embed_tokens.weight.mul_(spread)
    return DiffusionModel(network, embedded.build_tokenizer(), Spec(objective, BLOCK, vocabulary - 1)).eval()


def ask(kind: str, vocabulary: int, count: int) -> list[list[Answer]]:
    """Questions of random tokens."""
    generator = torch.Generator().manual_seed(1)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return tuple(torch.randint(0, vocabulary - 1, (length,), generator=generator).tolist())

    contexts = [tokens(60, 100) if kind == "endings" else tokens(200, 200) for _ in range(count)]
    return [[Answer(context, tokens(8, 32) if kind == "endings" else tokens(1, 1)) for _ in range(CHOICES)] for context in contexts]


@torch.no_grad()
def plain(model: DiffusionModel, answer: Answer, samples: int, generator: torch.Generator) -> float:
    """The log-likelihood of one request, its samples in one batch."""
    ids, begin = torch.tensor([[*answer.context, *answer.tokens]]), len(answer.context)
    length = ids.shape[1]
    position, block = torch.arange(length), model.objective.block_of(torch.arange(length))
    is_masked, weight = torch.zeros(samples, length, dtype=torch.bool), torch.zeros(samples, length)
    for one in block[begin:].unique():
        places = ((block == one) & (position >= begin)).nonzero()[:, 0]
        spread = (torch.rand((), generator=generator) + torch.arange(samples) / samples) % 1
        counts = (spread * len(places)).floor().long() + 1
        ranks = torch.rand(samples, len(places), generator=generator).argsort(1)
        is_masked[:, places], weight[:, places] = ranks < counts[:, None], len(places) / counts[:, None].expand_as(ranks)
    noised = torch.where(is_masked, model.spec.mask_token_id, ids)
    if model.objective.block_size is None:
        see, inputs, positions = torch.ones(length, length, dtype=torch.bool), noised, position
    else:
        positions, both, is_noised = position.repeat(2), block.repeat(2), torch.arange(2 * length) < length
        same = is_noised[:, None] & is_noised & (both[:, None] == both)
        see = same | ~is_noised & torch.where(is_noised[:, None], both < both[:, None], both <= both[:, None])
        inputs = torch.cat([noised, ids.expand(samples, -1)], 1)
    output = model.network.base_model(
        input_ids=inputs, attention_mask=see.expand(samples, 1, -1, -1), position_ids=positions.expand(samples, -1), use_cache=False
    )
    logits = model.network.lm_head(output.last_hidden_state[:, :length]).float()
    logits[..., model.spec.mask_token_id] = -torch.inf
    ce = F.cross_entropy(logits.flatten(0, 1), ids.expand(samples, -1).flatten(), reduction="none").view(samples, length)
    return -float((ce * weight * is_masked).sum()) / samples


def methods(objective: str, kind: str, vocabulary: int, count: int) -> tuple[dict[str, Callable[[int], list[float]]], int]:
    """Seed -> the log-likelihoods of all requests, by each method; and the number of requests."""
    model, questions = build(objective, vocabulary, 4.0), ask(kind, vocabulary, count)
    samples = SAMPLES if kind == "endings" else 1
    requests = [answer for question in questions for answer in question]

    def one_at_a_time(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        return [plain(model, answer, samples, generator) for answer in requests]

    def ours(seed: int) -> list[float]:
        scorer = Scorer(model, samples=samples, max_samples=samples, seed=seed)
        return [score.nats for scores in scorer.score(questions) for score in scores]

    return {"plain": one_at_a_time, "ours": ours}, len(requests)


def errors(objective: str, kind: str, count: int, seeds: int) -> dict[str, float]:
    """The standard error of each method with equally many samples: the root of its variance over seeds, averaged over requests."""
    found = {
        name: torch.tensor([method(seed) for seed in range(seeds)])
        for name, method in methods(objective, kind, SMALL_VOCABULARY, count)[0].items()
    }
    means, variances = ({name: getattr(nats, what)(0) for name, nats in found.items()} for what in ("mean", "var"))
    spread = ((variances["plain"] + variances["ours"]) / seeds).sqrt()
    assert ((means["plain"] - means["ours"]).abs() <= 5 * spread + 1e-3).all(), "the methods disagree"
    return {name: float(variance.mean().sqrt()) for name, variance in variances.items()}


def in_turn(methods: dict[str, Callable[[int], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median CPU seconds of each method, run in turn after one warm-up, and what it returned."""
    results = {name: method(0) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for name in [*methods] * repeats:
        start = time.process_time()
        methods[name](0)
        seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def measure_generation(count: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Tokens of answers per second, in fixed batches and through one queue."""
    tokenizer = embedded.build_tokenizer()
    model = build("bd3lm", len(tokenizer) + 1, 1.0)
    model.objective = dataclasses.replace(model.objective, block_size=8)
    for token in b"xyz":  # of 262 tokens that are all alike, four end an answer
        model.stop_at(token)
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(100, 200, (count,), generator=generator).tolist()
    prompts = [torch.randint(32, 97, (length,), generator=generator).tolist() for length in lengths]
    config = SampleConfig(temperature=1.0, batch_size=batch_size, max_new_tokens=256)

    def queue(seed: int) -> list[int]:
        found = sampling.generate(model, prompts, config, generator=torch.Generator().manual_seed(seed))
        return [len(generation.tokens) + generation.finished for generation in found]

    answers = queue(0)

    def fixed(_: int) -> list[int]:
        for start in range(0, count, batch_size):
            longest = max(answers[start : start + batch_size])
            until_the_last = dataclasses.replace(config, max_new_tokens=longest, min_new_tokens=longest)
            sampling.generate(model, prompts[start : start + batch_size], until_the_last)
        return answers

    seconds, _ = in_turn({"fixed batches": fixed, "one queue": queue}, repeats)
    speed = {name: sum(answers) / seconds[name] for name in seconds}
    return {**speed, "ratio": speed["one queue"] / speed["fixed batches"]}


def main() -> None:
    parser = shared.parser(__doc__, "fewer questions, one repetition")
    options = parser.parse_args()
    count, repeats = (2, 1) if options.quick else (8, 3)
    print(f"{'objective':<10}{'questions':<10}{'vocabulary':>11}  {'method':<7}{'requests/s':>11}{'stderr':>9}{'to an equal error':>19}")
    ratios, rows = {}, []
    for objective, kind in itertools.product(("bd3lm", "mdlm"), ("endings", "letters")):
        error = errors(objective, kind, count, 24 if kind == "endings" else 2)
        for vocabulary in (SMALL_VOCABULARY, VOCABULARY):
            timed, requests = methods(objective, kind, vocabulary, count)
            seconds, _ = in_turn(timed, repeats)
            gain = (error["plain"] / error["ours"]) ** 2 if error["ours"] > 1e-3 else 1.0
            ratios[objective, kind, vocabulary] = seconds["plain"] / seconds["ours"] * gain
            cell = {"objective": objective, "questions": kind, "vocabulary": vocabulary}
            for name in seconds:
                ratio = ratios[objective, kind, vocabulary] if name == "ours" else 1.0
                rows.append({**cell, "method": name, "requests_s": requests / seconds[name], "stderr": error[name], "ratio": ratio})
                print(f"{objective:<10}{kind:<10}{vocabulary:>11,}  {name:<7}{requests / seconds[name]:>11.2f}{error[name]:>9.3f}{ratio:>18.1f}x", flush=True)  # fmt: skip  # noqa: E501
    found = measure_generation(16 if options.quick else 64, 8, repeats)
    print(f"\ngeneration, tokens/s: fixed batches {found['fixed batches']:.0f}, one queue {found['one queue']:.0f}")
    shared.keep(options.output_dir, [*rows, found])
    worst = {
        objective: min(ratio for (name, _, size), ratio in ratios.items() if name == objective and size > 2048)
        for objective in ("bd3lm", "mdlm")
    }
    result = {"likelihood_requests": min(worst.values()), **{f"likelihood_requests_{name}": value for name, value in worst.items()}}
    print("the worst of the cells with Qwen3's vocabulary:")
    print(json.dumps({"ratios": {name: round(value, 2) for name, value in {**result, "generation": found["ratio"]}.items()}}))


if __name__ == "__main__":
    main()
