"""The forward process: draws of t and masks."""

from __future__ import annotations

import math

import pytest
import torch

from a2d_core import noise


def draw(method: str, rows: torch.Tensor, *, total: int = 8, blocks: int = 4, views: int = 2, step: int = 3) -> torch.Tensor:
    return noise.draw_t(method, 0, step, rows, total_rows=total, blocks=blocks, views=views, t_min=1e-3, t_max=1.0)


def test_hashed_numbers_are_uniform_and_uncorrelated() -> None:
    u = noise.hashed_uniform(7, 3, torch.arange(500)[:, None], torch.arange(400)[None, :])
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    counts = torch.histc(u, 20, 0, 1)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 50  # 19 degrees of freedom: one in ten thousand
    for neighbours in (u[:, 1:], u[1:]):
        same_shape = u[: neighbours.shape[0], : neighbours.shape[1]]
        assert abs(torch.corrcoef(torch.stack([same_shape.flatten(), neighbours.flatten()]))[0, 1]) < 0.01


@pytest.mark.parametrize("changed", ["seed", "step"])
def test_another_seed_or_step_gives_other_noise(changed: str) -> None:
    rows = torch.arange(64)
    other = (1, 0) if changed == "seed" else (0, 1)
    assert (noise.hashed_uniform(0, 0, rows) != noise.hashed_uniform(*other, rows)).all()


@pytest.mark.parametrize("method", ["stratified", "iid", "per_sequence"])
def test_the_noise_of_a_row_does_not_depend_on_which_process_draws_it(method: str) -> None:
    together = draw(method, torch.arange(8))
    apart = torch.cat([draw(method, torch.arange(0, 3)), draw(method, torch.arange(3, 8))], dim=1)
    assert torch.equal(together, apart)


def test_stratified_draws_hit_every_stratum_once() -> None:
    t_KBN = draw("stratified", torch.arange(8))
    strata = ((t_KBN.flatten() - 1e-3) / (1 - 1e-3) * t_KBN.numel()).sort().values
    gaps = strata.diff()
    assert torch.allclose(gaps, torch.ones_like(gaps), atol=1e-3)


def test_per_sequence_draws_share_t_over_blocks_and_iid_draws_do_not() -> None:
    shared, apart = draw("per_sequence", torch.arange(8)), draw("iid", torch.arange(8))
    assert (shared == shared[:, :, :1]).all()
    assert (apart[:, :, 0] != apart[:, :, 1]).all()


@pytest.mark.parametrize("method", ["stratified", "iid", "per_sequence"])
def test_whether_a_token_is_masked_does_not_depend_on_the_time_of_another_block(method: str) -> None:
    t_KBN = noise.draw_t(method, 0, 3, torch.arange(2000), total_rows=2000, blocks=6, views=1, t_min=0.0, t_max=1.0)
    for shift in range(-5, 6):  # each token at the chance of some other block
        is_masked = noise.draw_mask(0, 3, torch.arange(2000), t_KBN.roll(shift, 2), torch.ones(2000, 6, dtype=torch.bool))
        assert (is_masked.float().mean((0, 1)) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_weight_is_minus_the_slope_of_alpha_over_the_chance_of_a_mask(schedule: str) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    alpha = noise.alpha(t, schedule)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    assert torch.allclose(noise.nelbo_weight(t, schedule), -slope / (1 - alpha))
    assert math.isclose(noise.alpha(torch.tensor(0.0), schedule), 1, abs_tol=1e-6)
    assert math.isclose(noise.alpha(torch.tensor(1.0), schedule), 0, abs_tol=1e-6)


def test_masks_come_at_their_chance_and_only_where_a_token_is_maskable() -> None:
    chance = torch.full((4, 100, 50), 0.3)
    maskable = torch.rand(100, 50) < 0.5
    is_masked = noise.draw_mask(0, 0, torch.arange(100), chance, maskable)
    assert not is_masked[:, ~maskable].any()
    assert abs(is_masked[:, maskable].float().mean() - 0.3) < 0.01


def test_fixed_count_masks_take_every_count_equally_often_and_any_subset() -> None:
    maskable = torch.ones(200, 8, dtype=torch.bool)
    maskable[:, 1] = False
    block = (torch.arange(8) // 4).expand(200, -1)
    is_masked, weight = noise.draw_fixed_count_mask(0, torch.arange(200), block, maskable, samples=12)
    first = is_masked[:, :, :4].sum(-1)
    assert [int((first == n).sum()) for n in range(5)] == pytest.approx(
        [0, 800, 800, 800, 0], abs=1e-9
    )  # exactly: the counts are spread evenly
    second = is_masked[:, :, 4:].sum(-1)
    assert [int((second == n).sum()) for n in range(5)] == [0, 600, 600, 600, 600]
    assert not is_masked[:, :, 1].any()
    assert torch.equal(weight[:, :, 0], 3 / first) and torch.equal(weight[:, :, 7], 4 / second)
    per_position = is_masked.float().mean((0, 1))[maskable[0]]
    assert (per_position - torch.tensor([2 / 3] * 3 + [2.5 / 4] * 4)).abs().max() < 0.04


def test_the_masks_of_a_block_take_turns_so_that_each_token_is_masked_as_often_as_any_other() -> None:
    block, maskable = (torch.arange(20) // 10).expand(50, -1), torch.ones(50, 20, dtype=torch.bool)
    maskable[:, 15:] = False
    is_masked, _ = noise.draw_fixed_count_mask(0, torch.arange(50), block, maskable, samples=8)
    often = is_masked.sum(0)
    for tokens in (often[:, :10], often[:, 10:15]):
        assert (tokens.amax(1) - tokens.amin(1) <= 1).all() and tokens.float().std() > 0
    assert (often[:, 15:] == 0).all()


def test_all_masks_of_a_small_block_stand_for_the_expectation_over_the_random_ones() -> None:
    block, maskable = (torch.arange(8) // 4).expand(1, -1), torch.ones(1, 8, dtype=torch.bool)
    maskable[0, 1] = False
    is_masked, weight, is_small = noise.every_mask(block, maskable, samples=7)
    assert is_small[0].tolist() == [True] * 4 + [False] * 4  # 7 masks of three tokens, 15 of four
    first = is_masked[:, 0, :4]
    assert len({tuple(mask.tolist()) for mask in first}) == 7 and not first[:, 1].any()
    # A token's expected weight is 1: the mean over n of (M / n) x (n / M).
    assert torch.allclose((first * weight[:, 0, :4]).mean(0), torch.tensor([1.0, 0, 1, 1]))
