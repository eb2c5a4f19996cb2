"""Infilling: text with gaps, each of a length that is given or to be found, is filled with what lies on both sides in view."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from a2d_core import likelihood, sampling
from a2d_core.config import SampleConfig, require
from a2d_core.models import DiffusionModel

GAP = re.compile(r"<mask:(\d+)(?:-(\d+))?>")
"""`<mask:5>`: five tokens; `<mask:2-8>`: from two to eight of them."""
MAX_CANDIDATES = 64
"""Combinations of lengths that are tried for one text."""
BEHIND = 8
"""Tokens behind a gap by which its length is judged: mdlm takes an evaluation for each."""


@dataclass(frozen=True)
class Infill:
    """A text whose gaps were filled."""

    text: str
    """The whole text, without special tokens."""
    gaps: list[str]
    """What was put into each gap."""
    tokens: list[int]
    """Token ids of the whole text."""
    new_tokens: int
    """How many of them were put into the gaps."""
    logprob: float
    """Log-probability that a new token had when it was revealed, in nats, the mean over all of them."""
    nfe: int
    """Network evaluations that filled the gaps, those of all lengths that were tried; that the lengths are compared comes on top."""


@dataclass(frozen=True)
class _Candidate:
    """A text with gaps of certain lengths."""

    canvas: sampling.Canvas
    places: list[tuple[int, int]]
    """Where each gap begins and ends."""


def infill(model: DiffusionModel, texts: Sequence[str], config: SampleConfig, *, generator: torch.Generator | None = None) -> list[Infill]:
    """Fill the gaps `<mask:N>` (N tokens) and `<mask:N-M>` (N to M tokens) of each text.

    Every length from N to M is filled, and the likeliest text is taken: by the exact likelihood of what was put into the gaps
    together with the `BEHIND` tokens behind each, or with the end where a text ends in a gap. (How sure the new tokens were says
    little: what is cut short is as sure.) A stop token is never put into a gap; `stop`, `min_new_tokens` and `max_new_tokens` are
    for answers. mdlm fills gaps anywhere; bd3lm fills block by block, and sees what lies behind a gap only in the gap's own
    block. Raises `UserError` where the objective cannot see the text behind a gap, and where a text has no gap or too many
    lengths to try.
    """
    options = [_candidates(model, text, config) for text in texts]
    canvases = [candidate.canvas for candidates in options for candidate in candidates]
    events = sampling.run(model, canvases, config, generator)
    generations = {event.prompt: event.generation for event in events if event.generation is not None}
    in_order = iter([generations[number] for number in range(len(canvases))])
    found = []
    for candidates in options:
        filled = [_filled(model, candidate, next(in_order)) for candidate in candidates]
        nats = _nats(model, candidates, filled, config.batch_size) if len(filled) > 1 else [0.0]
        found.append(replace(filled[nats.index(min(nats))], nfe=sum(each.nfe for each in filled)))
    return found


def _candidates(model: DiffusionModel, text: str, config: SampleConfig) -> list[_Candidate]:
    """A canvas for each combination of lengths."""
    matches = list(GAP.finditer(text))
    require(bool(matches), f"there is no gap to fill in {text!r}: mark one as <mask:5> (five tokens) or <mask:2-8> (two to eight)")
    lengths = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches]
    for match, options in zip(matches, lengths, strict=True):
        require(len(options) > 0 and options[0] >= 1, f"{match[0]} is no gap: its lengths must rise from at least 1")
    count = math.prod(map(len, lengths))
    require(count <= MAX_CANDIDATES, f"the gaps of {text!r} have {count} combinations of lengths, more than {MAX_CANDIDATES}: narrow them")
    ends = [0, *(match.end() for match in matches)]
    between = [text[end:start] for end, start in zip(ends, [*(match.start() for match in matches), len(text)], strict=True)]
    pieces = [list(model.tokenizer(piece, add_special_tokens=not i)["input_ids"]) for i, piece in enumerate(between)]
    return [_candidate(model, pieces, chosen, config) for chosen in itertools.product(*lengths)]


def _candidate(model: DiffusionModel, pieces: list[list[int]], lengths: tuple[int, ...], config: SampleConfig) -> _Candidate:
    tokens, places = list(pieces[0]), []
    for length, piece in zip(lengths, pieces[1:], strict=True):
        places.append((len(tokens), len(tokens) + length))
        tokens += [model.spec.mask_token_id] * length + piece
    model.require_room(len(tokens), "a text with its gaps", "shorten the text, or its gaps")
    canvas = sampling.lay_out(model, tokens, config, may_end=len(tokens))
    first, last = canvas.begin, max((i for i, token in enumerate(tokens) if token != model.spec.mask_token_id), default=-1)
    require(first > 0 or not model.objective.right_shift, "this model predicts each token from the one before: put text before the gap")
    require(
        last < first or model.objective.sees_behind(first, last, canvas.lead),
        f"a gap begins at token {first} and there is text up to token {last}, which a bd3lm model with blocks of {model.spec.block_size} "
        "does not see when it fills the gap: leave out what lies behind the gap's block, or use an mdlm model",
    )
    return _Candidate(canvas, places)


def _filled(model: DiffusionModel, candidate: _Candidate, generation: sampling.Generation) -> Infill:
    canvas = candidate.canvas
    tokens = [*canvas.tokens[: canvas.begin], *generation.tokens]
    gaps = [model.tokenizer.decode(tokens[start:end], skip_special_tokens=True) for start, end in candidate.places]
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    new = sum(end - start for start, end in candidate.places)
    return Infill(text, gaps, tokens, new, generation.logprob / new, generation.nfe)


def _nats(model: DiffusionModel, candidates: list[_Candidate], filled: list[Infill], batch_size: int) -> list[float]:
    """Minus the log-likelihood of the gaps and of what lies behind them, given all else, in nats."""
    rows = []
    for candidate, text in zip(candidates, filled, strict=True):
        lead, last = candidate.canvas.lead, candidate.places[-1][1]
        tokens = [*text.tokens, model.eos_token_id] if last == len(text.tokens) else text.tokens
        is_scored = [int(any(start <= place < end + BEHIND for start, end in candidate.places)) for place in range(len(tokens))]
        # Padding before the first token moves the blocks to where the canvas has them.
        rows.append(([0] * lead + tokens, [0] * lead + is_scored, [0] * lead + [1] * len(tokens)))
    nats: list[float] = []
    for start in range(0, len(rows), batch_size):
        columns = zip(*rows[start : start + batch_size], strict=True)
        ids_BL, turn_BL, valid_BL = (pad_sequence([torch.tensor(line) for line in lines], batch_first=True) for lines in columns)
        streams = model.objective.streams(ids_BL, turn_BL, valid_BL.bool()).to(model.device)
        nats += likelihood.exact(model, streams).nats_B.tolist()
    return nats
