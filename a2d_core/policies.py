"""What the head says of each open position, and which positions to reveal: the small decisions of a sampling step."""

# Shapes: B rows, N open positions of a row, M positions in all, H hidden, V vocabulary, C tokens of a chunk,
#   K most probable tokens, G groups of tokens

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from a2d_core.config import SampleConfig
from a2d_core.models import DiffusionModel
from a2d_core.noise import hashed_uniform

CHUNK = {"cpu": 1 << 12, "cuda": 1 << 15}
"""Tokens of the vocabulary that are read at once: on a CPU, logits that stay in its cache."""
GROUP = 64
"""Neighbours that are put together before a row is searched, because torch on a CPU searches a row one number at a time."""
FILTER_ELEMENTS = 1 << 22
"""Logits held at once where top-k or top-p must see the whole vocabulary."""
NUCLEUS = 1024
"""Tokens that top-p looks at; the whole vocabulary is sorted only where they are not enough."""
NEVER = -1e30
"""The logit of a token that may not be produced; finite, so that no product with it is undefined."""


@dataclass(frozen=True)
class Proposal:
    """One token for each position, and how sure it is."""

    token: Tensor
    logprob: Tensor
    """Log-probability of the token at temperature 1, in nats: a threshold means the same at every temperature."""
    margin: Tensor | None
    """Probability of the best token minus that of the second; only for the policy of that name."""
    entropy: Tensor | None
    """In nats; only where the policy or the budget asks for it."""

    def reshape(self, *shape: int) -> Proposal:
        """The same numbers in another shape."""
        return Proposal(*(None if x is None else x.reshape(shape) for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass
class _Running:
    """Statistics of the vocabulary as far as it has been read, relative to the largest logit so far."""

    best: Tensor
    token: Tensor
    logit: Tensor
    """Of `token`: the best one, or the one drawn so far."""
    total: Tensor
    """Sum of exp(logit - best)."""
    weighted: Tensor
    """Sum of exp(logit - best) (logit - best)."""
    second: Tensor
    drawn: Tensor
    """Sum of the weights that were drawn from."""


class Reader:
    """Reads the head in one pass over the vocabulary, a chunk at a time, without a tensor of probabilities."""

    def __init__(self, model: DiffusionModel, config: SampleConfig, seed: int) -> None:
        self.weight_VH, self.bias_V = model.output_embedding()
        self.head = dataclasses.replace(model.head, excluded_token=None)
        self.never = sorted({model.spec.mask_token_id, *config.suppressed_tokens})
        self.stops = model.stop_token_ids
        self.config, self.seed = config, seed
        self.wants_entropy = config.policy == "entropy" or config.entropy_budget is not None
        self.filters = config.temperature > 0 and (config.top_k is not None or config.top_p < 1)

    def read(self, hidden: list[tuple[float, Tensor]], early_M: Tensor | None, keys: tuple[Tensor, ...]) -> Proposal:
        """A token for each position from hidden states [M, H], each weighted: more than one with guidance.

        `early_M`: positions where the answer may not end yet. `keys`: integers [M] that a position's draw depends on, and
        on nothing else but the seed.
        """
        if self.head.softcap is None and len(hidden) > 1:  # a linear head: guide the hidden states
            hidden = [(1.0, torch.stack([scale * x for scale, x in hidden]).sum(0))]
        vocabulary, positions = len(self.weight_VH), len(hidden[0][1])
        if not self.filters:
            return self._read(hidden, early_M, keys, CHUNK.get(self.weight_VH.device.type, CHUNK["cuda"]))
        at_once = max(1, FILTER_ELEMENTS // vocabulary)
        parts = []
        for start in range(0, positions, at_once):
            some = slice(start, start + at_once)
            early = None if early_M is None else early_M[some]
            parts.append(self._read([(w, x[some]) for w, x in hidden], early, tuple(key[some] for key in keys), vocabulary))
        return Proposal(*(None if xs[0] is None else torch.cat(xs) for xs in zip(*(vars(p).values() for p in parts), strict=True)))  # type: ignore[arg-type]

    def _read(self, hidden: list[tuple[float, Tensor]], early_M: Tensor | None, keys: tuple[Tensor, ...], width: int) -> Proposal:
        first = hidden[0][1]
        lowest = torch.full((len(first),), NEVER, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        nought, token = torch.zeros_like(lowest), torch.zeros_like(lowest, dtype=torch.int64)
        state = _Running(lowest, token, lowest, nought, nought, lowest, nought)
        starts = range(0, len(self.weight_VH), width)
        if self.config.temperature > 0:
            chunk_C1, use_2 = torch.arange(len(starts), device=token.device)[:, None], torch.arange(2, device=token.device)
            uniform_MC2 = hashed_uniform(self.seed, 1, *(key[:, None, None] for key in keys), chunk_C1, use_2)
        for number, start in enumerate(starts):
            logits_MC = self._logits(hidden, start, min(start + width, len(self.weight_VH)), early_M)
            best_M, index_M = highest(logits_MC)
            before_M, state.best = state.best, torch.maximum(state.best, best_M)
            fade_M = (before_M - state.best).exp()
            share_MC, total_M = shares(logits_MC, best_M, state.best)
            if self.config.policy == "margin":
                second_M = logits_MC.topk(2).values[:, 1] if logits_MC.shape[1] > 1 else lowest
                state.second = torch.stack([state.second, second_M, torch.minimum(before_M, best_M)]).amax(0)
            if self.wants_entropy:
                mean_M = (share_MC * (logits_MC - best_M[:, None])).sum(-1) + best_M - state.best
                state.weighted = fade_M * (state.weighted + (before_M - state.best) * state.total) + total_M * mean_M
            state.total = fade_M * state.total + total_M
            if self.config.temperature > 0:
                if self.config.temperature != 1:
                    warm = (x / self.config.temperature for x in (logits_MC, best_M, state.best))
                    share_MC, total_M = shares(*warm)
                self._draw(state, before_M, logits_MC, share_MC, total_M, start, uniform_MC2[:, number])
            else:
                is_better_M = best_M > before_M
                state.token = torch.where(is_better_M, index_M + start, state.token)
                state.logit = state.best
        return self._proposal(state)

    def _logits(self, hidden: list[tuple[float, Tensor]], start: int, stop: int, early_M: Tensor | None) -> Tensor:
        """Logits [M, C] of some of the vocabulary, float32 or wider."""
        weight_CH, bias_C = self.weight_VH[start:stop], None if self.bias_V is None else self.bias_V[start:stop]
        dtype = torch.promote_types(self.weight_VH.dtype, torch.float32)
        parts = [self.head.logits(x, weight_CH, bias_C, dtype) for _, x in hidden]
        logits_MC = parts[0] if len(hidden) == 1 else torch.stack([s * part for (s, _), part in zip(hidden, parts, strict=True)]).sum(0)
        for token in (token for token in self.never if start <= token < stop):
            logits_MC[:, token - start] = NEVER
        if early_M is not None:
            for token in (token for token in self.stops if start <= token < stop):
                logits_MC[:, token - start].masked_fill_(early_M, NEVER)
        return logits_MC

    def _draw(
        self, state: _Running, before_M: Tensor, logits_MC: Tensor, share_MC: Tensor, total_M: Tensor, start: int, uniform_M2: Tensor
    ) -> None:
        """Draw from this chunk, and let the draw replace the one before with the chunk's share of all weights so far."""
        if self.filters:
            share_MC = share_MC.masked_fill(share_MC < kept_floor(share_MC, self.config.top_k, self.config.top_p), 0)
        index_M, kept_M = draw(share_MC, uniform_M2[:, 0])
        weight_M = kept_M * total_M
        state.drawn = state.drawn * ((before_M - state.best) / self.config.temperature).exp() + weight_M
        is_new_M = uniform_M2[:, 1] * state.drawn < weight_M
        state.token = torch.where(is_new_M, index_M + start, state.token)
        state.logit = torch.where(is_new_M, logits_MC.gather(1, index_M[:, None])[:, 0], state.logit)

    def _proposal(self, state: _Running) -> Proposal:
        log_sum_M = state.best + state.total.log()
        margin = (state.best - log_sum_M).exp() - (state.second - log_sum_M).exp() if self.config.policy == "margin" else None
        entropy = (state.total.log() - state.weighted / state.total).clamp(min=0) if self.wants_entropy else None
        return Proposal(state.token, state.logit - log_sum_M, margin, entropy)


def shares(logits_MC: Tensor, best_M: Tensor, reference_M: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of each row, and its sum of exp(logit - reference): the best one's share is exp(0) over the row's own sum."""
    share_MC = logits_MC.softmax(-1)
    return share_MC, (best_M - reference_M).exp() / share_MC.amax(-1)


def grouped(x_MC: Tensor, fill: float) -> Tensor:
    """A row's numbers [M, C] as groups [M, C / GROUP, GROUP] of neighbours, the last one filled up."""
    missing = -x_MC.shape[1] % GROUP
    return (F.pad(x_MC, (0, missing), value=fill) if missing else x_MC).unflatten(1, (-1, GROUP))


def highest(logits_MC: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and the first index at which it stands."""
    logits_MGC = grouped(logits_MC, -torch.inf)
    best_M, group_M = logits_MGC.amax(-1).max(-1)
    inner_MC = logits_MGC.gather(1, group_M[:, None, None].expand(-1, 1, GROUP))[:, 0]
    return best_M, group_M * GROUP + inner_MC.argmax(-1)


def draw(weight_MC: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """An index drawn in proportion to the weights of each row, and their sum; one with weight 0 is not drawn.

    By inversion, first of the groups' sums, then within the group: a running sum over all of them is slow.
    """
    weight_MGC = grouped(weight_MC, 0)
    sum_MG = weight_MGC.sum(-1)
    upto_MG = sum_MG.cumsum(-1)
    total_M1 = upto_MG[:, -1:]
    target_M1 = uniform_M[:, None].to(total_M1.dtype) * (1 - 1e-6) * total_M1  # below the total, however it is rounded
    group_M1 = torch.searchsorted(upto_MG, target_M1, right=True).clamp(max=upto_MG.shape[1] - 1)
    inner_MC = weight_MGC.gather(1, group_M1[:, :, None].expand(-1, -1, GROUP))[:, 0].cumsum(-1)
    rest_M1 = target_M1 - (upto_MG - sum_MG).gather(1, group_M1)
    rest_M1 = torch.minimum(rest_M1.clamp(min=0), inner_MC[:, -1:] * (1 - 1e-6))
    index_M = (inner_MC <= rest_M1).sum(-1).clamp(max=GROUP - 1) + group_M1[:, 0] * GROUP
    return index_M.clamp(max=weight_MC.shape[1] - 1), total_M1[:, 0]


def kept_floor(weight_MV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """The smallest weight [M, 1] that is kept: the `top_k` largest, and of them the fewest that make up `top_p` of their sum.

    Nucleus sampling is arXiv 1904.09751. Equal weights are kept together.
    """
    vocabulary = weight_MV.shape[1]
    value_MK = weight_MV.topk(min(vocabulary, top_k or NUCLEUS)).values
    total_M1 = (weight_MV if top_k is None else value_MK).sum(-1, keepdim=True)
    if top_k is None and not (value_MK.sum(-1, keepdim=True) >= top_p * total_M1).all():
        value_MK = weight_MV.sort(descending=True).values
    is_kept_MK = value_MK.cumsum(-1) - value_MK < top_p * total_M1
    return value_MK.gather(1, is_kept_MK.sum(-1, keepdim=True).clamp(min=1) - 1)


def score(policy: str, proposal: Proposal, random_BN: Callable[[], Tensor]) -> Tensor:
    """score_BN: how a policy ranks open positions, the highest first: by the token's own probability, by how far the best token is
    ahead of the second (`margin`), by how little is left open (`entropy`), or by nothing (`random`)."""
    if policy == "random":
        return random_BN()
    ranked = {"confidence": proposal.logprob, "margin": proposal.margin, "entropy": proposal.entropy}[policy]
    assert ranked is not None, "the reader knows the policy, and has computed what it asks for"
    return -ranked if policy == "entropy" else ranked


def reveal(config: SampleConfig, score_BN: Tensor, proposal: Proposal, is_open_BN: Tensor, count_B: Tensor) -> Tensor:
    """reveal_BN: the `count_B` open positions of each row with the highest scores, and what a threshold or a budget adds."""
    chosen_BN = reveal_top(score_BN, is_open_BN, count_B)
    if config.threshold is not None:
        chosen_BN |= is_open_BN & (proposal.logprob >= math.log(config.threshold))
    if config.entropy_budget is not None:
        assert proposal.entropy is not None
        chosen_BN |= reveal_within_budget(score_BN, proposal.entropy, is_open_BN, config.entropy_budget)
    return chosen_BN


def reveal_top(score_BN: Tensor, is_open_BN: Tensor, count_B: Tensor) -> Tensor:
    """reveal_BN: the `count_B` open positions of each row with the highest scores (all, where a row has fewer)."""
    rank_BN = score_BN.masked_fill(~is_open_BN, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (rank_BN < count_B[:, None]) & is_open_BN


def reveal_within_budget(score_BN: Tensor, entropy_BN: Tensor, is_open_BN: Tensor, budget: float) -> Tensor:
    """reveal_BN: as many as can go, the highest scores first, while their entropies without the largest stay in the budget.

    What they add up to bounds the error of revealing them together (EB-sampler, arXiv 2505.24857).
    """
    order_BN = score_BN.masked_fill(~is_open_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ordered_BN = entropy_BN.gather(1, order_BN)
    is_within_BN = ordered_BN.cumsum(1) - ordered_BN.cummax(1).values <= budget
    return torch.zeros_like(is_open_BN).scatter(1, order_BN, is_within_BN) & is_open_BN
