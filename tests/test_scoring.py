"""The log-likelihoods of answers: what they do not depend on, and when enough has been drawn."""

import itertools
import math

import pytest
import torch
from families import byte_model

from a2d_core import likelihood
from a2d_core.config import UserError
from a2d_core.models import DiffusionModel
from a2d_core.scoring import Answer, Score, Scorer

CONTEXT = tuple(b"A man is in a kitchen. He")
SHORT = [Answer(CONTEXT, tuple(text)) for text in (b" A", b" B", b" C", b"ab")]
LONG = [Answer(CONTEXT, tuple(text)) for text in (b" cuts a carrot.", b" flies.", b" is a door, and a window, and a door.")]


@pytest.fixture(params=["mdlm", "bd3lm"])
def model(request):
    return byte_model(request.param, block_size=8)


def close(scores, others):
    return [(s.nats, s.stderr, s.samples) for s in itertools.chain(*scores)] == [
        (pytest.approx(o.nats, rel=1e-5), pytest.approx(o.stderr, rel=1e-3, abs=1e-6), o.samples) for o in itertools.chain(*others)
    ]


# --- without noise ---


def by_hand(model: DiffusionModel, ids: list[int], begin: int) -> float:
    """The NELBO of ids[begin:], which lie in one block, as the mean over n of the mean over the masks of n tokens."""
    tokens, total = range(begin, len(ids)), 0.0
    first = begin // 8 * 8 if model.objective.block_size else 0
    streams = model.objective.streams(torch.tensor([ids]), torch.tensor([[0] * begin + [1] * len(tokens)]))
    for n in range(1, len(tokens) + 1):
        masks = list(itertools.combinations(tokens, n))
        for masked in masks:
            is_masked = torch.zeros(1, 1, len(ids) - first, dtype=torch.bool)
            is_masked[..., [place - first for place in masked]] = True
            layout = model.objective.layout(streams, is_masked, torch.full(is_masked.shape, len(tokens) / n))
            with torch.no_grad():
                total += float((model(layout)[1] * layout.weight_M).sum()) / len(masks) / len(tokens)
    return total


def test_a_short_answer_is_summed_over_all_its_masks(model):
    context, tokens = CONTEXT[:17], tuple(b"abcd")
    (score,) = Scorer(model, samples=15).score([[Answer(context, tokens)]])[0]
    assert score == Score(pytest.approx(-by_hand(model, [*context, *tokens], 17), rel=1e-5), 0.0, 0)
    noisy = [Scorer(model, samples=14, seed=seed).score([[Answer(context, tokens)]])[0][0] for seed in range(60)]
    mean, error = sum(s.nats for s in noisy) / 60, math.hypot(*(s.stderr for s in noisy)) / 60
    assert all(s.stderr > 0 and s.samples == 14 for s in noisy)
    assert abs(mean - score.nats) < 4 * error


def test_the_exact_likelihood_has_no_noise_and_is_that_of_the_order(model):
    found = Scorer(model, "exact", "left_to_right").score([SHORT, LONG])
    ids = torch.tensor([[*LONG[0].context, *LONG[0].tokens]])
    streams = model.objective.streams(ids, (torch.arange(ids.shape[1]) >= len(CONTEXT)).long()[None])
    assert found[1][0] == Score(pytest.approx(-float(likelihood.exact(model, streams, order="left_to_right").nats_B), rel=1e-4), 0.0, 0)
    assert all(score.stderr == 0 for scores in found for score in scores)


def test_an_answer_without_tokens_is_certain(model):
    assert Scorer(model).score([[Answer(CONTEXT, ())]]) == [[Score(0.0, 0.0, 0)]]


# --- what a score does not depend on ---


@pytest.mark.parametrize("method", ["nelbo", "exact"])
def test_a_score_depends_on_neither_the_size_of_a_batch_nor_the_order_nor_the_company(model, method):
    scorer = Scorer(model.double(), method, max_samples=16, batch_tokens=1)
    alone = [scorer.score([question])[0] for question in (SHORT, LONG)]
    assert close(alone, Scorer(model, method, max_samples=16, batch_tokens=100_000).score([SHORT, LONG, LONG, SHORT])[:2])
    turned = Scorer(model, method, max_samples=16).score([LONG[::-1], SHORT[::-1]])
    assert close(alone, [turned[1][::-1], turned[0][::-1]])


def test_answers_in_one_block_stand_on_one_clean_stream(monkeypatch):
    model, seen = byte_model("bd3lm", block_size=8), []
    hidden = DiffusionModel.hidden
    monkeypatch.setattr(
        DiffusionModel, "hidden", lambda self, ids, *rest, **more: seen.append(ids.shape) or hidden(self, ids, *rest, **more)
    )
    shared = Scorer(model).score([SHORT])
    assert seen == [(1, 24 + 3 * 4 * 3)]  # three blocks of context, and for each of the three masks what four answers need of a block
    assert close(shared, [[Scorer(model).score([[answer]])[0][0] for answer in SHORT]])


def test_answers_to_one_question_share_their_noise_and_rounds_and_questions_do_not(model, monkeypatch):
    numbers, nelbo = [], likelihood.nelbo
    monkeypatch.setattr(likelihood, "nelbo", lambda *a, rows_B, **o: numbers.append(rows_B.tolist()) or nelbo(*a, rows_B=rows_B, **o))
    questions = [[Answer(context, answer.tokens, ()) for answer in LONG] for context in (CONTEXT, (*CONTEXT, 33))]
    Scorer(model, max_samples=16).score(questions)
    found = list(itertools.chain(*numbers))
    assert [found.count(number) for number in set(found)] == [3] * 4  # two rounds of two questions, with three answers each


# --- how much is drawn ---


def alike(model: DiffusionModel, answers: list[Answer]) -> list[Answer]:
    """The answers, compared in a way in which none is better."""
    (scores,) = Scorer(model, samples=512, seed=1).score([[Answer(a.context, a.tokens, ()) for a in answers]])
    return [Answer(answer.context, answer.tokens, (-score.nats,)) for answer, score in zip(answers, scores, strict=True)]


def test_a_question_is_drawn_until_its_best_answer_leads_beyond_doubt(model):
    easy = [Answer(CONTEXT, tuple(b"abcdefgh" * length)) for length in (1, 4)]
    hard = alike(model, easy)
    found = Scorer(model, samples=8, max_samples=64).score([easy, hard, LONG[:1]])
    assert [score.samples for score in found[0]] == [8, 8]
    assert all(score.samples in (16, 32, 64) for score in found[1])
    assert found[2][0].samples == 8  # nothing is decided by it
    assert [score.samples for score in Scorer(model, samples=8, max_samples=20).score([hard])[0]] == [20, 20]


def test_more_draws_make_a_smaller_error(model):
    few, many = (Scorer(model, samples=count, max_samples=count).score([LONG])[0] for count in (8, 128))
    assert sum(score.stderr for score in few) > 2 * sum(score.stderr for score in many)
    assert all(abs(a.nats - b.nats) < 5 * math.hypot(a.stderr, b.stderr) for a, b in zip(few, many, strict=True))


def test_every_way_of_comparing_must_be_decided(model):
    by_sum = [Answer(CONTEXT, tuple(b"abcdefgh" * length)) for length in (1, 4)]
    both_ways = [Answer(CONTEXT, answer.tokens, (1.0, *answer.sizes)) for answer in alike(model, by_sum)]
    for question, samples in ((by_sum, 8), (both_ways, 32)):
        assert {score.samples for score in Scorer(model, max_samples=32).score([question])[0]} == {samples}
    incomparable = [Answer(answer.context, answer.tokens, ()) for answer in by_sum]
    assert {score.samples for score in Scorer(model, max_samples=32).score([incomparable])[0]} == {32}


def test_a_likelihood_that_is_not_finite_is_told_and_not_drawn_again(model):
    with torch.no_grad():
        model.network.get_output_embeddings().weight[ord("z")] = torch.nan
    (scores,) = Scorer(model, max_samples=64).score([LONG])
    assert all(math.isnan(score.nats) and score.samples == 8 for score in scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "elbo"}, "unknown likelihood 'elbo'"),
        ({"order": "best"}, "unknown reveal order 'best'"),
        ({"samples": 0}, "nelbo_samples must be at least 1, not 0"),
        ({"max_samples": 0}, "max_nelbo_samples must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        Scorer(model, **settings)
