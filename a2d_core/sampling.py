"""Generation: a driver, one step, and small policies for which tokens to reveal.

The canvas of a row is its prompt and then mask tokens. It is filled segment by segment in the
objective's order; within a segment, each network evaluation reveals some of the masked tokens.
Block diffusion keeps what is final in a KV cache that grows by one block per segment: the pass that
commits a block is the first evaluation of the next one.
"""

# Shapes: B rows, L canvas positions, A positions of the active segment, H hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from a2d_core.attention import Slots
from a2d_core.config import SampleConfig, require
from a2d_core.models import DiffusionModel


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered with."""

    tokens: list[int]
    """New tokens, up to and without the first stop token."""
    nfe: int
    """Network evaluations in which this row had masked tokens."""
    finished: bool
    """Whether a stop token ended it, rather than the token limit."""


def generate(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    *,
    generator: torch.Generator | None = None,
    max_new_tokens: int | None = None,
) -> list[Generation]:
    """Answer each prompt (token ids) in its order, `config.batch_size` at a time.

    `generator` draws tokens (temperature > 0) and positions (policy `random`); it must be on the model's
    device. The result of greedy decoding does not depend on what shares the batch, up to float rounding.
    Raises `UserError` where a prompt and its answer exceed the model's context.
    """
    budget = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    require(budget >= 1, f"max_new_tokens must be at least 1, not {budget}")
    require(all(len(p) > 0 for p in prompts), "a prompt has no tokens: give at least one, such as the beginning-of-sequence token")
    context = model.context
    longest = max((len(p) for p in prompts), default=0) + budget
    require(
        context is None or longest <= context,
        f"prompt and answer need {longest} positions, but the model's context is {context}: "
        f"lower sample.max_new_tokens={budget} or shorten the prompt",
    )
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Generation | None] = [None] * len(prompts)
    for start in range(0, len(prompts), config.batch_size):
        rows = by_length[start : start + config.batch_size]
        for row, result in zip(rows, _Canvas(model, [prompts[i] for i in rows], budget).fill(config, generator), strict=True):
            results[row] = result
    return [result for result in results if result is not None]


class _Canvas:
    """The rows that are generated together, and what the cache holds of them."""

    def __init__(self, model: DiffusionModel, prompts: Sequence[Sequence[int]], budget: int) -> None:
        self.model, self.mask_id = model, model.spec.mask_token_id
        self.prompt_B = torch.tensor([len(p) for p in prompts], device=model.device)
        self.end_B = self.prompt_B + budget
        size = model.objective.block_size or 1
        length = -(-int(self.end_B.max()) // size) * size
        tokens = [list(p) + [self.mask_id] * (length - len(p)) for p in prompts]
        self.tokens_BL = torch.tensor(tokens, device=model.device)
        position_L = torch.arange(length, device=model.device)
        self.is_new_BL = (position_L >= self.prompt_B[:, None]) & (position_L < self.end_B[:, None])
        self.nfe_B = torch.zeros_like(self.prompt_B)
        self.stop_ids = torch.tensor(model.stop_token_ids, device=model.device)
        self.cache, self.pending_from_B = DynamicCache(), torch.zeros_like(self.prompt_B)
        self.cached: Slots | None = None

    @torch.no_grad()
    def fill(self, config: SampleConfig, generator: torch.Generator | None) -> list[Generation]:
        """Fill the canvas, segment by segment."""
        budget = int(self.end_B[0] - self.prompt_B[0])
        start_B, width, segments = self.model.objective.segments(self.prompt_B, budget, config.block_size)
        at_once = 1 if config.steps_per_block is None else -(-width // config.steps_per_block)
        for _ in range(segments):
            index_BA = start_B[:, None] + torch.arange(width, device=start_B.device)
            is_first = True
            while (is_open_BA := self._open(index_BA)).any():
                logits_BAV = self._see_block(index_BA, is_first) if self.model.objective.caches else self._see_canvas(index_BA)
                self._step(index_BA, is_open_BA, logits_BAV, config, at_once, generator)
                is_first = False
            if self._stopped().all():
                break
            start_B = start_B + width
        return self._results()

    def _open(self, index_BA: Tensor) -> Tensor:
        """The masked positions of the active segment, in rows that have not stopped."""
        inside_BA = index_BA < self.end_B[:, None]
        masked_BA = self.tokens_BL.gather(1, self._clamp(index_BA)) == self.mask_id
        return masked_BA & inside_BA & ~self._stopped()[:, None]

    def _step(
        self,
        index_BA: Tensor,
        is_open_BA: Tensor,
        logits_BAV: Tensor,
        config: SampleConfig,
        at_once: int,
        generator: torch.Generator | None,
    ) -> None:
        """One evaluation: propose a token for every open position, and reveal those that the policy picks."""
        choice_BA, probability_BA = propose(logits_BAV, config.temperature, config.top_p, generator)
        score_BA = (
            probability_BA
            if config.policy == "confidence"
            else torch.rand(probability_BA.shape, generator=generator, device=self.model.device)
        )
        reveal_BA = reveal_top(score_BA, is_open_BA, at_once)
        if config.threshold is not None:
            reveal_BA |= is_open_BA & (probability_BA >= config.threshold)
        index_BA = self._clamp(index_BA)
        self.tokens_BL.scatter_(1, index_BA, torch.where(reveal_BA, choice_BA, self.tokens_BL.gather(1, index_BA)))
        self.nfe_B += is_open_BA.any(1)

    def _see_canvas(self, index_BA: Tensor) -> Tensor:
        """Logits of the active positions from a pass over the whole canvas (one block)."""
        position_BL = torch.arange(self.tokens_BL.shape[1], device=self.model.device).expand_as(self.tokens_BL)
        slots = self._slots(position_BL)
        hidden_BLH = self.model.hidden(self.tokens_BL, slots)
        source_BA = self._clamp(index_BA - int(self.model.objective.right_shift))
        return self.model.logits(hidden_BLH.gather(1, source_BA[:, :, None].expand(-1, -1, hidden_BLH.shape[-1])))

    def _see_block(self, index_BA: Tensor, is_first: bool) -> Tensor:
        """Logits of the active block on top of the cache; its first pass also commits the clean tokens before it."""
        pending_BP = self.pending_from_B[:, None] + torch.arange(int((index_BA[:, 0] - self.pending_from_B).max()), device=index_BA.device)
        pending = self._slots(pending_BP, before_B=index_BA[:, 0])
        active = self._slots(index_BA)
        ids_BQ = self.tokens_BL.gather(1, self._clamp(torch.cat([pending_BP, index_BA], 1)))
        hidden_BQH = self.model.hidden(ids_BQ, pending.then(active), self.cached, self.cache)
        self.cache.crop(-index_BA.shape[1])
        if is_first:
            self.cached = self.cached.then(pending) if self.cached else pending
            self.pending_from_B = index_BA[:, 0]
        return self.model.logits(hidden_BQH[:, -index_BA.shape[1] :])

    def _slots(self, position_BS: Tensor, before_B: Tensor | None = None) -> Slots:
        """Clean slots at these positions; those at or behind a row's end are padding."""
        valid_BS = position_BS < (self.end_B if before_B is None else torch.minimum(before_B, self.end_B))[:, None]
        position_BS = self._clamp(position_BS)
        return Slots.clean(position_BS, self.model.objective.block_of(position_BS), valid_BS)

    def _clamp(self, index_BS: Tensor) -> Tensor:
        return index_BS.clamp(0, self.tokens_BL.shape[1] - 1)

    def _stopped(self) -> Tensor:
        """Rows with a stop token that has no mask before it: whatever lies behind it will be trimmed."""
        is_stop_BL = torch.isin(self.tokens_BL, self.stop_ids) & self.is_new_BL
        is_mask_BL = (self.tokens_BL == self.mask_id) & self.is_new_BL
        return (is_stop_BL & (is_mask_BL.cumsum(1) == 0)).any(1)

    def _results(self) -> list[Generation]:
        stopped, stop_ids = self._stopped().tolist(), set(self.stop_ids.tolist())
        results = []
        for row, (begin, end, nfe) in enumerate(zip(self.prompt_B.tolist(), self.end_B.tolist(), self.nfe_B.tolist(), strict=True)):
            new = self.tokens_BL[row, begin:end].tolist()
            cut = next((i for i, token in enumerate(new) if token in stop_ids), len(new)) if stopped[row] else len(new)
            results.append(Generation(new[:cut], nfe, stopped[row]))
        return results


def propose(logits_BAV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token for each position and its probability: the most probable one, or one drawn at this temperature.

    The probability is the token's share under the untempered softmax over the kept tokens, so that a threshold
    means the same at every temperature.
    """
    probability_BAV = logits_BAV.softmax(-1)
    if temperature == 0:
        best = probability_BAV.max(-1)
        return best.indices, best.values
    tempered_BAV = (logits_BAV / temperature).softmax(-1)
    if top_p < 1:
        tempered_BAV = keep_top_p(tempered_BAV, top_p)
    choice_BA = torch.multinomial(tempered_BAV.flatten(0, 1), 1, generator=generator).view(logits_BAV.shape[:2])
    return choice_BA, probability_BAV.gather(-1, choice_BA[..., None])[..., 0]


def keep_top_p(probability_BAV: Tensor, top_p: float) -> Tensor:
    """Probabilities with zeros outside the smallest set of tokens that makes up `top_p` (nucleus sampling, arXiv 1904.09751)."""
    ordered = probability_BAV.sort(-1, descending=True)
    is_kept = ordered.values.cumsum(-1) - ordered.values < top_p
    return torch.zeros_like(probability_BAV).scatter(-1, ordered.indices, ordered.values * is_kept)


def reveal_top(score_BA: Tensor, is_open_BA: Tensor, count: int) -> Tensor:
    """reveal_BA: the `count` open positions of each row with the highest scores (all, where a row has fewer)."""
    rank_BA = score_BA.masked_fill(~is_open_BA, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (rank_BA < count) & is_open_BA
