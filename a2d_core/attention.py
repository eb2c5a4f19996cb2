"""Who attends to whom: one predicate for training, likelihood and cached sampling.

A slot is one token in a forward pass. It carries the logical position of the token in its document, the block that
the position lies in, the document (where several are packed into a row), and its view: 0 for the clean stream,
above it for the noised copies.
- A clean slot sees the clean slots of its own block and of the blocks before it.
- A noised slot sees its own block in its own view, and the clean blocks before it.
- Nobody sees another document.
Masked diffusion (MDLM) is the case of one block that holds the whole document.
Source: BD3LM (arXiv 2503.09573), sec. 3.2 and appendix B.6.
"""

# Shapes: B rows, Q query slots, S key slots

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_STRIDE = 1 << 20
"""More blocks than a document has, and more documents than a row."""


@dataclass(frozen=True)
class Slots:
    """What the attention needs to know of each slot; every field has shape [B, S], or [1, S] where the rows are alike."""

    position: Tensor
    """Logical position in the document, int64."""
    block: Tensor
    """Block that the position lies in, int64."""
    document: Tensor
    """Document within the row, int64."""
    view: Tensor
    """0 for the clean stream, above it for a noised copy, int64."""
    valid: Tensor
    """False for padding, which nobody sees."""

    @staticmethod
    def clean(position_BS: Tensor, block_BS: Tensor, valid_BS: Tensor | None = None) -> Slots:
        """Slots of one clean document per row, all of them valid unless told otherwise."""
        nought = torch.zeros_like(position_BS)
        return Slots(position_BS, block_BS, nought, nought, torch.ones_like(nought, dtype=torch.bool) if valid_BS is None else valid_BS)

    def __getitem__(self, index: Any) -> Slots:
        """Some of the rows, or, as [:, index], of the slots."""
        return self.map(lambda x: x[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The same change of every field."""
        return Slots(*(change(x) for x in self.fields()))

    def then(self, other: Slots) -> Slots:
        """These slots followed by others."""
        return Slots(*(torch.cat(pair, dim=1) for pair in zip(self.fields(), other.fields(), strict=True)))

    def padded(self, count: int) -> Slots:
        """These slots followed by padding."""
        return self.map(lambda x: torch.nn.functional.pad(x, (0, count)))

    def fields(self) -> tuple[Tensor, ...]:
        """position, block, document, view, valid."""
        return self.position, self.block, self.document, self.view, self.valid


@dataclass(frozen=True)
class _Reach:
    """The predicate in numbers, each [B, S]: a query sees the ranks in [first, limit), and the noised slots of its own copy."""

    first: Tensor
    limit: Tensor
    rank: Tensor
    """Of a clean slot: its block, counted over all documents; -1 for any other."""
    copy_as_query: Tensor
    copy_as_key: Tensor
    position: Tensor

    @staticmethod
    def of(slots: Slots) -> _Reach:
        first = slots.document * _STRIDE
        rank = first + slots.block
        is_clean = slots.valid & (slots.view == 0)
        # Padding is a copy of its own, its place counted from the end: it sees itself, so that no softmax is over nothing.
        place = torch.arange(-rank.shape[1], 0, device=rank.device) - 1
        copy = torch.where(slots.valid, rank + slots.view * _STRIDE * _STRIDE, place)
        return _Reach(
            first=first,
            limit=torch.where(slots.valid, rank + is_clean, first),
            rank=torch.where(is_clean, rank, -1),
            copy_as_query=torch.where(is_clean, 0, copy),
            copy_as_key=torch.where(is_clean, -1, copy),
            position=slots.position,
        )


def may_attend(query: Slots, key: Slots, window: int | None = None) -> Tensor:
    """Boolean mask [B, Q, S]: True where a query slot sees a key slot.

    The queries are the last Q of the S keys. Every slot sees itself, so that no softmax is over nothing.
    `window`: a sliding-window layer also requires |i - j| < window in logical positions.
    """
    q, k = _Reach.of(query), _Reach.of(key)
    rank, copy = k.rank[:, None, :], k.copy_as_key[:, None, :]
    mask = (rank >= q.first[:, :, None]) & (rank < q.limit[:, :, None])
    mask |= copy == q.copy_as_query[:, :, None]
    if window is not None:
        mask &= (q.position[:, :, None] - k.position[:, None, :]).abs() < window
    return mask


def flex_mask(query: Slots, key: Slots, window: int | None = None) -> BlockMask:
    """The same predicate for FlexAttention, which skips the tiles in which nobody sees anybody (arXiv 2412.05496)."""
    rows, queries = query.position.shape
    q, k = _Reach.of(query), _Reach.of(key)
    first, limit, copy = q.first, q.limit, q.copy_as_query
    rank, other_copy, position, other_position = k.rank, k.copy_as_key, q.position, k.position

    def mask_mod(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b = b if rows > 1 else b * 0  # rows that are alike share a mask
        seen = (rank[b, j] >= first[b, i]) & (rank[b, j] < limit[b, i]) | (other_copy[b, j] == copy[b, i])
        if window is not None:
            seen = seen & ((position[b, i] - other_position[b, j]).abs() < window)
        return seen

    device = query.position.device
    return create_block_mask(mask_mod, rows, None, queries, key.position.shape[1], device=device, _compile=device.type == "cuda")


def network_mask(query: Slots, key: Slots, implementation: str, dtype: torch.dtype, window: int | None = None) -> Tensor | BlockMask:
    """The mask in the form a transformers attention takes: [B, 1, Q, S], or a BlockMask for `flex_attention`.

    Boolean for `sdpa`; additive for `eager`, which would silently ignore booleans.
    """
    if implementation == "flex_attention":
        return flex_mask(query, key, window)
    mask = may_attend(query, key, window)[:, None]
    if implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
