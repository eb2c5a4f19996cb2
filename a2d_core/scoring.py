"""Log-likelihoods of answers: batched across questions by tokens, drawn in rounds until the error allows the decision.

The noise of an answer depends on the seed, its question and the round alone, and the answers to one question share it.
Neither it nor the number of draws depends on what else is scored, on the size of a batch, or on the number of processes.
"""

# Shapes: K samples, A answers, B answers of a batch

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from a2d_core import likelihood
from a2d_core.config import require
from a2d_core.data import DiffusionCollator
from a2d_core.models import DiffusionModel

CERTAIN = 2.0
"""A lead of so many standard errors decides; since they err on the large side (`likelihood.Estimate`), it is three in truth."""


@dataclass(frozen=True)
class Answer:
    """Tokens that are scored, given others."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    sizes: tuple[float, ...] = (1.0,)
    """What its log-likelihood is divided by before it is compared, for each way of comparing; none: nothing is decided by it."""


@dataclass(frozen=True)
class Score:
    """The log-likelihood of an answer."""

    nats: float
    """The estimate; NaN where the network's output is not finite."""
    stderr: float
    """Its standard error; 0 where there is no noise, NaN where one draw says nothing of it."""
    samples: int
    """Noise draws behind it; 0 where there is no noise."""

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, math.hypot(self.stderr, other.stderr), max(self.samples, other.samples))


@dataclass
class _Job:
    """An answer, and what has been drawn for it."""

    answer: Answer
    question: Sequence[Answer]
    """What its noise depends on."""
    draws: list[Tensor] = field(default_factory=list)
    is_exact: bool = False

    def sampled(self, samples: int) -> Tensor:
        return self.draws[0][:1].expand(samples) if self.is_exact else torch.cat(self.draws)

    def score(self) -> Score:
        nats_K = torch.cat(self.draws).double()
        if self.is_exact:
            return Score(-float(nats_K[0]), 0.0, 0)
        stderr = float(nats_K.std() / len(nats_K) ** 0.5) if len(nats_K) > 1 else float("nan")
        return Score(-float(nats_K.mean()), stderr, len(nats_K))


@dataclass(frozen=True)
class Scorer:
    """How answers are scored."""

    model: DiffusionModel
    method: str = "nelbo"
    """`nelbo`: minus the NELBO, by Monte Carlo; `exact`: the likelihood of the reveal order `order`."""
    order: str = "confidence"
    """Which token of a block is revealed next, of `likelihood.ORDERS`."""
    samples: int = 8
    """Noise draws of the first round, and of an answer that has no rival."""
    max_samples: int = 64
    """Noise draws at most."""
    batch_tokens: int = 4096
    """Positions in a forward pass, where a question alone does not need more."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        require(self.method in ("nelbo", "exact"), f"unknown likelihood '{self.method}': choose nelbo or exact")
        require(self.order in likelihood.ORDERS, f"unknown reveal order '{self.order}': choose one of {', '.join(likelihood.ORDERS)}")
        for name, value in (("nelbo_samples", self.samples), ("max_nelbo_samples", self.max_samples), ("batch_tokens", self.batch_tokens)):
            require(value >= 1, f"{name} must be at least 1, not {value}")

    def score(self, questions: Sequence[Sequence[Answer]], done: Callable[[int], object] = lambda count: None) -> list[list[Score]]:
        """The scores of the answers to each question; `done` hears how many more questions are finished.

        A question is finished when its best answer leads each other by `CERTAIN` standard errors of their difference, however they
        are compared, or `max_samples` are drawn. Each round draws as many again as there are, for the others alone.
        """
        jobs = [[_Job(answer, answers) for answer in answers] for answers in questions]
        for job in (job for question in jobs for job in question if not job.answer.tokens):
            job.draws, job.is_exact = [torch.zeros(1)], True
        unfinished, spent, round_ = jobs, 0, 0
        while unfinished:
            count = min(spent, self.max_samples - spent) if spent else self.samples
            for batch, views in self._batches(unfinished, count):
                for job, nats_K in zip((job for unit in batch for job in unit), self._draw(batch, views, round_), strict=True):
                    job.draws.append(nats_K)
                    job.is_exact = self.method == "exact" or self._masks(job.answer) <= count
            spent, round_ = spent + count, round_ + 1
            still = [question for question in unfinished if spent < self.max_samples and not _is_decided(question)]
            done(len(unfinished) - len(still))
            unfinished = still
        return [[job.score() for job in question] for question in jobs]

    def _masks(self, answer: Answer) -> int:
        """In how many ways the fullest block of an answer can be masked; at least so many, where they are too many to count."""
        begin, end = len(answer.context), len(answer.context) + len(answer.tokens)
        first, last = self.model.objective.span(begin, end)
        size = self.model.objective.block_size or end
        fullest = end - begin if first == last else max(first + size - begin, size if last - first > size else 0, end - last)
        return (1 << min(fullest, 40)) - 1

    def _batches(self, questions: list[list[_Job]], count: int) -> Iterator[tuple[list[list[_Job]], int]]:
        """Units that are scored together, each with as many jobs, and their views: of like length, as many as the tokens allow."""
        units = []
        for question in questions:
            pending = [job for job in question if not job.is_exact]
            for unit in [pending] if self._is_shared(pending) else [[job] for job in pending]:
                views = 1 if self.method == "exact" else max(min(count, self._masks(job.answer)) for job in unit)
                units.append((views, len(unit), self._positions(unit, views), unit))
        batch: list[list[_Job]] = []
        kind, width = (0, 0), 0
        for views, copies, positions, unit in sorted(units, key=lambda unit: unit[:3], reverse=True):
            if batch and (kind != (views, copies) or (len(batch) + 1) * width > self.batch_tokens):
                yield batch, kind[0]
                batch = []
            if not batch:
                kind, width = (views, copies), positions
            batch.append(unit)
        if batch:
            yield batch, kind[0]

    def _is_shared(self, jobs: list[_Job]) -> bool:
        """Whether the answers can stand on one clean stream: they follow the same context, and lie in one block."""
        answers = [job.answer for job in jobs]
        spans = {self.model.objective.span(len(a.context), len(a.context) + len(a.tokens)) for a in answers}
        is_one = self.model.objective.block_size is not None and len(spans) == 1 and len({a.context for a in answers}) == 1
        return is_one and all(first == last for first, last in spans)

    def _positions(self, unit: list[_Job], views: int) -> int:
        """Positions of a unit in one forward pass."""
        ends = [len(job.answer.context) + len(job.answer.tokens) for job in unit]
        first, last = self.model.objective.span(len(unit[0].answer.context), max(ends))
        return last + min(views, likelihood.VIEWS_PER_PASS) * len(unit) * (max(ends) - first)

    def _draw(self, batch: list[list[_Job]], views: int, round_: int) -> list[Tensor]:
        """nats_K of each job: minus its log-likelihood in each draw."""
        jobs = [job for unit in batch for job in unit]
        rows = [
            {"input_ids": [*a.context, *a.tokens], "turn": [0] * len(a.context) + [1] * len(a.tokens)} for a in (job.answer for job in jobs)
        ]
        collate = DiffusionCollator(self.model.objective, self.model.eos_token_id)
        streams = collate(rows)["streams"].sharing(len(batch[0])).to(self.model.device)
        if self.method == "exact":
            found = likelihood.exact(self.model, streams, order=self.order)
        else:
            rows_B = torch.tensor([noise_number(job.question, round_) for job in jobs], device=self.model.device)
            found = likelihood.nelbo(self.model, streams, samples=views, seed=self.seed, rows_B=rows_B)
        return list(found.nats_KB.T.cpu())


def _is_decided(question: list[_Job]) -> bool:
    """Whether one answer is the best beyond doubt, in each way of comparing them."""
    if len(question) == 1 or all(job.is_exact for job in question):
        return True
    samples = max(sum(map(len, job.draws)) for job in question if not job.is_exact)
    nats_AK = torch.stack([job.sampled(samples) for job in question]).double()
    if not nats_AK.isfinite().all():
        return True  # it will not get better
    ways = [torch.tensor(sizes)[:, None] for sizes in zip(*(job.answer.sizes for job in question), strict=True)]
    for size_A1 in ways:
        score_AK = -nats_AK / size_A1
        lead_AK = score_AK[score_AK.mean(1).argmax()] - score_AK
        stderr_A = lead_AK.std(1) / samples**0.5
        if not (lead_AK.mean(1) >= CERTAIN * stderr_A).all():
            return False
    return bool(ways)


def noise_number(answers: Sequence[Answer], round_: int) -> int:
    """The row number for the noise of a question: it depends on its first context, and on the answers where that says nothing."""
    context, tokens = min((answer.context, answer.tokens) for answer in answers)
    text = f"{context} {round_}" if len(context) > 1 else f"{context} {tokens} {round_}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
