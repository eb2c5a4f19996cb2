"""The forward process: schedules alpha(t), draws of t, and which tokens are masked.

Everything random here is a pure function of (seed, step, global row, position): the noise of a row
does not depend on the process that computes it, on gradient accumulation, or on a restart.

Source: MDLM (arXiv 2406.07524, eq. 9-10); stratified draws after VDM (arXiv 2107.00630, sec. I.1).
"""

# Shapes: B rows, L positions, N blocks per row, K noised views per row

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 1 << 64


def alpha(t: Tensor, schedule: str = "linear") -> Tensor:
    """The chance that a token is still clean at time t, in [0, 1]; falls from 1 at t=0 to 0 at t=1."""
    return 1 - t if schedule == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))


def nelbo_weight(t: Tensor, schedule: str = "linear") -> Tensor:
    """w(t) = -alpha'(t) / (1 - alpha(t)), the weight of a masked token's cross-entropy (MDLM, eq. 10)."""
    if schedule == "linear":
        return 1 / t
    angle = math.pi / 2 * (1 - t)
    return math.pi / 2 * torch.tan(angle)


def hashed_uniform(seed: int, step: int, *counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but their counters.

    `counters` are integer tensors that broadcast against each other (a global row, a view, a position);
    the result has their common shape, float32, 24 random bits. The mixing function is splitmix64's.
    """
    key = _mix_int(_mix_int(seed % _WORD) + step)
    first, *others = counters
    state = _mix(first * _signed(_GOLDEN) + _signed(key))
    for counter in others:
        state = _mix(state + counter * _signed(_GOLDEN))
    return _shift(state, 40).to(torch.float32) / (1 << 24)


def draw_t(
    method: str, seed: int, step: int, rows_B: Tensor, *, total_rows: int, blocks: int, views: int, t_min: float, t_max: float
) -> Tensor:
    """Diffusion times t_KBN in [t_min, t_max] of the given global rows of one optimizer step.

    `stratified`: the N = rows x views x blocks times of the whole step divide [t_min, t_max] into equal
    strata, one draw in each, dealt out by a permutation: t = t_min + (t_max - t_min) frac(u + pi(i) / N).
    `iid`: independent for each block. `per_sequence`: independent for each row and view, shared by its blocks.
    """
    view_K11 = torch.arange(views, device=rows_B.device)[:, None, None]
    row_1B1 = rows_B[None, :, None]
    block_11N = torch.arange(blocks, device=rows_B.device)[None, None, :]
    if method == "stratified":
        count = total_rows * views * blocks
        generator = torch.Generator().manual_seed(_mix_int(_mix_int(seed % _WORD) + step) >> 1)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        order = torch.randperm(count, generator=generator).to(rows_B.device)
        stratum_KBN = order[(row_1B1 * views + view_K11) * blocks + block_11N]
        unit_KBN = ((offset.item() + stratum_KBN.to(torch.float64) / count) % 1).to(torch.float32)
    else:
        below_11N = -1 - block_11N * (method == "iid")  # the counters from 0 on are the positions of `draw_mask`
        unit_KBN = hashed_uniform(seed, step, row_1B1, view_K11, below_11N)
        unit_KBN = unit_KBN.expand(views, len(rows_B), blocks)
    return t_min + (t_max - t_min) * unit_KBN


def draw_mask(seed: int, step: int, rows_B: Tensor, mask_chance_KBL: Tensor, is_maskable_BL: Tensor) -> Tensor:
    """is_masked_KBL: each maskable token is masked independently with its chance 1 - alpha(t)."""
    views, _, length = mask_chance_KBL.shape
    view_K11 = torch.arange(views, device=rows_B.device)[:, None, None]
    position_11L = torch.arange(length, device=rows_B.device)[None, None, :]
    return (hashed_uniform(seed, step, rows_B[None, :, None], view_K11, position_11L) < mask_chance_KBL) & is_maskable_BL


def draw_fixed_count_mask(seed: int, rows_B: Tensor, block_BL: Tensor, is_maskable_BL: Tensor, *, samples: int) -> tuple[Tensor, Tensor]:
    """Masks with a fixed count: n of the M maskable tokens of each block, n uniform on 1..M, any n of them alike.

    Weighted by M / n, the cross-entropies of the masked tokens estimate the NELBO of the full range of t
    without its 1/t tail (the count n marginalises t out: MDM as any-order AR, arXiv 2410.14157). The `samples` draws K
    are systematic: a block's n are spread evenly over 1..M, and the masks take turns along one shuffled order of its tokens, so
    that each token is masked about as often as any other. Returns is_masked_KBL and weight_KBL.
    """
    blocks = int(block_BL.max()) + 1
    view_K11 = torch.arange(samples, device=rows_B.device)[:, None, None]
    row_1B1 = rows_B[None, :, None]
    in_block_BNL = torch.nn.functional.one_hot(block_BL, blocks).transpose(1, 2)
    maskable_BN = (in_block_BNL * is_maskable_BL[:, None, :]).sum(-1)
    spread_KBN = (hashed_uniform(seed, 0, row_1B1, torch.arange(blocks, device=rows_B.device)[None, None, :]) + view_K11 / samples) % 1
    count_KBN = (spread_KBN * maskable_BN).floor().long().clamp(max=(maskable_BN - 1).clamp(min=0)) + 1
    # Rank of each token in its block, the maskable ones first and shuffled: its place in an order by block, then by score.
    score_BL = hashed_uniform(seed, 1, rows_B[:, None], torch.arange(block_BL.shape[1], device=rows_B.device)[None, :])
    order_BL = (block_BL + torch.where(is_maskable_BL, score_BL.double() / 2, 0.75)).argsort(dim=-1)
    before_BN = in_block_BNL.sum(-1).cumsum(-1) - in_block_BNL.sum(-1)
    rank_BL = order_BL.argsort(dim=-1) - before_BN.gather(-1, block_BL)
    turn_KBN = (count_KBN.cumsum(0) - count_KBN) % maskable_BN.clamp(min=1)
    block_KBL, maskable_BL = block_BL.expand(samples, -1, -1), maskable_BN.gather(-1, block_BL)
    place_KBL = (rank_BL - turn_KBN.gather(-1, block_KBL)) % maskable_BL.clamp(min=1)
    is_masked_KBL = (place_KBL < count_KBN.gather(-1, block_KBL)) & is_maskable_BL
    return is_masked_KBL, (maskable_BN / count_KBN).gather(-1, block_KBL)


def every_mask(block_BL: Tensor, is_maskable_BL: Tensor, *, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """All 2^M - 1 masks of each block with no more of them than `samples`: what `draw_fixed_count_mask` estimates, without noise.

    View k has mask k + 1, read as a binary number, and the weight samples / (n C(M, n)), so that the mean over the views is
    the expectation over n uniform on 1..M. Returns is_masked_KBL, weight_KBL and is_small_BL: where a block is that small.
    """
    blocks, most = int(block_BL.max()) + 1, (samples + 1).bit_length() - 1
    maskable_BN = torch.zeros(len(block_BL), blocks, dtype=torch.long, device=block_BL.device).scatter_add(
        1, block_BL, is_maskable_BL.long()
    )
    maskable_BL, before_BN = maskable_BN.gather(1, block_BL), maskable_BN.cumsum(1) - maskable_BN
    index_BL = is_maskable_BL.cumsum(1) - is_maskable_BL.long() - before_BN.gather(1, block_BL)
    number_K = torch.arange(1, samples + 1, device=block_BL.device)
    is_masked_KBL = ((number_K[:, None, None] >> index_BL.clamp(max=62)) & 1).bool() & (
        number_K[:, None, None] >> maskable_BL.clamp(max=62) == 0
    )
    counts = [int(number).bit_count() for number in range(1, samples + 1)]
    table = [[samples / (n * math.comb(m, n)) if n <= m else 0.0 for n in counts] for m in range(most + 1)]
    weight_KBL = torch.tensor(table, device=block_BL.device)[maskable_BL.clamp(max=most)].movedim(-1, 0)
    return is_masked_KBL & is_maskable_BL, weight_KBL, maskable_BL <= most


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a 64-bit integer tensor."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) % _WORD
    x = ((x ^ (x >> 30)) * _MIX_1) % _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) % _WORD
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - _WORD if x >= _WORD // 2 else x
