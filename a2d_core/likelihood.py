"""Likelihood bounds of a diffusion language model: the NELBO, with its standard error."""

# Shapes: B rows, L positions, K samples (noised views), M scored positions

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from a2d_core.models import DiffusionModel
from a2d_core.noise import draw_fixed_count_mask

VIEWS_PER_PASS = 4
"""Noised views scored in one forward pass."""


@dataclass(frozen=True)
class Estimate:
    """NELBO of each row, in nats, summed over its scored tokens."""

    nats_B: Tensor
    """The estimate."""
    nats_BL: Tensor
    """The part of it that falls on each position."""
    stderr_B: Tensor
    """Standard error over the samples; they are stratified, so it errs on the large side. NaN for one sample."""
    tokens_B: Tensor
    """Scored tokens."""


@torch.no_grad()
def nelbo(
    model: DiffusionModel,
    input_ids_BL: Tensor,
    labels_BL: Tensor,
    valid_BL: Tensor,
    *,
    samples: int,
    seed: int,
    rows_B: Tensor | None = None,
) -> Estimate:
    """Monte Carlo estimate of the NELBO over the full range of t, of the tokens whose label is not -100 given all others.

    Each sample masks n of a block's M scored tokens, n uniform on 1..M, and weights by M / n. The noise of a
    row depends on `seed` and its number in `rows_B` (default: its place) alone: not on batch size or order.
    Source: MDLM (arXiv 2406.07524, eq. 10); the count form: MDM as any-order autoregression (arXiv 2410.14157).
    """
    objective = model.objective
    rows_B = torch.arange(len(input_ids_BL), device=input_ids_BL.device) if rows_B is None else rows_B
    is_maskable_BL = objective.maskable(labels_BL) & valid_BL
    block_BL = objective.block_of(torch.arange(labels_BL.shape[1], device=labels_BL.device)).expand_as(labels_BL)
    is_masked_KBL, weight_KBL = draw_fixed_count_mask(seed, rows_B, block_BL, is_maskable_BL, samples=samples)
    noised_blocks = objective.noised_blocks(labels_BL)
    nats_KBL = torch.zeros(samples, *labels_BL.shape, device=labels_BL.device)
    for start in range(0, samples, VIEWS_PER_PASS):
        views = slice(start, start + VIEWS_PER_PASS)
        layout = objective.layout(input_ids_BL, valid_BL, is_masked_KBL[views], weight_KBL[views], noised_blocks)
        nats_KBL[views].view(-1).index_add_(0, layout.token_M, model(layout)[1] * layout.weight_M)
    nats_KB = nats_KBL.sum(-1)
    spread_B = nats_KB.std(0) if samples > 1 else torch.full_like(nats_KB[0], torch.nan)
    return Estimate(nats_KB.mean(0), nats_KBL.mean(0), spread_B / samples**0.5, is_maskable_BL.sum(1))
