"""Pure losses: functions of tensors, in nats."""

# Shapes: M scored positions, H hidden, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB of float32."""

ROWS_MULTIPLE = 128
"""The head runs on a multiple of so many rows: a new shape at every step would have its kernel compiled, and kept, at every step."""


def masked_cross_entropy(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    target_M: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    excluded_token: int | None = None,
) -> Tensor:
    """Cross-entropy ce_M, in nats and float32, of softcap(scale * (hidden @ weight.T + bias)) against the targets.

    The logits exist for a chunk of positions at a time, and are computed again in the backward pass.
    `excluded_token` (the mask token) is left out of the softmax: it is not a prediction, so a uniform
    model scores log(V - 1).
    """

    def chunk(hidden_CH: Tensor, target_C: Tensor) -> Tensor:
        logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias).float() * scale
        if softcap is not None:
            logits_CV = softcap * torch.tanh(logits_CV / softcap)
        if excluded_token is not None:
            logits_CV = logits_CV.index_fill(1, torch.tensor(excluded_token, device=logits_CV.device), -torch.inf)
        return torch.nn.functional.cross_entropy(logits_CV, target_C, reduction="none")

    scored = len(target_M)
    spare = -scored % ROWS_MULTIPLE
    hidden_MH, target_M = torch.nn.functional.pad(hidden_MH, (0, 0, 0, spare)), torch.nn.functional.pad(target_M, (0, spare))
    rows = max(1, CHUNK_ELEMENTS // weight_VH.shape[0])
    pieces = list(zip(hidden_MH.split(rows), target_M.split(rows), strict=True))
    if len(pieces) == 1:
        return chunk(*pieces[0])[:scored]
    return torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])[:scored]


def weighted_mean(ce_M: Tensor, weight_M: Tensor, denominator: Tensor | float) -> Tensor:
    """sum(weight * cross-entropy) / denominator: nats per maskable token when the denominator is views x maskable tokens.

    The denominator belongs to the whole optimizer step, all processes and micro-batches, so that neither
    changes the gradient. Source: MDLM (arXiv 2406.07524, eq. 10); BD3LM (arXiv 2503.09573, eq. 8).
    """
    return (ce_M * weight_M).sum() / denominator
