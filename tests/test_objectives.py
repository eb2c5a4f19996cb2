"""MDLM and BD3LM: what is seen, by whom, and what is scored."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, byte_model, diffusion_model, uniform_
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import likelihood, objectives
from a2d_core.attention import Slots, flex_mask, may_attend
from a2d_core.config import UserError
from a2d_core.models import DiffusionModel

LENGTH = 12


def rows(model: DiffusionModel, count: int = 3, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rows: ids, turn (0 on the first five positions of the first row), valid."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (count, length), generator=generator)
    turn = torch.ones_like(ids)
    turn[0, :5] = 0
    return ids, turn, torch.ones_like(ids, dtype=torch.bool)


def losses(model: DiffusionModel, is_masked: torch.Tensor, *, batch: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    """Cross-entropies [K, B, L] of the masked positions, zero elsewhere."""
    streams = model.objective.streams(*(batch or rows(model)))
    position = streams.noised.position.expand(len(is_masked), is_masked.shape[1], -1)
    is_masked_KBT = is_masked.gather(2, position) & streams.is_maskable_BT
    layout = model.objective.layout(streams, is_masked_KBT, torch.ones(is_masked_KBT.shape))
    with torch.no_grad():
        _, ce = model(layout)
    found = torch.zeros(is_masked_KBT.shape).flatten().index_add(0, layout.token_M, ce).view(is_masked_KBT.shape)
    return torch.zeros(is_masked.shape).scatter_add(2, position, found)


def nelbo(model: DiffusionModel, batch: tuple[torch.Tensor, ...], **options: Any) -> likelihood.Estimate:
    return likelihood.nelbo(model, model.objective.streams(*batch), **options)


def masks(turn: torch.Tensor, views: int = 2, chance: float = 0.5) -> torch.Tensor:
    return (torch.rand(views, *turn.shape, generator=torch.Generator().manual_seed(2)) < chance) & (turn > 0)


def plain_losses(model: DiffusionModel, is_masked: torch.Tensor) -> torch.Tensor:
    """The same, by the definition: for each row, view and block one forward pass over [clean blocks before it, noised block]."""
    ids = rows(model)[0]
    size = model.objective.block_size or LENGTH
    found = torch.zeros(is_masked.shape)
    for view, row, block in [(k, b, n) for k in range(len(is_masked)) for b in range(len(ids)) for n in range(LENGTH // size)]:
        end = (block + 1) * size
        seen = ids[row : row + 1, :end].clone()
        masked = is_masked[view, row, :end] & (torch.arange(end) >= end - size)
        seen[0, masked] = model.spec.mask_token_id
        position = torch.arange(end)[None]
        slots = Slots.clean(position, model.objective.block_of(position))
        with torch.no_grad():
            log_probability = model.logits(model.hidden(seen, slots)).log_softmax(-1)
        found[view, row, :end][masked] = -log_probability[0, masked].gather(-1, ids[row, :end][masked][:, None])[:, 0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_training_layout_equals_the_definition_block_by_block(objective: str, family: str) -> None:
    model = diffusion_model(objective, family=family)
    is_masked = masks(rows(model)[1])
    found, expected = losses(model, is_masked), plain_losses(model, is_masked)
    assert expected.sum() > 0
    assert torch.allclose(found, expected, atol=2e-3, rtol=1e-3)


def test_one_block_bd3lm_equals_mdlm() -> None:
    one_block, mdlm = diffusion_model("bd3lm", block_size=LENGTH), diffusion_model("mdlm")
    is_masked = masks(rows(mdlm)[1])
    assert torch.allclose(losses(one_block, is_masked), losses(mdlm, is_masked), atol=1e-5)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_several_views_equal_as_many_separate_passes(objective: str) -> None:
    model = diffusion_model(objective)
    is_masked = masks(rows(model)[1], views=3)
    together = losses(model, is_masked)
    apart = torch.cat([losses(model, view[None]) for view in is_masked])
    assert torch.allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_what_is_given_is_never_masked_or_scored(objective: str) -> None:
    model = byte_model(objective)
    ids, turn, valid = rows(model)
    turn[1] = 0
    streams = model.objective.streams(ids, turn, valid)
    estimate = likelihood.nelbo(model, streams, samples=6, seed=0)
    assert (estimate.nats_BT[~streams.is_maskable_BT] == 0).all() and (estimate.nats_BT[streams.is_maskable_BT] != 0).any()
    assert estimate.tokens_B.tolist() == [LENGTH - 5, 0, LENGTH]
    assert torch.equal(estimate.nats_B, likelihood.nelbo(model, streams, samples=6, seed=0).nats_B)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_padding_changes_nothing(objective: str) -> None:
    model = diffusion_model(objective)
    ids, turn, valid = rows(model)
    pad = torch.nn.functional.pad
    padded = pad(ids, (0, 8), value=0), pad(turn, (0, 8), value=0), pad(valid, (0, 8), value=False)
    is_masked = masks(turn)
    wide = losses(model, pad(is_masked, (0, 8)), batch=padded)
    assert torch.allclose(wide[..., :LENGTH], losses(model, is_masked), atol=1e-5)
    assert (wide[..., LENGTH:] == 0).all()


def test_only_what_is_needed_is_computed() -> None:
    model = diffusion_model("bd3lm")
    turn = torch.zeros(2, 16, dtype=torch.long)
    turn[0, 6:12] = 1
    turn[1, 13] = 1
    streams = model.objective.streams(torch.full_like(turn, 5), turn)
    assert streams.clean_ids_BC.shape == (2, 12)  # of the second row; the first needs two blocks
    assert streams.clean.valid.sum(1).tolist() == [8, 12]
    assert streams.noised.position.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0, 0]]
    assert streams.noised.valid.sum(1).tolist() == [8, 4] and streams.chunk_BT.tolist() == [[0] * 4 + [1] * 4, [0] * 8]
    layout = model.objective.layout(streams, streams.is_maskable_BT[None], torch.ones(1, 2, 8))
    assert layout.input_ids_BS.shape == (2, 12 + 8) and len(layout.target_M) == 7


@settings(max_examples=30, deadline=None)
@given(changed=st.integers(0, 11), seed=st.integers(0, 100))
def test_changing_a_token_changes_nothing_in_earlier_blocks(changed: int, seed: int) -> None:
    model = diffusion_model("bd3lm")
    ids, turn, valid = rows(model)
    is_masked = (torch.rand(1, *ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5) & (turn > 0)
    is_masked[:, :, changed] = False
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 7) % 90
    before = changed // 4 * 4
    a, b = losses(model, is_masked, batch=(ids, turn, valid)), losses(model, is_masked, batch=(other, turn, valid))
    assert torch.equal(a[..., :before], b[..., :before])


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("samples", [1, 4, 9])
def test_a_uniform_model_scores_the_log_of_the_number_of_allowed_tokens(objective: str, samples: int) -> None:
    model = uniform_(diffusion_model(objective))
    ids, turn, valid = rows(model)
    estimate = nelbo(model, (ids, turn, valid), samples=samples, seed=3)
    assert torch.allclose(estimate.nats_B / estimate.tokens_B, torch.full((3,), math.log(model.network.config.vocab_size - 1)), rtol=1e-5)


def test_the_nelbo_of_one_token_blocks_is_the_chain_rule() -> None:
    model = diffusion_model("bd3lm", block_size=1)
    ids, turn, valid = rows(model)
    estimate = nelbo(model, (ids, turn, valid), samples=1, seed=0)
    expected = plain_losses(model, (turn > 0)[None])[0]
    assert torch.allclose(estimate.nats_B, expected.sum(1), atol=1e-3)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_nelbo_of_a_row_does_not_depend_on_its_batch(objective: str) -> None:
    model = diffusion_model(objective)
    ids, turn, valid = rows(model)
    together = nelbo(model, (ids, turn, valid), samples=5, seed=0)
    alone = nelbo(model, (ids[2:], turn[2:], valid[2:]), samples=5, seed=0, rows_B=torch.tensor([2]))
    assert torch.allclose(together.nats_B[2:], alone.nats_B, atol=1e-4)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_nelbo_bounds_the_sum_over_every_order_of_two_tokens(objective: str) -> None:
    """With two maskable tokens the expectation can be written out: (both masked + each alone given the other) / 2 ... averaged."""
    model = diffusion_model(objective, block_size=4)
    ids, turn, valid = (x[1:2] for x in rows(model))
    turn = ((torch.arange(LENGTH) == 9) | (torch.arange(LENGTH) == 10)).long()[None]
    both = torch.zeros(1, 1, LENGTH, dtype=torch.bool)
    both[..., 9:11] = True
    first, second = both.clone(), both.clone()
    first[..., 10] = second[..., 9] = False
    batch = ids, turn, valid
    one_masked = (losses(model, first, batch=batch).sum() + losses(model, second, batch=batch).sum()) / 2 * 2  # weight M / n = 2
    exact = (one_masked + losses(model, both, batch=batch).sum()) / 2
    estimate = nelbo(model, (ids, turn, valid), samples=600, seed=0)
    assert abs(estimate.nats_B - exact) < 4 * estimate.stderr_B + 1e-4


def test_the_right_shift_reads_each_token_from_the_position_before_it() -> None:
    model = diffusion_model("mdlm", right_shift=True)
    ids, turn, valid = rows(model)
    turn = torch.ones_like(ids)
    is_masked = torch.zeros(1, 3, LENGTH, dtype=torch.bool)
    is_masked[..., 7] = True
    noised = ids.clone()
    noised[:, 7] = model.spec.mask_token_id
    position = torch.arange(LENGTH).expand(3, -1)
    slots = Slots.clean(position, torch.zeros_like(position))
    with torch.no_grad():
        expected = -model.logits(model.hidden(noised, slots)).log_softmax(-1)[:, 6].gather(1, ids[:, 7:8])[:, 0]
    assert torch.allclose(losses(model, is_masked, batch=(ids, turn, valid))[0, :, 7], expected, atol=1e-4)
    assert not model.objective.streams(ids, turn, valid).is_maskable_BT[:, 0].any()


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(UserError, match="unknown objective 'ar'"):
        objectives.make("ar", block_size=4, mask_token_id=0)


def test_a_window_narrows_every_view_and_every_slot_sees_itself() -> None:
    position = torch.arange(6)[None]
    slots = Slots.clean(position, position // 2, torch.tensor([[True] * 5 + [False]]))
    mask = may_attend(slots, slots, window=2)[0]
    assert mask.diagonal().all()
    far = (position[0][:, None] - position[0][None, :]).abs() >= 2
    assert not mask[far].any()
    assert not mask[:5, 5].any()


# --- several documents, several turns ---


def scored(model: DiffusionModel, streams: objectives.Streams, is_masked_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropies [B, T] of the masked slots, zero elsewhere."""
    layout = model.objective.layout(streams, is_masked_BT[None], torch.ones(1, *is_masked_BT.shape))
    with torch.no_grad():
        _, ce = model(layout)
    return torch.zeros(is_masked_BT.shape).flatten().index_add(0, layout.token_M, ce).view(is_masked_BT.shape)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("right_shift", [False, True])
def test_packed_documents_score_what_they_score_alone(objective: str, right_shift: bool, family: str) -> None:
    if right_shift and objective == "bd3lm":
        pytest.skip("bd3lm has no shift")
    model = diffusion_model(objective, family=family, right_shift=right_shift)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 90, (length,), generator=generator) for length in (7, 1 + right_shift, 12, 5)]
    masks = [torch.rand(len(d), generator=generator) < 0.6 for d in documents]
    alone = []
    for ids, is_masked in zip(documents, masks, strict=True):
        streams = model.objective.streams(ids[None], torch.ones(1, len(ids), dtype=torch.long))
        alone.append(scored(model, streams, is_masked[None] & streams.is_maskable_BT)[0])
    index = torch.cat([torch.full_like(ids, number) for number, ids in enumerate(documents)])
    packed = model.objective.streams(torch.cat(documents)[None], torch.ones_like(index)[None], document_BL=index[None])
    found = scored(model, packed, torch.cat(masks)[None] & packed.is_maskable_BT)[0]
    assert torch.cat(alone).sum() > 0 and torch.allclose(found, torch.cat(alone), atol=2e-4)
    assert packed.noised.position[0].tolist() == [i for ids in documents for i in range(len(ids))]


FILL = 1


def conversation() -> tuple[torch.Tensor, torch.Tensor]:
    """Two turns that meet in the block of positions 4..7, and a third one a block later."""
    ids = torch.arange(10, 30)[None]
    turn = torch.zeros_like(ids)
    turn[0, 2:6], turn[0, 7:11], turn[0, 14:18] = 1, 2, 3
    return ids, turn


@pytest.mark.parametrize("turn_number", [1, 2, 3])
def test_a_turn_in_a_conversation_scores_what_it_scores_as_the_last_turn(turn_number: int) -> None:
    """The conversation up to the turn, filled to its block, in a row of its own is what sampling sees."""
    model = diffusion_model("bd3lm")
    ids, turn = conversation()
    together = model.objective.streams(ids, turn, fill_token_id=FILL)
    end = int((turn == turn_number).nonzero()[-1, 1]) + 1
    filled = -(-end // 4) * 4
    alone_ids = torch.cat([ids[:, :end], torch.full((1, filled - end), FILL)], 1)
    alone_turn = torch.cat([(turn[:, :end] == turn_number).long(), torch.ones(1, filled - end, dtype=torch.long)], 1)
    alone = model.objective.streams(alone_ids, alone_turn)
    of_turn = together.noised.view[0] == turn_number
    assert together.noised_ids_BT[0, of_turn].tolist() == alone.noised_ids_BT[0].tolist()
    assert together.is_maskable_BT[0, of_turn].tolist() == alone.is_maskable_BT[0].tolist()
    is_masked = (torch.rand(together.is_maskable_BT.shape, generator=torch.Generator().manual_seed(3)) < 0.7) & together.is_maskable_BT
    found = scored(model, together, is_masked)[0, of_turn]
    assert found.sum() > 0 and torch.allclose(found, scored(model, alone, is_masked[:, of_turn])[0], atol=1e-4)


def test_a_later_turn_in_the_same_block_leaves_an_earlier_one_untouched() -> None:
    model = diffusion_model("bd3lm")
    ids, turn = conversation()
    other = ids.clone()
    other[0, 6:] = 77
    found = []
    for each in (ids, other):
        streams = model.objective.streams(each, turn, fill_token_id=FILL)
        found.append(scored(model, streams, streams.is_maskable_BT)[0, streams.noised.view[0] == 1])
    assert torch.equal(*found)
    assert streams.is_fill_BT[0, streams.noised.view[0] == 1].tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_rows_that_are_alike_share_one_mask_which_is_made_once(objective: str) -> None:
    model = diffusion_model(objective)
    ids, turn, _ = rows(model)
    turn[:] = 1
    streams = model.objective.streams(ids, turn)
    apart = replace(streams, key=None, **{n: Slots(*(x.expand(3, -1) for x in getattr(streams, n).fields())) for n in ("clean", "noised")})
    assert streams.noised.position.shape == (1, LENGTH)
    is_masked = masks(turn)[0]
    assert torch.allclose(scored(model, streams, is_masked), scored(model, apart, is_masked), atol=1e-5)
    (made,) = model._known_masks.values()
    scored(model, model.objective.streams(ids + 1, turn), is_masked)
    assert list(model._known_masks.values()) == [made]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_flex_attention_gets_the_same_mask(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    rows_, length, window = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24)), data.draw(st.sampled_from([None, 3]))
    lengths = torch.randint(1, length + 1, (rows_, 1), generator=generator)
    turn = torch.randint(0, 4, (rows_, length), generator=generator)
    document = (torch.rand(rows_, length, generator=generator) < 0.2).long().cumsum(1)
    document = document - document[:, :1]
    objective = objectives.make(data.draw(st.sampled_from(["mdlm", "bd3lm"])), block_size=4, mask_token_id=99)
    streams = objective.streams(turn, turn, torch.arange(length) < lengths, document_BL=document, fill_token_id=FILL)
    slots = objective.layout(streams, streams.is_maskable_BT.expand(2, -1, -1), torch.ones(2, *streams.chunk_BT.shape)).slots
    flex = flex_mask(slots, slots, window)
    size = slots.position.shape[1]
    index = torch.arange(size)
    dense = torch.stack([flex.mask_mod(torch.tensor(b), torch.tensor(0), index[:, None], index[None]) for b in range(len(slots.position))])
    assert torch.equal(dense, may_attend(slots, slots, window))
    assert dense.diagonal(dim1=1, dim2=2).all()
