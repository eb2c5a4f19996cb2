"""Infilling: gaps are filled, what is given stays, and what an objective cannot see is refused."""

from __future__ import annotations

import pytest
import torch
from families import byte_model, diffusion_model
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core.attention import Slots
from a2d_core.config import SampleConfig, UserError
from a2d_core.infill import infill
from a2d_core.models import DiffusionModel

CONFIG = SampleConfig(batch_size=3)
WORDS = st.text(alphabet="abcdefgh ", min_size=1, max_size=6)


def alone(model: DiffusionModel, text: str) -> list[int]:
    """The same by the definition, greedily, one token at a time with everything visible computed anew."""
    tokens = [model.spec.mask_token_id if c == "_" else t for c, t in zip(text, model.tokenizer(text)["input_ids"], strict=True)]
    size = model.objective.block_size or len(tokens)
    never = [model.spec.mask_token_id, *model.stop_token_ids]
    for start in range(0, len(tokens), size):
        while opened := [i for i in range(start, min(start + size, len(tokens))) if tokens[i] == model.spec.mask_token_id]:
            position = torch.arange(min(start + size, len(tokens)))[None]
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([tokens[: start + size]]), Slots.clean(position, model.objective.block_of(position)))
                logits = (hidden @ model.network.get_output_embeddings().weight.T)[0]
            logits[:, never] = -torch.inf
            best = {i: logits[i].log_softmax(-1).max(-1) for i in opened}
            chosen = max(opened, key=lambda i: float(best[i].values))
            tokens[chosen] = int(best[chosen].indices)
    return tokens


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(WORDS, min_size=2, max_size=4), lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_gaps_are_filled_in_view_of_both_sides_and_what_is_given_stays(pieces: list[str], lengths: list[int]) -> None:
    model = byte_model("mdlm").double()
    gaps = lengths[: len(pieces) - 1]
    marked = pieces[0] + "".join(f"<mask:{n}>{piece}" for n, piece in zip(gaps, pieces[1:], strict=True))
    plain = pieces[0] + "".join("_" * n + piece for n, piece in zip(gaps, pieces[1:], strict=True))
    (found,) = infill(model, [marked], CONFIG)
    assert found.tokens == alone(model, plain)
    assert not {model.spec.mask_token_id, *model.stop_token_ids} & set(found.tokens)
    assert len(found.gaps) == len(gaps) and found.nfe == sum(gaps)


@pytest.mark.parametrize("text", ["abcd e<mask:1>h", "a<mask:5>cd", "abcdefghij<mask:3>k", "<mask:2>a"])
def test_bd3lm_fills_a_gap_whose_block_holds_what_lies_behind_it(text: str) -> None:
    model = byte_model("bd3lm", block_size=8).double()
    start, rest = text.split("<mask:")
    count, end = rest.split(">")
    assert infill(model, [text], CONFIG)[0].tokens == alone(model, start + "_" * int(count) + end)


def test_a_right_context_in_a_later_block_is_refused_and_none_at_all_is_fine() -> None:
    model = byte_model("bd3lm", block_size=4)
    with pytest.raises(UserError, match=r"blocks of 4 .*use an mdlm model"):
        infill(model, ["ab<mask:2>efgh"], CONFIG)
    (found,) = infill(model, ["ab<mask:9>"], CONFIG)
    assert len(found.tokens) == 11


def test_of_several_lengths_the_surest_is_taken_and_all_evaluations_are_counted() -> None:
    model = byte_model("mdlm").double()
    single = [infill(model, [f"ab<mask:{n}>cd<mask:2>e"], CONFIG)[0] for n in (1, 2, 3, 4)]
    both = infill(model, ["ab<mask:1-4>cd<mask:2>e", "x<mask:2>"], CONFIG)
    best = max(single, key=lambda found: found.logprob)
    assert (both[0].tokens, both[0].text, both[0].gaps) == (best.tokens, best.text, best.gaps)
    assert both[0].nfe == sum(found.nfe for found in single) and both[1].nfe == 2


def test_a_gap_is_filled_with_a_draw_that_its_generator_repeats() -> None:
    model, config = byte_model("mdlm"), SampleConfig(temperature=1.0)
    first, again, other = (infill(model, ["ab<mask:8>cd"], config, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "message"),
    [("no gap", "no gap to fill"), ("a<mask:0>", "rise from at least 1"), ("a<mask:5-2>", "rise from at least 1"),
     ("a<mask:1-9>b<mask:1-9>", "81 combinations"), ("a<mask:200>", "context is 128")],
)  # fmt: skip
def test_what_cannot_be_filled_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        infill(byte_model("mdlm"), [text], CONFIG)


def test_a_shifted_model_needs_text_before_the_gap() -> None:
    with pytest.raises(UserError, match="put text before the gap"):
        infill(diffusion_model("mdlm", right_shift=True), ["<mask:2>ab"], CONFIG)
