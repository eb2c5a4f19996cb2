"""Likelihoods of a diffusion language model: the NELBO with its standard error, and the exact one of a fixed reveal order."""

# Shapes: B rows, T noised slots, S = B x T, K samples (noised views), M scored positions, C of them at once, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from a2d_core.config import require
from a2d_core.models import DiffusionModel
from a2d_core.noise import draw_fixed_count_mask, every_mask
from a2d_core.objectives import Layout, Streams

VIEWS_PER_PASS = 4
"""Noised views scored in one forward pass."""
POSITIONS_AT_ONCE = 256
"""Positions whose logits the exact likelihood holds at once."""


@dataclass(frozen=True)
class Estimate:
    """NELBO of each row, in nats, summed over its scored tokens."""

    nats_B: Tensor
    """The estimate."""
    nats_BT: Tensor
    """The part of it that falls on each noised slot of the streams."""
    stderr_B: Tensor
    """Standard error from the spread of the samples, NaN for one; 0 where there is no noise. The samples are systematic, not
    independent, so that it errs on the large side: by a factor of 1.4 to 1.7 for 8 samples of 24 tokens."""
    tokens_B: Tensor
    """Scored tokens."""
    nats_KB: Tensor
    """The estimate of each sample; all alike where there is no noise."""


def ratio(total_B: Tensor, size_B: Tensor) -> tuple[float | None, float | None]:
    """sum(total) / sum(size), and its standard error over rows (delta method); None where there is no size, or one row."""
    total_B, size_B = total_B.double(), size_B.double()
    if size_B.sum() == 0:
        return None, None
    found = total_B.sum() / size_B.sum()
    rows = len(total_B)
    stderr = (total_B - found * size_B).std().item() * rows**0.5 / size_B.sum().item() if rows > 1 else None
    return found.item(), stderr


@torch.no_grad()
def nelbo(
    model: DiffusionModel,
    streams: Streams,
    *,
    samples: int,
    seed: int,
    rows_B: Tensor | None = None,
) -> Estimate:
    """Monte Carlo estimate of the NELBO over the full range of t, of the maskable tokens given all others.

    Each sample masks n of a block's M scored tokens, n uniform on 1..M, and weights by M / n. A block with at most
    `samples` masks in all is summed over all of them, and has no noise. The noise of a row depends on `seed` and its
    number in `rows_B` (default: its place) alone: not on batch size or order. Rows of `streams` that share a clean
    stream are scored in one row of the network.
    Source: MDLM (arXiv 2406.07524, eq. 10); the count form: MDM as any-order autoregression (arXiv 2410.14157).
    """
    maskable_BT = streams.is_maskable_BT
    rows_B = torch.arange(len(maskable_BT), device=maskable_BT.device) if rows_B is None else rows_B
    drawn_KBT, drawn_weight_KBT = draw_fixed_count_mask(seed, rows_B, streams.chunk_BT, maskable_BT, samples=samples)
    every_KBT, every_weight_KBT, is_small_BT = every_mask(streams.chunk_BT, maskable_BT, samples=samples)
    is_masked_KBT = torch.where(is_small_BT, every_KBT, drawn_KBT)
    weight_KBT = torch.where(is_small_BT, every_weight_KBT, drawn_weight_KBT)
    nats_KBT = torch.zeros(samples, *maskable_BT.shape, device=maskable_BT.device)
    for start in range(0, samples, VIEWS_PER_PASS):
        views = slice(start, start + VIEWS_PER_PASS)
        layout = model.objective.layout(streams, is_masked_KBT[views], weight_KBT[views])
        nats_KBT[views].view(-1).index_add_(0, layout.token_M, model(layout)[1] * layout.weight_M)
    nats_KBT = torch.where(is_small_BT, nats_KBT.mean(0), nats_KBT)
    nats_KB, is_noisy_B = nats_KBT.sum(-1), (maskable_BT & ~is_small_BT).any(1)
    spread_B = nats_KB.std(0) if samples > 1 else torch.full_like(nats_KB[0], torch.nan)
    stderr_B = torch.where(is_noisy_B, spread_B / samples**0.5, 0.0)
    return Estimate(nats_KB.mean(0), nats_KBT.mean(0), stderr_B, maskable_BT.sum(1), nats_KB)


@torch.no_grad()
def exact(model: DiffusionModel, streams: Streams, *, order: str = "confidence") -> Estimate:
    """Minus the exact log-likelihood under the sampler that reveals one token of a block at a time, at temperature 1, in this order.

    The order depends on what the network predicts, never on the token that is drawn (`ORDERS`; ties go to the first
    position): a sequence comes about in one way alone, and its probability is the product of its tokens' (DUEL, arXiv
    2603.01367). All blocks of all rows take their step in one pass, so that it takes as many passes as a block
    has maskable tokens, whatever the length. Raises `UserError` for an unknown order.
    """
    require(order in ORDERS, f"unknown reveal order '{order}': choose one of {', '.join(ORDERS)}")
    is_masked_BT, (rows, slots) = streams.is_maskable_BT.clone(), streams.is_maskable_BT.shape
    block_S = (streams.chunk_BT + streams.chunks * torch.arange(rows, device=model.device)[:, None]).flatten()
    count = torch.zeros(rows * streams.chunks, dtype=torch.long, device=model.device)
    passes = int(count.index_add(0, block_S, is_masked_BT.flatten().long()).max())
    nats_S, index_S = torch.zeros(rows * slots, device=model.device), torch.arange(rows * slots, device=model.device)
    for _ in range(passes):
        layout = model.objective.layout(streams, is_masked_BT[None], torch.ones_like(is_masked_BT[None], dtype=torch.float))
        found_M, score_M = _predict(model, layout, ORDERS[order])
        score_M = score_M.nan_to_num(nan=-torch.inf)  # what is no number is revealed too, and the sum becomes none
        score_S = torch.full_like(nats_S, -torch.inf).index_copy(0, layout.token_M, score_M)
        best_S = torch.full_like(count, -torch.inf, dtype=torch.float).scatter_reduce(0, block_S, score_S, "amax")[block_S]
        is_best_S = is_masked_BT.flatten() & (score_S == best_S)
        place_S = torch.where(is_best_S, index_S, rows * slots)
        first_S = torch.full_like(count, rows * slots).scatter_reduce(0, block_S, place_S, "amin")[block_S]
        reveal_S = is_best_S & (index_S == first_S)
        nats_S += torch.where(reveal_S, torch.zeros_like(nats_S).index_copy(0, layout.token_M, found_M), 0)
        is_masked_BT &= ~reveal_S.view(rows, slots)
    nats_BT = nats_S.view(rows, slots)
    nats_B = nats_BT.sum(1)
    return Estimate(nats_B, nats_BT, torch.zeros(rows, device=model.device), streams.is_maskable_BT.sum(1), nats_B[None])


def _predict(model: DiffusionModel, layout: Layout, score: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Minus the log-probability of each scored token, and the score of its position, some positions at a time."""
    hidden_MH = model.hidden(layout.input_ids_BS, layout.slots, key=layout.key).flatten(0, 1)[layout.source_M]
    found = []
    for hidden_CH, target_C in zip(hidden_MH.split(POSITIONS_AT_ONCE), layout.target_M.split(POSITIONS_AT_ONCE), strict=True):
        log_probability_CV = model.logits(hidden_CH).log_softmax(-1)
        found.append((-log_probability_CV.gather(-1, target_C[:, None])[:, 0], score(log_probability_CV)))
    nats, scores = zip(*found, strict=True)
    return torch.cat(nats), torch.cat(scores)


def _lead(log_probability_CV: Tensor) -> Tensor:
    first, second = log_probability_CV.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": lambda log_probability_CV: log_probability_CV.amax(-1),
    "entropy": lambda log_probability_CV: -torch.special.entr(log_probability_CV.exp()).sum(-1),
    "margin": _lead,
    "left_to_right": lambda log_probability_CV: torch.zeros_like(log_probability_CV[:, 0]),
}
"""Reveal order -> the score of a masked position; that with the largest is revealed next."""
