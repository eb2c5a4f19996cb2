"""MDLM and BD3LM: what is seen, by whom, and what is scored."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, byte_model, diffusion_model, uniform_
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import likelihood, objectives
from a2d_core.attention import Slots, may_attend
from a2d_core.config import UserError
from a2d_core.models import DiffusionModel

LENGTH = 12


def rows(model: DiffusionModel, count: int = 3, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rows: ids, labels (-100 on the first five positions of the first row), valid."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (count, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    return ids, labels, torch.ones_like(ids, dtype=torch.bool)


def losses(model: DiffusionModel, is_masked: torch.Tensor, *, batch: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    """Cross-entropies [K, B, L] of the masked positions, zero elsewhere."""
    ids, labels, valid = batch or rows(model)
    layout = model.objective.layout(ids, valid, is_masked, torch.ones(is_masked.shape), model.objective.noised_blocks(labels))
    with torch.no_grad():
        _, ce = model(layout)
    return torch.zeros(is_masked.shape).flatten().index_add(0, layout.token_M, ce).view(is_masked.shape)


def masks(labels: torch.Tensor, views: int = 2, chance: float = 0.5) -> torch.Tensor:
    return (torch.rand(views, *labels.shape, generator=torch.Generator().manual_seed(2)) < chance) & (labels != -100)


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
        slots = Slots(position, model.objective.block_of(position), torch.zeros_like(position), torch.ones_like(position, dtype=torch.bool))
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
def test_labels_of_minus_100_are_never_masked_or_scored(objective: str) -> None:
    model = byte_model(objective)
    ids, labels, valid = rows(model)
    labels[1] = -100
    estimate = likelihood.nelbo(model, ids, labels, valid, samples=6, seed=0)
    assert (estimate.nats_BL[labels == -100] == 0).all() and (estimate.nats_BL[labels != -100] != 0).any()
    assert estimate.tokens_B.tolist() == [LENGTH - 5, 0, LENGTH]
    assert torch.equal(estimate.nats_B, likelihood.nelbo(model, ids, labels, valid, samples=6, seed=0).nats_B)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_padding_changes_nothing(objective: str) -> None:
    model = diffusion_model(objective)
    ids, labels, valid = rows(model)
    pad = torch.nn.functional.pad
    padded = pad(ids, (0, 8), value=0), pad(labels, (0, 8), value=-100), pad(valid, (0, 8), value=False)
    is_masked = masks(labels)
    wide = losses(model, pad(is_masked, (0, 8)), batch=padded)
    assert torch.allclose(wide[..., :LENGTH], losses(model, is_masked), atol=1e-5)
    assert (wide[..., LENGTH:] == 0).all()


def test_only_blocks_with_maskable_tokens_are_noised() -> None:
    model = diffusion_model("bd3lm")
    labels = torch.full((2, 16), -100)
    labels[0, 6:12] = 5
    labels[1, 13] = 5
    assert model.objective.noised_blocks(labels).tolist() == [[1, 2], [3, -1]]
    ids, valid = torch.full_like(labels, 5), torch.ones_like(labels, dtype=torch.bool)
    is_masked = (labels != -100)[None]
    layout = model.objective.layout(ids, valid, is_masked, torch.ones(is_masked.shape), model.objective.noised_blocks(labels))
    assert layout.input_ids_BS.shape == (2, 12 + 8)  # clean without the last block, and two noised blocks
    assert len(layout.target_M) == 7


@settings(max_examples=30, deadline=None)
@given(changed=st.integers(0, 11), seed=st.integers(0, 100))
def test_changing_a_token_changes_nothing_in_earlier_blocks(changed: int, seed: int) -> None:
    model = diffusion_model("bd3lm")
    ids, labels, valid = rows(model)
    is_masked = (torch.rand(1, *ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5) & (labels != -100)
    is_masked[:, :, changed] = False
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 7) % 90
    before = changed // 4 * 4
    a, b = losses(model, is_masked, batch=(ids, labels, valid)), losses(model, is_masked, batch=(other, labels, valid))
    assert torch.equal(a[..., :before], b[..., :before])


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("samples", [1, 4, 9])
def test_a_uniform_model_scores_the_log_of_the_number_of_allowed_tokens(objective: str, samples: int) -> None:
    model = uniform_(diffusion_model(objective))
    ids, labels, valid = rows(model)
    estimate = likelihood.nelbo(model, ids, labels, valid, samples=samples, seed=3)
    assert torch.allclose(estimate.nats_B / estimate.tokens_B, torch.full((3,), math.log(model.network.config.vocab_size - 1)), rtol=1e-5)


def test_the_nelbo_of_one_token_blocks_is_the_chain_rule() -> None:
    model = diffusion_model("bd3lm", block_size=1)
    ids, labels, valid = rows(model)
    estimate = likelihood.nelbo(model, ids, labels, valid, samples=1, seed=0)
    expected = plain_losses(model, (labels != -100)[None])[0]
    assert torch.allclose(estimate.nats_BL, expected, atol=1e-4)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_nelbo_of_a_row_does_not_depend_on_its_batch(objective: str) -> None:
    model = diffusion_model(objective)
    ids, labels, valid = rows(model)
    together = likelihood.nelbo(model, ids, labels, valid, samples=5, seed=0)
    alone = likelihood.nelbo(model, ids[2:], labels[2:], valid[2:], samples=5, seed=0, rows_B=torch.tensor([2]))
    assert torch.allclose(together.nats_B[2:], alone.nats_B, atol=1e-4)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_nelbo_bounds_the_sum_over_every_order_of_two_tokens(objective: str) -> None:
    """With two maskable tokens the expectation can be written out: (both masked + each alone given the other) / 2 ... averaged."""
    model = diffusion_model(objective, block_size=4)
    ids, labels, valid = (x[1:2] for x in rows(model))
    labels = torch.where((torch.arange(LENGTH) == 9) | (torch.arange(LENGTH) == 10), labels, -100)
    both = torch.zeros(1, 1, LENGTH, dtype=torch.bool)
    both[..., 9:11] = True
    first, second = both.clone(), both.clone()
    first[..., 10] = second[..., 9] = False
    batch = ids, labels, valid
    one_masked = (losses(model, first, batch=batch).sum() + losses(model, second, batch=batch).sum()) / 2 * 2  # weight M / n = 2
    exact = (one_masked + losses(model, both, batch=batch).sum()) / 2
    estimate = likelihood.nelbo(model, ids, labels, valid, samples=600, seed=0)
    assert abs(estimate.nats_B - exact) < 4 * estimate.stderr_B + 1e-4


def test_the_right_shift_reads_each_token_from_the_position_before_it() -> None:
    model = diffusion_model("mdlm", right_shift=True)
    ids, labels, valid = rows(model)
    labels = ids.clone()
    is_masked = torch.zeros(1, 3, LENGTH, dtype=torch.bool)
    is_masked[..., 7] = True
    noised = ids.clone()
    noised[:, 7] = model.spec.mask_token_id
    position = torch.arange(LENGTH).expand(3, -1)
    slots = Slots(position, torch.zeros_like(position), torch.zeros_like(position), valid)
    with torch.no_grad():
        expected = -model.logits(model.hidden(noised, slots)).log_softmax(-1)[:, 6].gather(1, ids[:, 7:8])[:, 0]
    assert torch.allclose(losses(model, is_masked, batch=(ids, labels, valid))[0, :, 7], expected, atol=1e-4)
    assert not model.objective.maskable(labels)[:, 0].any()


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(UserError, match="unknown objective 'ar'"):
        objectives.make("ar", block_size=4, mask_token_id=0)


def test_a_window_narrows_every_view_and_every_slot_sees_itself() -> None:
    position = torch.arange(6)[None]
    slots = Slots(position, position // 2, torch.zeros_like(position), torch.tensor([[True] * 5 + [False]]))
    mask = may_attend(slots, slots, window=2)[0]
    assert mask.diagonal().all()
    far = (position[0][:, None] - position[0][None, :]).abs() >= 2
    assert not mask[far].any()
    assert not mask[:5, 5].any()
