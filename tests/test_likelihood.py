"""Exact likelihoods, proved by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import diffusion_model

from a2d_core import likelihood
from a2d_core.attention import Slots
from a2d_core.config import UserError
from a2d_core.models import DiffusionModel

TOKENS = 4
"""Tokens that can be drawn: the fifth is the mask."""


def tiny(objective: str, **options: object) -> DiffusionModel:
    return diffusion_model(objective, vocab_size=TOKENS + 1, **options)


@pytest.mark.parametrize("order", likelihood.ORDERS)
@pytest.mark.parametrize(("objective", "block_size"), [("mdlm", 2), ("bd3lm", 1), ("bd3lm", 2), ("bd3lm", 3)])
def test_the_probabilities_of_all_sequences_sum_to_one(objective: str, block_size: int, order: str) -> None:
    model = tiny(objective, block_size=block_size)
    answers = torch.tensor(list(itertools.product(range(TOKENS), repeat=4)))
    ids = torch.cat([torch.ones(len(answers), 1, dtype=torch.long), answers], 1)  # a prompt of one token
    turn = (torch.arange(5) > 0).long().expand_as(ids)
    found = likelihood.exact(model, model.objective.streams(ids, turn), order=order)
    probability = (-found.nats_B.double()).exp()
    assert probability.sum() == pytest.approx(1, abs=1e-4) and probability.std() > 0
    assert (found.stderr_B == 0).all() and (found.tokens_B == 4).all()


@pytest.mark.parametrize("order", likelihood.ORDERS)
@pytest.mark.parametrize(("objective", "block"), [("bd3lm", 1), ("bd3lm", 3), ("mdlm", 9)])
def test_a_sequence_scores_what_the_sampler_gives_it_step_by_step_in_a_pass_per_token_of_a_block(
    objective: str, block: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, one block after the other, each step a pass of its own over what the sampler would see; blocks of one: the chain rule."""
    model = diffusion_model(objective, block_size=block).double()  # in float32 what is computed in another shape breaks ties otherwise
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for start in range(0, 9, block):
        canvas = torch.cat([ids[:, :start], torch.full((1, block), model.spec.mask_token_id)], 1)
        masked = set(range(start, start + block))
        while masked:
            position = torch.arange(start + block)[None]
            with torch.no_grad():
                log_p = model.logits(model.hidden(canvas, Slots.clean(position, position // block)))[0].log_softmax(-1)
            score = {i: float(likelihood.ORDERS[order](log_p[i : i + 1])) for i in masked}
            chosen = min(masked, key=lambda i: (-score[i], i))
            expected -= float(log_p[chosen, ids[0, chosen]])
            canvas[0, chosen] = ids[0, chosen]
            masked.remove(chosen)
    passes, hidden = [], DiffusionModel.hidden
    monkeypatch.setattr(DiffusionModel, "hidden", lambda *arguments, **options: passes.append(1) or hidden(*arguments, **options))
    found = likelihood.exact(model, model.objective.streams(ids, torch.ones_like(ids)), order=order)
    assert float(found.nats_B) == pytest.approx(expected, rel=1e-4)
    assert len(passes) == block


def test_the_nelbo_of_blocks_of_one_token_is_exact() -> None:
    model = diffusion_model("bd3lm", block_size=1)
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    streams = model.objective.streams(ids, torch.ones_like(ids))
    found, bound = likelihood.exact(model, streams), likelihood.nelbo(model, streams, samples=1, seed=0)
    assert torch.allclose(found.nats_BT, bound.nats_BT, atol=1e-4)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_rows_of_different_lengths_do_not_disturb_each_other(objective: str) -> None:
    model = diffusion_model(objective, block_size=4).double()
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    turn, valid = torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)
    turn[0, :3], turn[1, 6:], valid[1, 6:] = 0, 0, False
    together = likelihood.exact(model, model.objective.streams(ids, turn, valid)).nats_B
    alone = [likelihood.exact(model, model.objective.streams(ids[i : i + 1, :n], turn[i : i + 1, :n])).nats_B for i, n in ((0, 10), (1, 6))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)


@pytest.mark.parametrize("order", likelihood.ORDERS)
def test_a_network_whose_output_is_no_number_scores_none(order: str) -> None:
    model = diffusion_model("bd3lm")
    with torch.no_grad():
        model.network.model.norm.weight.fill_(torch.nan)
    streams = model.objective.streams(torch.full((2, 6), 5), torch.ones(2, 6, dtype=torch.long))
    assert likelihood.exact(model, streams, order=order).nats_B.isnan().all()


def test_an_unknown_order_is_refused() -> None:
    model = diffusion_model("bd3lm")
    streams = model.objective.streams(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(UserError, match="unknown reveal order 'best': choose one of confidence, entropy"):
        likelihood.exact(model, streams, order="best")
