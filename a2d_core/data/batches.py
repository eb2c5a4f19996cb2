"""From rows to batches."""

# Shapes: B rows, L positions

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from a2d_core.config import require

IGNORED = -100
"""Label of a token that is never masked and never scored."""


@dataclass(frozen=True)
class DiffusionCollator:
    """Rows of different lengths -> one batch: {input_ids, labels: int64 [B, L]; valid: bool [B, L]; row: int64 [B], if rows have one}.

    Behind its own tokens a row is first *filled*, with a token that is attended and maskable (so that a model learns
    where answers end), then *padded*, neither attended nor scored. A row without labels is all maskable.
    """

    pad_token_id: int
    """Token of the padding."""
    fill_token_id: int
    """Token of the fill: the end-of-sequence token."""
    fill_to: Literal["block", "batch"] | None = None
    """How far a row is filled: to a multiple of `block_size`, to the longest row of the batch, or not at all."""
    block_size: int | None = None
    """Tokens per block, for `fill_to="block"`."""
    canvas: int | None = None
    """With `fill_to="batch"`: fill to at least this many tokens."""
    label_first: bool = True
    """Whether the first token of a row may be masked and scored; when false it is given."""

    def __post_init__(self) -> None:
        require(self.fill_to != "block" or (self.block_size or 0) >= 1, f"fill_to='block' needs a block_size, not {self.block_size}")
        require(self.canvas is None or self.fill_to == "batch", f"canvas={self.canvas} needs fill_to='batch', not {self.fill_to!r}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of {input_ids, and optionally labels and row}."""
        lengths = [len(row["input_ids"]) for row in rows]
        ends = [self._filled_length(length, max(lengths)) for length in lengths]
        width = max(ends)
        batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "valid": []}
        for row, end in zip(rows, ends, strict=True):
            ids, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
            fill, padding = [self.fill_token_id] * (end - len(ids)), width - end
            batch["input_ids"].append(ids + fill + [self.pad_token_id] * padding)
            batch["labels"].append(labels + fill + [IGNORED] * padding)
            batch["valid"].append([True] * end + [False] * padding)
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        if not self.label_first:
            tensors["labels"][:, 0] = IGNORED
        if "row" in rows[0]:
            tensors["row"] = torch.tensor([row["row"] for row in rows])
        return tensors

    def _filled_length(self, length: int, longest: int) -> int:
        if self.fill_to == "batch":
            return max(longest, self.canvas or 0)
        size = self.block_size if self.fill_to == "block" and self.block_size else 1
        return -(-length // size) * size
