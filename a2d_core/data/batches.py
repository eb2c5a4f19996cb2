"""From rows to batches: filled, padded, and laid out for the network."""

# Shapes: B rows, L positions

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from a2d_core.config import require
from a2d_core.objectives import Objective, Streams


@dataclass(frozen=True)
class DiffusionCollator:
    """Rows of different lengths -> one batch: {streams, row: int64 [B] if the rows have numbers, tokens: how many there were}.

    A row has `input_ids`, and may have `turn` (0: given; k: supervised in the k-th copy; without it all is maskable) and
    `document` (where several are packed into the row). Behind its own tokens a row is first *filled*, with a token that is
    attended and maskable (so that a model learns where answers end), then *padded*, neither attended nor scored.
    """

    objective: Objective
    """What decides how a row is laid out."""
    fill_token_id: int
    """Token of the fill: the end-of-sequence token."""
    fill_to: Literal["block", "batch"] | None = None
    """How far a row is filled: to a multiple of the block, to the longest row of the batch, or not at all."""

    def __post_init__(self) -> None:
        size = self.objective.block_size
        require(self.fill_to != "block" or size is not None, f"fill_to='block' needs an objective with blocks, not block_size={size}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of {input_ids, and optionally turn, document and row}."""
        lengths = [len(row["input_ids"]) for row in rows]
        ends = [self._filled_length(length, max(lengths)) for length in lengths]
        width = max(ends)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "turn": [], "document": [], "valid": [], "is_fill": []}
        for row, length, end in zip(rows, lengths, ends, strict=True):
            fill, padding = end - length, width - end
            turn, document = list(row.get("turn") or [1] * length), list(row.get("document") or [0] * length)
            columns["input_ids"].append(list(row["input_ids"]) + [self.fill_token_id] * (fill + padding))
            columns["turn"].append(turn + turn[-1:] * fill + [0] * padding)
            columns["document"].append(document + document[-1:] * (fill + padding))
            columns["valid"].append([1] * end + [0] * padding)
            columns["is_fill"].append([0] * length + [1] * fill + [0] * padding)
        ids, turn_BL, document_BL, valid_BL, is_fill_BL = (torch.tensor(values) for values in columns.values())
        streams: Streams = self.objective.streams(
            ids, turn_BL, valid_BL.bool(), document_BL=document_BL, is_fill_BL=is_fill_BL.bool(),
            fill_token_id=self.fill_token_id if self.fill_to == "block" else None,
        )  # fmt: skip
        batch = {"streams": streams, "tokens": sum(lengths)}
        return batch | {"row": torch.tensor([row["row"] for row in rows])} if "row" in rows[0] else batch

    def _filled_length(self, length: int, longest: int) -> int:
        if self.fill_to == "batch":
            return longest
        size = self.objective.block_size if self.fill_to == "block" and self.objective.block_size else 1
        return -(-length // size) * size
