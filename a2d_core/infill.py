"""Infilling: text with gaps, each of a length that is given or to be found, is filled with what lies on both sides in view."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a2d_core import sampling
from a2d_core.config import SampleConfig, require
from a2d_core.models import DiffusionModel

GAP = re.compile(r"<mask:(\d+)(?:-(\d+))?>")
"""`<mask:5>`: five tokens; `<mask:2-8>`: from two to eight of them."""
MAX_CANDIDATES = 64
"""Combinations of lengths that are tried for one text."""


@dataclass(frozen=True)
class Infill:
    """A text whose gaps were filled."""

    text: str
    """The whole text, without special tokens."""
    gaps: list[str]
    """What was put into each gap."""
    tokens: list[int]
    """Token ids of the whole text."""
    logprob: float
    """Log-probability that a new token had when it was revealed, in nats, the mean over all of them."""
    nfe: int
    """Network evaluations, those of all lengths that were tried."""


@dataclass(frozen=True)
class _Candidate:
    owner: int
    canvas: sampling.Canvas
    places: list[tuple[int, int]]
    """Where each gap begins and ends."""


def infill(model: DiffusionModel, texts: Sequence[str], config: SampleConfig, *, generator: torch.Generator | None = None) -> list[Infill]:
    """Fill the gaps `<mask:N>` (N tokens) and `<mask:N-M>` (N to M tokens) of each text.

    Every length from N to M is tried, and the text is taken whose new tokens were the surest on average. A stop token is never
    put into a gap; `stop`, `min_new_tokens` and `max_new_tokens` are for answers. mdlm fills gaps anywhere; bd3lm fills block by
    block, and sees what lies behind a gap only in the gap's own block. Raises `UserError` where the objective cannot see the
    text behind a gap, and where a text has no gap or too many lengths to try.
    """
    candidates = [candidate for owner, text in enumerate(texts) for candidate in _candidates(model, owner, text, config)]
    best: dict[int, Infill] = {}
    nfe = [0] * len(texts)
    for event in sampling.run(model, [candidate.canvas for candidate in candidates], config, generator):
        if event.generation is None:
            continue
        candidate = candidates[event.prompt]
        found = _filled(model, candidate, event.generation)
        nfe[candidate.owner] += found.nfe
        if candidate.owner not in best or found.logprob > best[candidate.owner].logprob:
            best[candidate.owner] = found
    return [Infill(**{**vars(best[owner]), "nfe": nfe[owner]}) for owner in range(len(texts))]


def _candidates(model: DiffusionModel, owner: int, text: str, config: SampleConfig) -> list[_Candidate]:
    """A canvas for each combination of lengths."""
    matches = list(GAP.finditer(text))
    require(bool(matches), f"there is no gap to fill in {text!r}: mark one as <mask:5> (five tokens) or <mask:2-8> (two to eight)")
    lengths = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches]
    for match, options in zip(matches, lengths, strict=True):
        require(len(options) > 0 and options[0] >= 1, f"{match[0]} is no gap: its lengths must rise from at least 1")
    combinations = list(itertools.product(*lengths))
    require(
        len(combinations) <= MAX_CANDIDATES,
        f"the gaps of {text!r} have {len(combinations)} combinations of lengths, more than {MAX_CANDIDATES}: narrow them",
    )
    ends = [0, *(match.end() for match in matches)]
    between = [text[end:start] for end, start in zip(ends, [*(match.start() for match in matches), len(text)], strict=True)]
    pieces = [list(model.tokenizer(piece, add_special_tokens=not i)["input_ids"]) for i, piece in enumerate(between)]
    return [_candidate(model, owner, pieces, chosen, config) for chosen in combinations]


def _candidate(model: DiffusionModel, owner: int, pieces: list[list[int]], lengths: tuple[int, ...], config: SampleConfig) -> _Candidate:
    tokens, places = list(pieces[0]), []
    for length, piece in zip(lengths, pieces[1:], strict=True):
        places.append((len(tokens), len(tokens) + length))
        tokens += [model.spec.mask_token_id] * length + piece
    canvas = sampling.lay_out(model, tokens, config, may_end=len(tokens))
    first, last = canvas.begin, max((i for i, token in enumerate(tokens) if token != model.spec.mask_token_id), default=-1)
    require(first > 0 or not model.objective.right_shift, "this model predicts each token from the one before: put text before the gap")
    require(
        last < first or model.objective.sees_behind(first, last, canvas.lead),
        f"a gap begins at token {first} and there is text up to token {last}, which a bd3lm model with blocks of {model.spec.block_size} "
        "does not see when it fills the gap: leave out what lies behind the gap's block, or use an mdlm model",
    )
    return _Candidate(owner, canvas, places)


def _filled(model: DiffusionModel, candidate: _Candidate, generation: sampling.Generation) -> Infill:
    canvas = candidate.canvas
    tokens = [*canvas.tokens[: canvas.begin], *generation.tokens]
    decode = [model.tokenizer.decode(tokens[start:end], skip_special_tokens=True) for start, end in candidate.places]
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    new = sum(end - start for start, end in candidate.places)
    return Infill(text, decode, tokens, generation.logprob / new, generation.nfe)
