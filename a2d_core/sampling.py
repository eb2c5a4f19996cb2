"""Generation: a driver, one step, and a cache in which nothing final is computed twice.

A canvas is what is given and, where the answer will be, mask tokens. It is filled stretch by stretch in the objective's
order; in a stretch, each network evaluation reveals some of the masked tokens. Rows are canvases that are worked on
together, each at a place of its own; at the end of a stretch, those that are finished make room for the next prompts.
A row's result depends on the row alone, up to float rounding: also its random draws are keyed by what it is.
"""

# Shapes: R rows, L canvas positions, A positions of the active stretch, N open ones of them, M = R x N, Q queries, H hidden,
#   W written keys, B rows of a prefill

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a2d_core import policies
from a2d_core.attention import Slots
from a2d_core.cache import Graphs, SlotCache
from a2d_core.config import SampleConfig, require
from a2d_core.models import DiffusionModel
from a2d_core.noise import hashed_uniform

BUCKET = 128
"""Static shapes: lengths are rounded up to a multiple of this."""
PREFILL_BUCKET = 64
"""Prompts whose lengths round up to the same multiple of this are prefilled together."""


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered with."""

    tokens: list[int]
    """New tokens, up to and without the first stop token or stop text."""
    nfe: int
    """Network evaluations in which this row had masked tokens; with guidance each counts twice."""
    finished: bool
    """Whether a stop token or a stop text ended it, rather than the token limit."""
    text: str
    """The new tokens as text, without special tokens, cut before a stop text."""
    logprob: float
    """Sum over the new tokens of the log-probability that each had when it was revealed, in nats."""


@dataclass(frozen=True)
class Event:
    """What one evaluation did to one row; or, with a `generation`, that the row is finished."""

    prompt: int
    """Which prompt, counted from 0."""
    nfe: int
    """Evaluations of this row so far."""
    revealed: tuple[tuple[int, int, float], ...] = ()
    """(position, token, probability) of each token that was revealed; positions count from the first token of the prompt."""
    remasked: tuple[int, ...] = ()
    """Positions that were masked again."""
    generation: Generation | None = None


@dataclass(frozen=True)
class Canvas:
    """A row to fill: every mask token among its tokens, from the first one on."""

    tokens: list[int]
    begin: int
    """Position of the first mask token."""
    lead: int
    """How many positions before the first token blocks are counted from."""
    stretches: list[tuple[int, int]]
    """Where the active positions start and stop, one after the other."""
    widest: int
    """Positions that are filled in a whole stretch, which `steps_per_block` divides."""
    may_end: int
    """First position that a stop token may take."""
    stop: tuple[str, ...] = ()
    """Texts that end it."""
    expected: tuple[int, ...] = ()
    """New tokens from which it may not deviate."""
    key: int | None = None
    """Number that its random draws depend on; None: its place among the others."""


def generate(model: DiffusionModel, prompts: Sequence[Sequence[int]], config: SampleConfig, **options: Any) -> list[Generation]:
    """Answer each prompt (token ids) in its order, `config.batch_size` at a time; the options are those of `stream`."""
    found = {event.prompt: event.generation for event in stream(model, prompts, config, evaluations=False, **options)}
    return [generation for _, generation in sorted(found.items()) if generation is not None]


def stream(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    *,
    generator: torch.Generator | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[str]] | None = None,
    expected: Sequence[Sequence[int]] | None = None,
    keys: Sequence[int] | None = None,
    evaluations: bool = True,
) -> Iterator[Event]:
    """Answer prompts (token ids) and tell, after each evaluation, what it revealed in each row; then the generations as they finish.

    `generator` seeds the draws of tokens and of positions. `max_new_tokens`: for all prompts, or for each. `stop`: for each
    prompt further texts that end its answer. `expected`: for each prompt an answer; the row is given up as soon as it
    deviates, and its tokens end there. `keys`: for each prompt the number that its draws depend on, in place of its own.
    `evaluations`: false for nothing but the finished generations, which takes no look at the device between evaluations.
    Raises `UserError`, before any work, where the objective cannot do what is asked, or a prompt and its answer exceed the
    model's context.
    """
    mask = model.spec.mask_token_id
    asked = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    lengths = [asked] * len(prompts) if isinstance(asked, int) else asked
    canvases = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        require(length >= 1, f"max_new_tokens must be at least 1, not {length}")
        require(len(prompt) > 0, "a prompt has no tokens: give at least one, such as the beginning-of-sequence token")
        require(mask not in prompt, "a prompt has mask tokens in it: use a2d_core.infill to fill them")
        tokens, may_end = [*prompt, *[mask] * length], len(prompt) + config.min_new_tokens
        model.require_room(len(tokens), "a prompt with its answer", f"lower sample.max_new_tokens={length} or shorten the prompt")
        stops = (*config.stop, *(stop[row] if stop else ()))
        canvas = lay_out(model, tokens, config, may_end, stop=stops, expected=expected[row] if expected else ())
        canvases.append(replace(canvas, key=keys[row]) if keys else canvas)
    yield from run(model, canvases, config, generator, evaluations)


def lay_out(
    model: DiffusionModel,
    tokens: list[int],
    config: SampleConfig,
    may_end: int,
    *,
    stop: tuple[str, ...] = (),
    expected: Sequence[int] = (),
) -> Canvas:
    """The canvas of a row whose tokens are given, save for the mask tokens; a stop token may come from `may_end` on."""
    objective, mask = model.objective, model.spec.mask_token_id
    objective.check_sampling(config)
    begin = tokens.index(mask)
    origin = config.block_origin or model.spec.block_origin
    lead = -begin % (objective.block_size or 1) if origin == "prompt_end" else 0
    stretches = objective.segments(begin, len(tokens), config.block_size, lead)
    while mask not in tokens[slice(*stretches[-1])]:
        stretches.pop()  # nothing is left to fill
    widest = objective.block_size or max(tokens[slice(*stretch)].count(mask) for stretch in stretches)
    return Canvas(tokens, begin, lead, stretches, widest, may_end, stop, tuple(expected))


def run(
    model: DiffusionModel, canvases: Sequence[Canvas], config: SampleConfig, generator: torch.Generator | None, evaluations: bool = False
) -> Iterator[Event]:
    """Fill canvases; the events are those of `stream`."""
    seed = 0
    if config.temperature > 0 or config.policy == "random":
        seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device if generator else "cpu"))
    if canvases:
        yield from _Sampler(model, canvases, config, seed, evaluations).run()


@dataclass
class _Row:
    """A canvas that is being filled, as the host knows it."""

    number: int
    canvas: Canvas
    tokens: list[int]
    logprobs: list[float]
    stretch: int = 0

    @property
    def active(self) -> tuple[int, int]:
        return self.canvas.stretches[self.stretch]


class _Numbers(NamedTuple):
    """What the device is told of a row and its active stretch; by default, of an empty place: one token, and nothing to fill."""

    start: int = 0
    stop: int = 0
    end: int = 1
    may_end: int = 0
    lead: int = 0
    least: int = 1
    """Tokens that an evaluation reveals, if not more."""
    key: int = -1


@dataclass(frozen=True)
class _View:
    """What one kind of evaluation computes, the same throughout a stretch."""

    place_RQ: Tensor
    """Where the input tokens stand in `tokens_RL`."""
    slots: Slots
    masks: Any
    origin_R: Tensor
    """Position of the first query."""
    target_W: Tensor
    """Where the keys are written."""
    seen: tuple[int, int]


@dataclass(frozen=True)
class _Stretch:
    """The active stretch of each row."""

    position_RA: Tensor
    place_RA: Tensor
    """Where these positions stand in `tokens_RL`."""
    was_open_RA: Tensor
    """What is to be filled."""
    count_R: Tensor
    """Tokens that an evaluation reveals at least."""
    early_RA: Tensor | None
    """Where the answer may not end yet."""
    key_R: Tensor
    """What the random draws depend on."""
    bounds: list[int]
    """At most so many positions of a row are open before each evaluation, where only `count_R` are revealed."""
    first: _View
    later: _View


class _Sampler:
    """The rows that are generated together, and what the cache holds of them."""

    def __init__(self, model: DiffusionModel, canvases: Sequence[Canvas], config: SampleConfig, seed: int, is_watched: bool) -> None:
        self.model, self.config, self.objective = model, config, model.objective
        self.mask, self.shift, self.device = model.spec.mask_token_id, int(model.objective.right_shift), model.device
        self.seed, self.is_watched = seed, is_watched
        self.stop_ids = torch.tensor(model.stop_token_ids, device=self.device)
        self.queue = deque(sorted(enumerate(canvases), key=lambda item: -len(item[1].tokens)))  # the longest first: neighbours are alike
        rows = min(config.batch_size, len(canvases))
        self.rows: list[_Row | None] = [None] * rows
        self.spare = self._rounded(max(len(canvas.tokens) for canvas in canvases))  # the place of what lies outside a canvas
        self.tokens_RL = torch.zeros(rows, self.spare + 1, dtype=torch.int64, device=self.device)
        self.expected_RL = torch.full_like(self.tokens_RL, -1)
        self.given_RL = torch.ones_like(self.tokens_RL, dtype=torch.bool)
        self.logprob_RL = torch.zeros_like(self.tokens_RL, dtype=torch.promote_types(model.network.dtype, torch.float32))
        self.nfe_R = torch.zeros_like(self.tokens_RL[:, 0])
        self.checks = any(canvas.expected for canvas in canvases)
        self.commits = self.objective.block_size is not None
        self.cache = SlotCache(rows, self.spare) if self.commits or config.cache != "exact" else None
        self.reader = policies.Reader(model, config, seed)
        self.graphs = Graphs() if config.cuda_graph and self.device.type == "cuda" else None
        # Where the number of evaluations is known, nothing of the device need be looked at; on a CPU a look is free.
        is_known = config.threshold is None and config.entropy_budget is None and not self.checks
        self.looks = not is_known or (self.device.type == "cpu" and not config.cuda_graph)

    @torch.no_grad()
    def run(self) -> Iterator[Event]:
        """Stretch after stretch, until the queue is empty and every row is finished."""
        while self._admit():
            stretch = self._begin()
            yield from self._fill(stretch)
            yield from self._end(stretch)

    # --- which rows -------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Give free places to the next canvases, or close up where there are none; False where nothing is left to do."""
        free = [place for place, row in enumerate(self.rows) if row is None]
        admitted: dict[int, _Row] = {}
        for place in free[: len(self.queue)]:
            number, canvas = self.queue.popleft()
            self.rows[place] = admitted[place] = _Row(number, canvas, list(canvas.tokens), [0.0] * len(canvas.tokens))
        if admitted:
            self._write(admitted)
            self._prefill(admitted)
        if len(free) > len(admitted) and not self.config.cuda_graph:
            self._close_up()
        return any(self.rows)

    def _write(self, admitted: dict[int, _Row]) -> None:
        """Copy canvases to the device."""

        def to_device(lines: list[list[int]], padding: int) -> Tensor:
            return torch.tensor([line + [padding] * (self.spare + 1 - len(line)) for line in lines]).to(self.device)

        canvases = [row.canvas for row in admitted.values()]
        expected = [[-1] * canvas.begin + list(canvas.expected) for canvas in canvases]
        index = torch.tensor(list(admitted), device=self.device)
        self.tokens_RL[index] = to_device([canvas.tokens for canvas in canvases], 0)
        self.expected_RL[index] = to_device([line[: len(canvas.tokens)] for line, canvas in zip(expected, canvases, strict=True)], -1)
        self.given_RL[index] = self.tokens_RL[index] != self.mask
        self.nfe_R[index] = 0

    def _prefill(self, admitted: dict[int, _Row]) -> None:
        """Compute the keys of what is final before the first stretch, save for the block that its first evaluation commits."""
        buckets: dict[int, list[tuple[int, int, int]]] = {}
        for place, row in admitted.items():
            length = self.objective.settled(row.active[0])
            if length > 0:
                buckets.setdefault(-(-length // PREFILL_BUCKET), []).append((place, length, row.canvas.lead))
        for rows in buckets.values():
            place_B, length_B, lead_B = torch.tensor(rows).to(self.device).T
            position_BQ = torch.arange(max(length for _, length, _ in rows), device=self.device).expand(len(rows), -1)
            valid_BQ = position_BQ < length_B[:, None]
            slots = Slots.clean(position_BQ, self.objective.block_of(position_BQ, lead_B[:, None]), valid_BQ)
            masks, ids_BQ = self.model.masks(slots, slots), self.tokens_RL[place_B, : position_BQ.shape[1]]
            assert self.cache is not None
            self.cache.write(self.cache.place(position_BQ, valid_BQ, place_B), None)
            self.model.hidden(ids_BQ, slots, cache=self.cache, masks=masks)

    def _close_up(self) -> None:
        """Move the last rows into free places, so that nothing is computed for nobody."""
        tensors = self.tokens_RL, self.expected_RL, self.given_RL, self.logprob_RL, self.nfe_R
        kept = [place for place, row in enumerate(self.rows) if row is not None]
        for target in range(len(kept)):
            if self.rows[target] is None:
                source = kept.pop()
                for stored in tensors:
                    stored[target] = stored[source]
                if self.cache is not None:
                    self.cache.move(source, target)
                self.rows[target], self.rows[source] = self.rows[source], None
        self.rows = [row for row in self.rows if row is not None]
        self.tokens_RL, self.expected_RL, self.given_RL, self.logprob_RL, self.nfe_R = (x[: len(self.rows)] for x in tensors)

    # --- one stretch ------------------------------------------------------------------------------

    def _begin(self) -> _Stretch:
        """Everything that stays the same while the active stretches are filled."""
        table = [self._numbers(row) if row else _Numbers() for row in self.rows]
        rows = [(row, at) for row, at in zip(self.rows, table, strict=True) if row is not None]
        opens = [(row.tokens[at.start : at.stop].count(self.mask), at.least) for row, at in rows]
        asks_early = any(max(at.start, row.canvas.begin) < at.may_end for row, at in rows)
        start_R, stop_R, end_R, may_end_R, lead_R, count_R, key_R = torch.tensor(table).to(self.device).T
        width = self.objective.block_size or max(at.stop - at.start for at in table)
        position_RA = start_R[:, None] + torch.arange(width, device=self.device)
        is_active_RA = position_RA < stop_R[:, None]
        place_RA = torch.where(is_active_RA, position_RA, self.spare)
        seen = self._rounded(max(self.objective.sees_until(at.stop, at.end) for at in table))
        first, later = (self.objective.queries(self.config.cache, width, is_first=is_first) for is_first in (True, False))
        first_view = self._view(table, start_R, end_R, lead_R, seen, first)
        later_view = first_view if later == first else self._view(table, start_R, end_R, lead_R, seen, later)
        return _Stretch(
            position_RA=position_RA,
            place_RA=place_RA,
            was_open_RA=is_active_RA & (self.tokens_RL.gather(1, place_RA) == self.mask),
            count_R=count_R,
            early_RA=position_RA < may_end_R[:, None] if asks_early else None,
            key_R=key_R,
            bounds=[max(left - step * count for left, count in opens) for step in range(max(-(-left // count) for left, count in opens))],
            first=first_view,
            later=later_view,
        )

    def _numbers(self, row: _Row) -> _Numbers:
        canvas = row.canvas
        least = -(-canvas.widest // (self.config.steps_per_block or canvas.widest))
        key = row.number if canvas.key is None else canvas.key
        return _Numbers(*row.active, len(row.tokens), canvas.may_end, canvas.lead, least, key)

    def _view(
        self, table: list[_Numbers], start_R: Tensor, end_R: Tensor, lead_R: Tensor, seen: int, reach: tuple[int | None, int | None]
    ) -> _View:
        """What an evaluation computes: queries in `reach` of the active stretch, as `Objective.queries` has it, and who sees whom."""
        before, ahead = reach
        if before is None:
            origin_R, queries = torch.zeros_like(start_R), seen
        else:
            has_before = any(at.start > 0 for at in table) or self.config.cuda_graph
            before = (before if has_before else 0) + self.shift
            origin_R = start_R - before
            queries = before + (self._rounded(max(at.end - at.start for at in table)) if ahead is None else ahead)
        position_RQ = origin_R[:, None] + torch.arange(queries, device=self.device)
        is_real_RQ = (position_RQ >= 0) & (position_RQ < end_R[:, None])
        # What lies outside a canvas stands in for its nearest token: it sees something, and nobody sees it.
        inside_RQ = torch.minimum(position_RQ, end_R[:, None] - 1).clamp(min=0)
        slots = Slots.clean(inside_RQ, self.objective.block_of(inside_RQ, lead_R[:, None]))
        key_RL = torch.arange(seen, device=self.device).expand(len(table), -1)
        keys = Slots.clean(key_RL, self.objective.block_of(key_RL, lead_R[:, None]), key_RL < end_R[:, None])
        row_R = torch.arange(len(table), device=self.device)
        target_W = self.cache.place(position_RQ, is_real_RQ, row_R) if self.cache is not None else row_R
        place_RQ = torch.where(is_real_RQ, position_RQ, self.spare)
        return _View(place_RQ, slots, self.model.masks(slots, keys), origin_R, target_W, (len(table), seen))

    def _fill(self, stretch: _Stretch) -> Iterator[Event]:
        """Evaluate and reveal until nothing is open."""
        step = 0
        while True:
            is_open_RA = self._open(stretch)
            most = stretch.bounds[step] if step < len(stretch.bounds) else 0
            if self.looks:
                most = int(is_open_RA.sum(1).max())
            if most == 0 and (step > 0 or not self.commits):
                return
            view = stretch.later if step else stretch.first
            hidden = self._evaluate(view)
            if most == 0:
                return
            yield from self._step(stretch, view, hidden, is_open_RA, most)
            step += 1

    def _open(self, stretch: _Stretch) -> Tensor:
        """The masked positions, in rows that have not ended: a stop token with no mask before it, or a token that was not expected."""
        token_RA = self.tokens_RL.gather(1, stretch.place_RA)
        is_mask_RA = (token_RA == self.mask) & stretch.was_open_RA
        is_new_RA = stretch.was_open_RA & ~is_mask_RA
        has_ended_R = (torch.isin(token_RA, self.stop_ids) & is_new_RA & (is_mask_RA.cumsum(1) == 0)).any(1)
        if self.checks:
            expected_RA = self.expected_RL.gather(1, stretch.place_RA)
            has_ended_R |= (is_new_RA & (expected_RA >= 0) & (expected_RA != token_RA)).any(1)
        return is_mask_RA & ~has_ended_R[:, None]

    def _evaluate(self, view: _View) -> list[tuple[float, Tensor]]:
        """Hidden states [R, Q, H] and their weights: with guidance, also those of the canvas without what is given."""
        ids_RQ, weight = self.tokens_RL.gather(1, view.place_RQ), self.config.guidance
        if weight == 0:
            return [(1.0, self._forward(view, ids_RQ))]
        without_RQ = torch.where(self.given_RL.gather(1, view.place_RQ), self.mask, ids_RQ)
        return [(1 + weight, self._forward(view, ids_RQ)), (-weight, self._forward(view, without_RQ))]

    def _forward(self, view: _View, ids_RQ: Tensor) -> Tensor:
        names = list(view.masks) if isinstance(view.masks, dict) else []

        def forward(ids_RQ: Tensor, position_RQ: Tensor, target_W: Tensor, *masks: Any) -> Tensor:
            slots = Slots.clean(position_RQ, position_RQ)  # where the masks are given, only positions are read
            cache = self.cache.write(target_W, view.seen) if self.cache is not None else None
            return self.model.hidden(ids_RQ, slots, cache=cache, masks=dict(zip(names, masks, strict=True)) if names else masks[0])

        inputs = ids_RQ, view.slots.position, view.target_W, *(view.masks.values() if names else [view.masks])
        return self.graphs(forward, *inputs) if self.graphs else forward(*inputs)

    def _step(self, stretch: _Stretch, view: _View, hidden: list[tuple[float, Tensor]], is_open_RA: Tensor, most: int) -> Iterator[Event]:
        """Propose a token for every open position, and reveal those that the policy picks; no more than `most` are open in a row."""
        column_RN = is_open_RA.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        is_open_RN, position_RN, place_RN = (x.gather(1, column_RN) for x in (is_open_RA, stretch.position_RA, stretch.place_RA))
        query_RN = (position_RN - self.shift - view.origin_R[:, None]).clamp(0, hidden[0][1].shape[1] - 1)
        read = [(weight, x.gather(1, query_RN[:, :, None].expand(-1, -1, x.shape[-1])).flatten(0, 1)) for weight, x in hidden]
        early_M = None if stretch.early_RA is None else stretch.early_RA.gather(1, column_RN).flatten()
        keys = [x[:, None].expand_as(position_RN) for x in (stretch.key_R, self.nfe_R)] + [position_RN]
        proposal = self.reader.read(read, early_M, tuple(key.flatten() for key in keys)).reshape(*position_RN.shape)
        score_RN = policies.score(self.config.policy, proposal, lambda: hashed_uniform(self.seed, 2, *keys))

        remasked_RA = torch.zeros_like(is_open_RA)
        count_R = stretch.count_R
        if self.config.remasking > 0:
            again_R, was_revealed_RA = self._remasked(stretch, is_open_RA)
            remasked_RA = policies.reveal_top(-self.logprob_RL.gather(1, stretch.place_RA), was_revealed_RA, again_R)
            count_R = count_R + again_R
        reveal_RN = policies.reveal(self.config, score_RN, proposal, is_open_RN, count_R)
        for stored, new in ((self.tokens_RL, proposal.token), (self.logprob_RL, proposal.logprob)):
            stored.scatter_(1, place_RN, torch.where(reveal_RN, new, stored.gather(1, place_RN)))
        if self.config.remasking > 0:
            tokens_RA = self.tokens_RL.gather(1, stretch.place_RA)
            self.tokens_RL.scatter_(1, stretch.place_RA, tokens_RA.masked_fill(remasked_RA, self.mask))
        self.nfe_R += is_open_RA.any(1) * (2 if self.config.guidance else 1)
        if self.is_watched:
            yield from self._events(position_RN, reveal_RN, proposal, stretch.position_RA, remasked_RA)

    def _remasked(self, stretch: _Stretch, is_open_RA: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens each row masks again, and from which: never more than the evaluations that are left can reveal.

        ReMDM's cap, sigma = min(eta, (1 - alpha_s) / alpha_t), in counts (arXiv 2503.00307).
        """
        open_R, was_revealed_RA = is_open_RA.sum(1), stretch.was_open_RA & ~is_open_RA
        again_R = (was_revealed_RA.sum(1) * self.config.remasking).floor().long()
        return torch.minimum(again_R, open_R - stretch.count_R).clamp(min=0), was_revealed_RA

    def _events(
        self, position_RN: Tensor, reveal_RN: Tensor, proposal: policies.Proposal, position_RA: Tensor, remasked_RA: Tensor
    ) -> Iterator[Event]:
        tokens, probabilities, nfe = proposal.token.tolist(), proposal.logprob.exp().tolist(), self.nfe_R.tolist()
        positions, chosen, places, masked = position_RN.tolist(), reveal_RN.tolist(), position_RA.tolist(), remasked_RA.tolist()
        for at, row in enumerate(self.rows):
            columns = [column for column, is_chosen in enumerate(chosen[at]) if is_chosen]
            if row is not None and columns:
                revealed = tuple((positions[at][n], tokens[at][n], probabilities[at][n]) for n in columns)
                again = tuple(place for place, is_masked in zip(places[at], masked[at], strict=True) if is_masked)
                yield Event(row.number, nfe[at], revealed, again)

    def _end(self, stretch: _Stretch) -> Iterator[Event]:
        """Look at what was written: rows that are finished give up their place."""
        tokens, logprobs = self.tokens_RL.gather(1, stretch.place_RA).tolist(), self.logprob_RL.gather(1, stretch.place_RA).tolist()
        for at, (row, nfe) in enumerate(zip(self.rows, self.nfe_R.tolist(), strict=True)):
            if row is None:
                continue
            start, stop = row.active
            for position in range(start, stop):
                if row.tokens[position] == self.mask:
                    row.tokens[position], row.logprobs[position] = tokens[at][position - start], logprobs[at][position - start]
            row.stretch += 1
            generation = self._generation(row, stop, nfe)
            if generation is not None:
                self.rows[at] = None
                yield Event(row.number, nfe, generation=generation)

    def _generation(self, row: _Row, stop: int, nfe: int) -> Generation | None:
        """What a row has come to, if it is finished; its tokens are final up to `stop`."""
        canvas, is_last = row.canvas, row.stretch == len(row.canvas.stretches)
        new, ends = row.tokens[canvas.begin : None if is_last else stop], {*self.model.stop_token_ids, self.mask}
        was_open = [token == self.mask for token in canvas.tokens[canvas.begin :]]
        cut = next((i for i, token in enumerate(new) if was_open[i] and token in ends), len(new))
        stopped = cut < len(new) and new[cut] != self.mask
        given_up = any(token != wanted for token, wanted in zip(new, canvas.expected, strict=False))
        text = self._decode(new[:cut]) if canvas.stop or stopped or given_up or is_last else ""
        found = [place for place in map(text.find, canvas.stop) if place >= 0]
        if not (is_last or stopped or given_up or found):
            return None
        if found:
            text = text[: min(found)]
            cut = next(i for i in range(cut + 1) if self._decode(new[:i]).startswith(text))
        logprob = sum(row.logprobs[canvas.begin : canvas.begin + cut])
        return Generation(new[:cut], nfe, stopped or bool(found), text, logprob)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.model.tokenizer.decode(tokens, skip_special_tokens=True))

    def _rounded(self, length: int) -> int:
        return -(-length // BUCKET) * BUCKET if self.config.cuda_graph else length
