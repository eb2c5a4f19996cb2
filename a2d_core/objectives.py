"""The room in which MDLM and BD3LM differ. It answers four questions for each objective:

what the model sees (`layout`), who attends to whom (the slots of that layout, read by `attention`),
which positions are scored (`layout`), and in what order blocks fill and are cached (`segments`, `queries`).
Trainer, likelihood and sampler ask here; none of them asks which objective it is.
"""

# Shapes: B rows, L positions, C clean slots, T noised slots, D = L x turns, K noised views, S slots, M scored positions

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from a2d_core.attention import Slots
from a2d_core.config import SampleConfig, check_objective, require

_TURNS = 1 << 10
"""More turns than a row has: the copies of view k are numbered from k times this."""


@dataclass(frozen=True)
class Streams:
    """What a batch shows the network: the clean stream, and the copy of which some tokens will be masked.

    Neither holds a token that nobody needs: the clean stream of a document ends before its last noised block, and the
    copy has the blocks with maskable tokens alone.
    """

    clean_ids_BC: Tensor
    clean: Slots
    noised_ids_BT: Tensor
    """The clean tokens of the copy."""
    noised: Slots
    is_maskable_BT: Tensor
    is_fill_BT: Tensor
    """Whether a slot is fill behind the end of an answer."""
    chunk_BT: Tensor
    """Noised block of the row that a slot lies in, 0..n-1: its slots share a diffusion time."""
    key: bytes | None
    """What the slots are known by where all rows are alike; they are then stored once, as [1, C] and [1, T]."""

    def sharing(self, copies: int) -> Streams:
        """The same, each `copies` rows, whose clean streams are alike, on one of them: as answers to one question are."""
        return replace(self, clean_ids_BC=self.clean_ids_BC[::copies], clean=self.clean if self.key else self.clean[::copies])

    @property
    def chunks(self) -> int:
        """n: noised blocks per row, the largest."""
        return int(self.chunk_BT.max()) + 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Streams:
        """The same on a device."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Streams:
        """The same in page-locked memory, for DataLoader."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Streams:
        fields = {name: value for name, value in vars(self).items() if name != "key"}
        changed: dict[str, Any] = {k: v.map(change) if isinstance(v, Slots) else change(v) for k, v in fields.items()}
        return Streams(**changed, key=self.key)

    def extended(self, length: int, fill_token_id: int) -> Streams:
        """Filled to `length` noised slots, attended and maskable, where a row is one block (the MDLM canvas)."""
        more = length - self.noised_ids_BT.shape[1]
        beyond = (torch.arange(length, device=self.noised.position.device) - (length - more - 1)).clamp(min=0)
        noised = self.noised.map(lambda x: torch.cat([x, x[:, -1:].expand(-1, more)], 1))
        return replace(
            self,
            noised_ids_BT=pad(self.noised_ids_BT, (0, more), value=fill_token_id),
            noised=replace(noised, position=noised.position + beyond),
            is_maskable_BT=pad(self.is_maskable_BT, (0, more), value=True),
            is_fill_BT=pad(self.is_fill_BT, (0, more), value=True),
            chunk_BT=pad(self.chunk_BT, (0, more)),
            key=self.key and self.key + length.to_bytes(8, "little"),
        )


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
    """Flat index into [K, B, T] of the view, row and noised slot that is scored."""
    key: tuple[bytes, int] | None
    """What the slots are known by where all rows are alike: a mask made for them serves again."""


@dataclass(frozen=True)
class Objective:
    """What a diffusion objective decides. `block_size` None: one block holds the whole document."""

    block_size: int | None
    mask_token_id: int
    right_shift: bool = False

    def block_of(self, position: Tensor, lead: Tensor | int = 0) -> Tensor:
        """Block index of each logical position; blocks are anchored at position 0, or `lead` positions before it."""
        return (position + lead) // self.block_size if self.block_size else torch.zeros_like(position)

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where the first and the last block begin that hold the positions from `begin` to before `end`."""
        size = self.block_size
        return (begin // size * size, (end - 1) // size * size) if size else (0, 0)

    def streams(
        self,
        input_ids_BL: Tensor,
        turn_BL: Tensor,
        valid_BL: Tensor | None = None,
        *,
        document_BL: Tensor | None = None,
        is_fill_BL: Tensor | None = None,
        fill_token_id: int | None = None,
    ) -> Streams:
        """Lay out rows: what is given, and what will be noised. The shapes depend on the data: call it on the CPU.

        `turn_BL`: 0 for what is given, k for what is maskable in the k-th copy; a block in which two turns meet is noised
        twice. With a `fill_token_id` a copy has fill, maskable, from the end of its turn to the end of that block, whatever
        follows there in the row: sampling sees no more. `document_BL`: documents that are packed into a row, numbered
        from 0; each has positions and blocks of its own and sees itself alone. `valid_BL`: False for padding.
        """
        length, index_L = input_ids_BL.shape[1], torch.arange(input_ids_BL.shape[1])
        nothing_BL = torch.zeros_like(input_ids_BL)
        valid_BL = ~nothing_BL.bool() if valid_BL is None else valid_BL
        document_BL = nothing_BL if document_BL is None else document_BL
        is_fill_BL = nothing_BL.bool() if is_fill_BL is None else is_fill_BL
        position_BL = index_L - torch.where(_changes(document_BL), index_L, 0).cummax(1).values
        block_BL = self.block_of(position_BL)
        segment_BL = (_changes(document_BL) | _changes(block_BL)).cumsum(1) - 1
        is_maskable_BL = valid_BL & ((position_BL > 0) | (not self.right_shift))

        copies = []
        turns = max(1, int(turn_BL.max()))
        for turn in range(1, turns + 1):
            masked_BL = is_maskable_BL & (turn_BL == turn)
            noised_BL = valid_BL & (_largest(masked_BL, segment_BL) > 0)
            end_B1 = torch.where(turn_BL == turn, index_L, -1).amax(1, keepdim=True)
            behind_BL = noised_BL & (index_L > end_B1) & (fill_token_id is not None)
            ids_BL = torch.where(behind_BL, fill_token_id or 0, input_ids_BL)
            copies.append((noised_BL, ids_BL, masked_BL | behind_BL, masked_BL & is_fill_BL | behind_BL))
        noised_BD, ids_BD, maskable_BD, fill_BD = (torch.cat(parts, 1) for parts in zip(*copies, strict=True))
        index_BT, exists_BT = _compacted(noised_BD, least=1)
        ever_noised_BL = noised_BD.view(len(noised_BD), turns, length).any(1)
        before_BL = segment_BL < _largest(torch.where(ever_noised_BL, segment_BL, -1), document_BL)
        index_BC, needed_BC = _compacted(before_BL & valid_BL, least=0)

        def slots(index_BS: Tensor, view_BS: Tensor, exists_BS: Tensor) -> Slots:
            position_BS, block_BS, document_BS = (x.gather(1, index_BS) for x in (position_BL, block_BL, document_BL))
            return Slots(position_BS, block_BS, document_BS, view_BS, exists_BS)

        place_BT = index_BT % length
        clean = slots(index_BC, torch.zeros_like(index_BC), needed_BC)
        noised = slots(place_BT, 1 + index_BT // length, exists_BT)
        key = None
        if all((x == x[:1]).all() for x in (*clean.fields(), *noised.fields())):
            clean, noised = clean[:1], noised[:1]
            key = hashlib.blake2b(b"".join(x.numpy().tobytes() for x in (*clean.fields(), *noised.fields()))).digest()
        return Streams(
            clean_ids_BC=input_ids_BL.gather(1, index_BC),
            clean=clean,
            noised_ids_BT=ids_BD.gather(1, index_BT),
            noised=noised,
            is_maskable_BT=maskable_BD.gather(1, index_BT) & exists_BT,
            is_fill_BT=fill_BD.gather(1, index_BT) & exists_BT,
            chunk_BT=(exists_BT & (_changes(segment_BL.gather(1, place_BT)) | _changes(index_BT // length))).cumsum(1).sub(1).clamp(min=0),
            key=key,
        )

    def layout(self, streams: Streams, is_masked_KBT: Tensor, weight_KBT: Tensor) -> Layout:
        """The forward pass of training and likelihood, [x_0 | x_t views].

        The K views of a row, and rows that share their clean stream, stand on one, (1 + K) L positions in place of 2 K L;
        where there is no clean stream (one block), each view is a row of its own.
        """
        views, rows, noised = is_masked_KBT.shape
        clean, copies = streams.clean_ids_BC.shape[1], rows // len(streams.clean_ids_BC)
        noised_ids_KBT = torch.where(is_masked_KBT, self.mask_token_id, streams.noised_ids_BT)
        token_M = is_masked_KBT.flatten().nonzero()[:, 0]
        if clean:
            slots, ids = streams.clean, [streams.clean_ids_BC]
            for copy in range(views * copies):
                here = streams.noised if streams.key else streams.noised[copy % copies :: copies]
                slots = slots.then(replace(here, view=here.view + copy * _TURNS))
                ids.append(noised_ids_KBT[copy // copies, copy % copies :: copies])
            ids_BS, row_M = torch.cat(ids, 1), token_M // noised % rows
            copy_M = token_M // (noised * rows) * copies + row_M % copies
            source_M = row_M // copies * ids_BS.shape[1] + clean + copy_M * noised + token_M % noised
        else:
            slots = streams.noised.map(lambda x: x.repeat(1 if streams.key else views, 1))
            source_M, ids_BS = token_M, noised_ids_KBT.flatten(0, 1)
        target_M, weight_M = streams.noised_ids_BT.flatten()[token_M % (rows * noised)], weight_KBT.flatten()[token_M]
        key = (streams.key, views * copies) if streams.key else None
        return Layout(ids_BS, slots, source_M - int(self.right_shift), target_M, weight_M, token_M, key)

    def segments(self, begin: int, end: int, width: int | None, lead: int = 0) -> list[tuple[int, int]]:
        """The stretches [start, stop) in which positions [begin, end) are filled, in their order.

        With blocks, a stretch is a block, from the one that `begin` lies in. With one block, the stretches divide what is to be
        filled (`width` tokens each; None: one stretch).
        """
        width = self.block_size or width or end - begin
        first = (begin + lead) // width * width - lead if self.block_size else begin
        return [(start, min(start + width, end)) for start in range(first, end, width)]

    def settled(self, start: int) -> int:
        """How many positions at the front have final keys that the first evaluation of a stretch from `start` on does not compute."""
        return max(0, start - self.block_size) if self.block_size else 0

    def queries(self, cache: str, width: int, *, is_first: bool) -> tuple[int | None, int | None]:
        """What an evaluation computes anew: so many positions before the start of the active stretch, and from there on (None: all).

        With blocks, whatever lies before the active one is final and cached: a block's first evaluation commits the block
        before it. With one block every token sees every other, so that all are computed anew; the approximate caches take
        what lies before the stretch (`prefix`) or around it (`dual`) from its first evaluation (Fast-dLLM, arXiv 2505.22618).
        """
        if self.block_size:
            return (self.block_size if is_first else 0), self.block_size
        if is_first or cache == "exact":
            return None, None
        return 0, (width if cache == "dual" else None)

    def sees_until(self, stop: int, end: int) -> int:
        """How far an active stretch that stops at `stop` sees in a row of length `end`."""
        return stop if self.block_size else end

    def sees_behind(self, position: int, other: int, lead: int = 0) -> bool:
        """Whether a position sees another one that lies behind it."""
        return not self.block_size or (position + lead) // self.block_size == (other + lead) // self.block_size

    def check_sampling(self, config: SampleConfig) -> None:
        """Raise `UserError` where this objective cannot be sampled so."""
        if self.block_size is None:
            require(
                config.block_origin != "prompt_end",
                f"block_origin={config.block_origin} is about bd3lm's blocks: an mdlm canvas has one. Leave it out",
            )
            return
        require(config.cache == "exact", f"cache={config.cache} is for mdlm: bd3lm's cache is exact. Leave it at exact")
        require(
            config.guidance == 0,
            f"guidance={config.guidance} is for mdlm: its prompt is masked for it, and bd3lm never saw a mask token in what is final. "
            "Leave it at 0",
        )


def make(objective: str, *, block_size: int, mask_token_id: int, right_shift: bool = False) -> Objective:
    """The objective of that name: `mdlm` (arXiv 2406.07524) or `bd3lm` (arXiv 2503.09573); raises `UserError` for another."""
    check_objective(objective)
    return Objective(block_size if objective == "bd3lm" else None, mask_token_id, right_shift)


def _changes(x_BL: Tensor) -> Tensor:
    """True where a value differs from the one before it, and at the first."""
    return torch.cat([torch.ones_like(x_BL[:, :1], dtype=torch.bool), x_BL[:, 1:] != x_BL[:, :-1]], 1)


def _largest(value_BL: Tensor, group_BL: Tensor) -> Tensor:
    """For each position the largest value of its group."""
    groups = int(group_BL.max()) + 1
    largest = torch.full((len(value_BL), groups), -1).scatter_reduce(1, group_BL, value_BL.long(), "amax")
    return largest.gather(1, group_BL)


def _compacted(flag_BD: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Indices of the flagged positions of each row, in order, as many columns as the fullest row has; and which of them exist."""
    row, index = flag_BD.nonzero(as_tuple=True)
    count_B = flag_BD.sum(1)
    width = max(least, int(count_B.max()))
    index_BT = torch.zeros(len(flag_BD), width, dtype=torch.long)
    index_BT[row, torch.arange(len(row)) - (count_B.cumsum(0) - count_B)[row]] = index
    return index_BT, torch.arange(width) < count_B[:, None]
