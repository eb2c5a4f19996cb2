"""Who attends to whom: one predicate for training, likelihood and cached sampling.

A slot is one token in a forward pass. It carries the logical position of the token, the block that
the position lies in, and its view: 0 for the clean stream, 1..K for the noised copies.
- A clean slot sees the clean slots of its own block and of the blocks before it.
- A noised slot sees its own block in its own view, and the clean blocks before it.
Masked diffusion (MDLM) is the case of one block that holds the whole sequence.
Source: BD3LM (arXiv 2503.09573), sec. 3.2 and appendix B.6.
"""

# Shapes: B rows, Q query slots, S key slots

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """What the attention needs to know of each slot; every field has shape [B, S]."""

    position: Tensor
    """Logical position in the document, int64."""
    block: Tensor
    """Block that the position lies in, int64."""
    view: Tensor
    """0 for the clean stream, 1..K for a noised copy, int64."""
    valid: Tensor
    """False for padding, which nobody sees."""

    def __getitem__(self, index: slice) -> Slots:
        return Slots(*(x[:, index] for x in self.fields()))

    def then(self, other: Slots) -> Slots:
        """These slots followed by others."""
        return Slots(*(torch.cat(pair, dim=1) for pair in zip(self.fields(), other.fields(), strict=True)))

    def fields(self) -> tuple[Tensor, ...]:
        """position, block, view, valid."""
        return self.position, self.block, self.view, self.valid


def may_attend(query: Slots, key: Slots, window: int | None = None) -> Tensor:
    """Boolean mask [B, Q, S]: True where a query slot sees a key slot.

    The queries are the last Q of the S keys. Every slot sees itself, so that no softmax is over nothing.
    `window`: a sliding-window layer also requires |i - j| < window in logical positions.
    """
    q_block, q_view, q_position = query.block[:, :, None], query.view[:, :, None], query.position[:, :, None]
    k_block, k_view, k_position = key.block[:, None, :], key.view[:, None, :], key.position[:, None, :]
    sees_clean = (k_view == 0) & torch.where(q_view == 0, k_block <= q_block, k_block < q_block)
    sees_own_copy = (k_view > 0) & (k_view == q_view) & (k_block == q_block)
    mask = (sees_clean | sees_own_copy) & key.valid[:, None, :]
    if window is not None:
        mask &= (q_position - k_position).abs() < window
    queries, keys = mask.shape[1:]
    return mask | torch.eye(queries, keys, dtype=torch.bool, device=mask.device).roll(keys - queries, dims=1)


def network_mask(query: Slots, key: Slots, implementation: str, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The mask in the form a transformers attention takes, [B, 1, Q, S].

    Boolean for `sdpa`; additive for `eager`, which would silently ignore booleans.
    """
    mask = may_attend(query, key, window)[:, None]
    if implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
