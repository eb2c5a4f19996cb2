"""Infilling: gaps are filled, what is given stays, and what an objective cannot see is refused."""

from __future__ import annotations

import string

import pytest
import torch
from families import byte_model, diffusion_model
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import likelihood
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
    assert len(found.gaps) == len(gaps) and found.nfe == found.new_tokens == sum(gaps)


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


@pytest.mark.parametrize(("text", "behind"), [("ab<mask:{}>cd<mask:2>e", 9), ("ab<mask:{}>cdefghijkl", 8), ("ab<mask:{}>", 8)])
def test_of_several_lengths_the_likeliest_is_taken_and_all_evaluations_are_counted(text: str, behind: int) -> None:
    model = byte_model("mdlm").double()
    single = [infill(model, [text.format(n)], CONFIG)[0] for n in (1, 2, 3, 4)]
    nats = []
    for n, found in enumerate(single, 1):
        tokens = torch.tensor([[*found.tokens, *([model.eos_token_id] if text[-1] == ">" else [])]])
        place = torch.arange(tokens.shape[1])
        streams = model.objective.streams(tokens, ((place >= 2) & (place < 2 + n + behind)).long()[None])
        nats.append(float(likelihood.exact(model, streams).nats_B))
    both = infill(model, [text.format("1-4"), "x<mask:2>"], CONFIG)
    best = single[nats.index(min(nats))]
    assert (both[0].tokens, both[0].text, both[0].gaps) == (best.tokens, best.text, best.gaps)
    assert both[0].nfe == sum(found.nfe for found in single) and both[1].nfe == 2


def alphabet_model(monkeypatch: pytest.MonkeyPatch) -> DiffusionModel:
    """It says the alphabet from the nearest token on the left on, as sure of each letter, whatever stands on the right."""
    model = byte_model("mdlm", hidden_size=264)
    (first,) = model.tokenizer("a")["input_ids"]
    torch.nn.init.eye_(model.network.get_output_embeddings().weight)

    def hidden(ids_BS: torch.Tensor, slots: Slots, **_: object) -> torch.Tensor:
        index_S = torch.arange(ids_BS.shape[1])
        last_BS = torch.where(ids_BS != model.spec.mask_token_id, index_S, 0).cummax(1).values
        letter_BS = (ids_BS.gather(1, last_BS) - first + index_S - last_BS) % 26
        return 10.0 * torch.nn.functional.one_hot(letter_BS + first, 264)

    monkeypatch.setattr(model, "hidden", hidden)
    return model


def test_the_length_of_a_gap_is_found_by_what_lies_behind_it_where_all_lengths_are_as_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, letters = alphabet_model(monkeypatch), string.ascii_lowercase * 2
    gaps = [letters[3 : 3 + n] for n in range(1, 8)]
    single = infill(model, [f"abc<mask:{n}>{letters[6:9]}" for n in range(1, 8)], CONFIG)
    assert len({round(found.logprob, 4) for found in single}) == 1
    found = infill(model, [f"abc<mask:1-7>{letters[3 + len(gap) :][:3]}" for gap in gaps], CONFIG)
    assert [each.gaps for each in found] == [[gap] for gap in gaps]
    two = infill(model, ["abc<mask:1-7>gh<mask:1-7>mn"], CONFIG)[0]
    assert two.gaps == ["def", "ijkl"]


def test_a_gap_is_filled_with_a_draw_that_its_generator_repeats() -> None:
    model, config = byte_model("mdlm"), SampleConfig(temperature=1.0)
    first, again, other = (infill(model, ["ab<mask:8>cd"], config, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "message"),
    [("no gap", "no gap to fill"), ("a<mask:0>", "rise from at least 1"), ("a<mask:5-2>", "rise from at least 1"),
     ("a<mask:1-9>b<mask:1-9>", "81 combinations"), ("a<mask:1-999999>b<mask:1-999999>", "999998000001 combinations"),
     ("a<mask:200>", "context is 128: shorten the text, or its gaps")],
)  # fmt: skip
def test_what_cannot_be_filled_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        infill(byte_model("mdlm"), [text], CONFIG)


def test_a_shifted_model_needs_text_before_the_gap() -> None:
    with pytest.raises(UserError, match="put text before the gap"):
        infill(diffusion_model("mdlm", right_shift=True), ["<mask:2>ab"], CONFIG)
