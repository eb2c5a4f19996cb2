"""The loss: cross-entropy at the masked positions, in nats, without a tensor of logits for all of them."""

# Shapes: M scored positions, G positions of a group of chunks, C positions of a chunk, H hidden, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB of float32."""
CHUNK_ROWS = 128
"""A chunk has a multiple of so many rows."""
GROUP_CHUNKS = 4
"""In half precision the logits' gradient is kept for so many chunks: each group of them adds up [V, H] once."""
ROWS_MULTIPLE = 128
"""The head runs on a multiple of so many rows: a new shape at every step would have its kernel compiled, and kept, at every step."""


@dataclass(frozen=True)
class Head:
    """How logits come from hidden states: softcap(scale * (hidden @ weight.T + bias))."""

    scale: float = 1.0
    """Granite and Cohere scale their logits."""
    softcap: float | None = None
    """Gemma 2 squashes them to cap * tanh(logits / cap)."""
    excluded_token: int | None = None
    """Left out of the softmax (the mask token): it is not a prediction, so a uniform model scores log(V - 1)."""

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits [..., V] in float32, or in another precision."""
        logits = F.linear(hidden_CH, weight_VH, bias_V).to(dtype)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.excluded_token is not None:
            logits[..., self.excluded_token] = -torch.inf
        return logits

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """d logits / d (hidden @ weight.T + bias), from the logits; 0 where a token is excluded. None: it is 1."""
        if self.softcap is None:
            return None if self.scale == 1 else self.scale
        return (self.scale * (1 - (logits / self.softcap) ** 2)).clamp(min=0)


def weighted_cross_entropy(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_M: Tensor, coefficient_M: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """The sum of coefficient * cross-entropy, and the cross-entropies ce_M themselves (detached), in nats and float32.

    With the coefficients w(t) and divided by views x maskable tokens of the whole optimizer step, the sum is the NELBO per
    token. Logits exist for a chunk of positions at a time and once: their gradient is taken in the same pass, three
    matrix products in all, because the sum is a scalar, and what comes from behind can only scale it.
    Source: MDLM (arXiv 2406.07524, eq. 10); BD3LM (arXiv 2503.09573, eq. 8); gradients in the forward pass after
    Liger (arXiv 2410.10989).
    """
    if not torch.is_grad_enabled():  # the function below does not see that, and would work out what nobody asks for
        weight_VH, bias_V = weight_VH.detach(), None if bias_V is None else bias_V.detach()
    scored, spare = len(target_M), -len(target_M) % ROWS_MULTIPLE
    hidden_MH, target_M, coefficient_M = F.pad(hidden_MH, (0, 0, 0, spare)), F.pad(target_M, (0, spare)), F.pad(coefficient_M, (0, spare))
    total, ce_M = _WeightedCrossEntropy.apply(hidden_MH, weight_VH, bias_V, target_M, coefficient_M.float(), head)
    return total, ce_M[:scored]


class _WeightedCrossEntropy(torch.autograd.Function):
    """Forward and backward of `weighted_cross_entropy`, a chunk of positions at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_M: Tensor, coefficient_M: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        kind = hidden_MH.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_MH.dtype
        with torch.autocast(kind, enabled=False):
            weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
            wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]  # a frozen weight's gradient is a product less
            ce_M = torch.empty(len(target_M), device=hidden_MH.device)
            d_hidden_MH = torch.empty_like(hidden_MH) if wants_hidden else None
            d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
            d_bias_V = torch.zeros(len(weight_VH), device=hidden_MH.device) if wants_bias else None
            rows = -(-max(1, CHUNK_ELEMENTS // len(weight_VH)) // CHUNK_ROWS) * CHUNK_ROWS
            is_grouped = dtype != torch.float32
            group_rows = rows * GROUP_CHUNKS if is_grouped else rows
            for first in range(0, len(target_M), group_rows):
                group = slice(first, min(first + group_rows, len(target_M)))
                hidden_GH, coefficient_G1 = hidden_MH[group].to(dtype), coefficient_M[group, None]
                d_linear_GV = hidden_GH.new_empty(len(hidden_GH) if is_grouped else 0, len(weight))
                for start in range(first, group.stop, rows):
                    chunk = slice(start, min(start + rows, group.stop))
                    within, target_C1 = slice(start - first, chunk.stop - first), target_M[chunk, None]
                    logits_CV = head.logits(hidden_GH[within], weight, bias)
                    log_probability_CV = logits_CV.log_softmax(-1)
                    ce_M[chunk] = -log_probability_CV.gather(-1, target_C1)[:, 0]
                    if not (wants_hidden or wants_weight or wants_bias):
                        continue
                    d_logits_CV = _gradient(head, logits_CV, log_probability_CV, target_C1)
                    # The coefficient scales a position's whole row, so it goes to the small factors of the products below.
                    if d_bias_V is not None:
                        d_bias_V += (d_logits_CV * coefficient_M[chunk, None]).sum(0)
                    if is_grouped:
                        d_linear_GV[within] = d_logits_CV
                    else:
                        d_linear_GV = d_logits_CV
                if d_hidden_MH is not None:
                    d_hidden_MH[group] = (d_linear_GV @ weight) * coefficient_G1
                if d_weight_VH is not None:
                    _add_product(d_weight_VH, d_linear_GV.T, hidden_GH * coefficient_G1.to(dtype))
        ctx.save_for_backward(d_hidden_MH, d_weight_VH, d_bias_V)
        ctx.hidden_dtype, ctx.weight_dtype = hidden_MH.dtype, weight_VH.dtype
        ctx.mark_non_differentiable(ce_M)
        return (ce_M * coefficient_M).sum(), ce_M

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        kinds = ctx.hidden_dtype, ctx.weight_dtype, ctx.weight_dtype
        # In place: [V, H] is large, and autograd notices where a graph that was kept is gone through again.
        gradients = [None if d is None else d.mul_(d_total).to(kind) for d, kind in zip(ctx.saved_tensors, kinds, strict=True)]
        return (*gradients, None, None, None)


def _gradient(head: Head, logits_CV: Tensor, log_probability_CV: Tensor, target_C1: Tensor) -> Tensor:
    """d cross-entropy / d (hidden @ weight.T + bias) [C, V], in the memory of the log-probabilities."""
    minus_one_C1 = torch.full_like(target_C1, -1, dtype=torch.float32)
    d_logits_CV = log_probability_CV.exp_().scatter_add_(-1, target_C1, minus_one_C1)
    slope = head.slope(logits_CV)
    return d_logits_CV if slope is None else d_logits_CV.mul_(slope)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total is in float32."""
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right
