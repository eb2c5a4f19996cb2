"""The room in which MDLM and BD3LM differ. It answers four questions for each objective:

what the model sees (`layout`), who attends to whom (the slots of that layout, read by `attention`),
which positions are scored (`layout`), and in what order blocks fill and are cached (`segments`, `caches`).
Trainer, likelihood and sampler ask here; none of them asks which objective it is.
"""

# Shapes: B rows, L positions, N blocks per row, n noised blocks, K noised views, S slots, M scored positions

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from a2d_core.attention import Slots
from a2d_core.config import check_objective


@dataclass(frozen=True)
class Layout:
    """One forward pass: what goes in, and which of its outputs are scored against what."""

    input_ids_BS: Tensor
    slots: Slots
    source_M: Tensor
    """Flat index into [B * S] of the output that predicts each scored token."""
    target_M: Tensor
    """Clean token at each scored position."""
    weight_M: Tensor
    """Weight of each scored position's cross-entropy."""
    token_M: Tensor
    """Flat index into [K, B, L] of the view, row and position that is scored."""


@dataclass(frozen=True)
class Objective:
    """What a diffusion objective decides. `block_size` None: one block holds the whole sequence."""

    block_size: int | None
    mask_token_id: int
    right_shift: bool = False

    def blocks(self, length: int) -> int:
        """Number of blocks in a row of `length` positions."""
        return -(-length // (self.block_size or length))

    def block_of(self, position: Tensor) -> Tensor:
        """Block index of each logical position; blocks are anchored at position 0."""
        return position // self.block_size if self.block_size else torch.zeros_like(position)

    def maskable(self, labels_BL: Tensor) -> Tensor:
        """is_maskable_BL: the label is not -100; with the right shift nothing predicts position 0."""
        is_maskable_BL = labels_BL != -100
        if self.right_shift:
            is_maskable_BL[:, 0] = False
        return is_maskable_BL

    def noised_blocks(self, labels_BL: Tensor) -> Tensor:
        """Indices Bn of the blocks with maskable tokens, ascending, -1 behind a row's last: only these are noised."""
        is_maskable_BL = self.maskable(labels_BL)
        size, blocks = self.block_size or labels_BL.shape[1], self.blocks(labels_BL.shape[1])
        padded_BL = torch.nn.functional.pad(is_maskable_BL, (0, blocks * size - labels_BL.shape[1]))
        is_noised_BN = padded_BL.view(-1, blocks, size).any(-1)
        index_BN = torch.where(is_noised_BN, torch.arange(blocks, device=labels_BL.device), blocks).sort(dim=1).values
        index_Bn = index_BN[:, : max(1, int(is_noised_BN.sum(1).max()))]
        return index_Bn.masked_fill(index_Bn == blocks, -1)

    def layout(self, input_ids_BL: Tensor, valid_BL: Tensor, is_masked_KBL: Tensor, weight_KBL: Tensor, noised_blocks_Bn: Tensor) -> Layout:
        """The training and likelihood forward: [x_0 | x_t views], the clean stream without its last block, which nobody sees.

        With one block there is no clean stream and each view is a row of its own; with more, the K views
        of a row share its clean stream: (1 + K) L positions in place of 2 K L.
        """
        views, rows, length = is_masked_KBL.shape
        size = self.block_size or length
        clean_length = (self.blocks(length) - 1) * size
        position_BL = torch.arange(length, device=input_ids_BL.device).expand(rows, length)
        clean = Slots(position_BL, self.block_of(position_BL), torch.zeros_like(position_BL), valid_BL)[:clean_length]

        offset = torch.arange(size, device=input_ids_BL.device)
        position_BT = (noised_blocks_Bn[:, :, None] * size + offset).flatten(1)
        exists_BT = (position_BT >= 0) & (position_BT < length)
        position_BT = position_BT.clamp(0, length - 1)
        valid_BT = valid_BL.gather(1, position_BT) & exists_BT
        clean_ids_BT = input_ids_BL.gather(1, position_BT)

        index_KBT = position_BT.expand(views, -1, -1)
        is_scored_KBT = is_masked_KBL.gather(2, index_KBT) & valid_BT
        noised_ids_KBT = torch.where(is_scored_KBT, self.mask_token_id, clean_ids_BT)
        weight_KBT = weight_KBL.gather(2, index_KBT)

        if clean_length == 0:  # views are rows
            slots = Slots(*(x.repeat(views, 1) for x in self._copy(position_BT, valid_BT, view=1).fields()))
            clean_ids = clean_ids_BT.repeat(views, 1)
            ids, is_scored, weight = noised_ids_KBT.flatten(0, 1), is_scored_KBT.flatten(0, 1), weight_KBT.flatten(0, 1)
            return self._scored(ids, slots, is_scored, clean_ids, weight, length)
        for view in range(views):
            clean = clean.then(self._copy(position_BT, valid_BT, view=view + 1))
        nothing = torch.zeros_like(valid_BL[:, :clean_length])
        prefix = input_ids_BL[:, :clean_length]
        return self._scored(
            torch.cat([prefix, *noised_ids_KBT], 1), clean, torch.cat([nothing, *is_scored_KBT], 1),
            torch.cat([prefix, clean_ids_BT.repeat(1, views)], 1), torch.cat([nothing, *weight_KBT], 1), length,
        )  # fmt: skip

    def _copy(self, position_BT: Tensor, valid_BT: Tensor, view: int) -> Slots:
        return Slots(position_BT, self.block_of(position_BT), torch.full_like(position_BT, view), valid_BT)

    def _scored(
        self, input_ids_BS: Tensor, slots: Slots, is_scored_BS: Tensor, clean_ids_BS: Tensor, weight_BS: Tensor, length: int
    ) -> Layout:
        rows, width = input_ids_BS.shape
        index_M = is_scored_BS.flatten().nonzero()[:, 0]
        view_row_M = (slots.view.flatten()[index_M] - 1) * rows + index_M // width
        token_M = view_row_M * length + slots.position.flatten()[index_M]
        return Layout(
            input_ids_BS, slots, index_M - int(self.right_shift), clean_ids_BS.flatten()[index_M], weight_BS.flatten()[index_M], token_M
        )

    @property
    def caches(self) -> bool:
        """Whether what lies before the active block is final, and may live in a KV cache."""
        return self.block_size is not None

    def segments(self, prompt_length_B: Tensor, max_new_tokens: int, width: int | None) -> tuple[Tensor, int, int]:
        """The order in which a canvas is filled: start_B of the first segment, the segments' width, and their number.

        With blocks, a segment is a block, and the first is the block the prompt ends in. With one block, the
        segments divide what follows the prompt (`width` tokens each; None: one segment).
        """
        if self.block_size:
            start_B = prompt_length_B // self.block_size * self.block_size
            last = int(((prompt_length_B - start_B) + max_new_tokens).max())
            return start_B, self.block_size, -(-last // self.block_size)
        width = min(width or max_new_tokens, max_new_tokens)
        return prompt_length_B, width, -(-max_new_tokens // width)


def make(objective: str, *, block_size: int, mask_token_id: int, right_shift: bool = False) -> Objective:
    """The objective of that name: `mdlm` (arXiv 2406.07524) or `bd3lm` (arXiv 2503.09573)."""
    check_objective(objective)
    return Objective(block_size if objective == "bd3lm" else None, mask_token_id, right_shift)
