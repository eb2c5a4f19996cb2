"""Likelihood bounds of a diffusion language model: the NELBO, with its standard error."""

# Shapes: B rows, T noised slots, K samples (noised views), M scored positions

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from a2d_core.models import DiffusionModel
from a2d_core.noise import draw_fixed_count_mask
from a2d_core.objectives import Layout, Streams

VIEWS_PER_PASS = 4
"""Noised views scored in one forward pass."""


@dataclass(frozen=True)
class Estimate:
    """NELBO of each row, in nats, summed over its scored tokens."""

    nats_B: Tensor
    """The estimate."""
    nats_BT: Tensor
    """The part of it that falls on each noised slot of the streams."""
    stderr_B: Tensor
    """Standard error over the samples; they are stratified, so it errs on the large side. NaN for one sample."""
    tokens_B: Tensor
    """Scored tokens."""


@torch.no_grad()
def nelbo(
    model: DiffusionModel,
    streams: Streams,
    *,
    samples: int,
    seed: int,
    rows_B: Tensor | None = None,
    forward: Callable[[Layout], tuple[Tensor, Tensor]] | None = None,
) -> Estimate:
    """Monte Carlo estimate of the NELBO over the full range of t, of the maskable tokens given all others.

    Each sample masks n of a block's M scored tokens, n uniform on 1..M, and weights by M / n. The noise of a
    row depends on `seed` and its number in `rows_B` (default: its place) alone: not on batch size or order.
    `forward` is called in place of the model where that is wrapped for distributed evaluation.
    Source: MDLM (arXiv 2406.07524, eq. 10); the count form: MDM as any-order autoregression (arXiv 2410.14157).
    """
    maskable_BT = streams.is_maskable_BT
    rows_B = torch.arange(len(maskable_BT), device=maskable_BT.device) if rows_B is None else rows_B
    is_masked_KBT, weight_KBT = draw_fixed_count_mask(seed, rows_B, streams.chunk_BT, maskable_BT, samples=samples)
    nats_KBT = torch.zeros(samples, *maskable_BT.shape, device=maskable_BT.device)
    for start in range(0, samples, VIEWS_PER_PASS):
        views = slice(start, start + VIEWS_PER_PASS)
        layout = model.objective.layout(streams, is_masked_KBT[views], weight_KBT[views])
        nats_KBT[views].view(-1).index_add_(0, layout.token_M, (forward or model)(layout)[1] * layout.weight_M)
    nats_KB = nats_KBT.sum(-1)
    spread_B = nats_KB.std(0) if samples > 1 else torch.full_like(nats_KB[0], torch.nan)
    return Estimate(nats_KB.mean(0), nats_KBT.mean(0), spread_B / samples**0.5, maskable_BT.sum(1))
