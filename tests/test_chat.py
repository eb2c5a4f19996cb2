"""Chat: what is seen of an answer, what a conversation remembers, its commands, and both ends of a pipe and of a terminal."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import torch
from families import byte_model
from rich.console import Console
from test_sampling import ending_model

from a2d_core import chat, sampling, terminal, watch
from a2d_core.chat import Chat, obey
from a2d_core.config import OBJECTIVES, SampleConfig, UserError
from a2d_core.models import DiffusionModel
from a2d_core.watch import Watched, blocks, pieces

CONFIG = SampleConfig(max_new_tokens=12)
WAYS = [
    CONFIG,
    replace(CONFIG, threshold=0.3),
    replace(CONFIG, steps_per_block=4, remasking=0.4),
    replace(CONFIG, temperature=1.0, stop=("e", "ab")),
]


@pytest.fixture(scope="module", params=OBJECTIVES)
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    return byte_model(request.param, max_position_embeddings=128)


def no_letters() -> tuple[int, ...]:
    """All tokens but letters and the end: an answer of letters is one line, and each token is a character."""
    tokenizer = byte_model("bd3lm").tokenizer
    letters = set(tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"])
    return tuple(set(range(len(tokenizer))) - letters)


NO_LETTERS = no_letters()


def seeded(model: DiffusionModel) -> torch.Generator:
    return torch.Generator(model.device).manual_seed(3)


@pytest.mark.parametrize("config", WAYS)
def test_what_the_events_tell_is_the_answer(model: DiffusionModel, config: SampleConfig) -> None:
    prompt = model.encode("Upper: sea")
    (expected,) = sampling.generate(model, [prompt], config, generator=seeded(model))
    watched, before = Watched.begin(model, prompt, config), -1
    for event in sampling.stream(model, [prompt], config, generator=seeded(model)):
        watched.see(event)
        assert watched.active[0] >= before, "a block that was filled stays so"
        before = watched.active[0]
    assert watched.generation == expected
    begin = watched.canvas.begin
    assert [watched.marks[begin + i].token for i in range(len(expected.tokens))] == expected.tokens
    assert all(0 < mark.probability <= 1 and 1 <= mark.nfe <= expected.nfe for mark in watched.marks.values())


@pytest.mark.parametrize("config", WAYS)
def test_the_blocks_make_up_the_answer(model: DiffusionModel, config: SampleConfig) -> None:
    prompt = model.encode("Upper: sea")
    (expected,) = sampling.generate(model, [prompt], config, generator=seeded(model))
    found = list(blocks(model, prompt, config, generator=seeded(model)))
    assert "".join(found) == expected.text
    assert all(found)


def test_blocks_come_before_the_answer_is_finished() -> None:
    model, config = byte_model("bd3lm"), replace(CONFIG, suppressed_tokens=NO_LETTERS)
    assert len(list(blocks(model, model.encode("Upper: sea"), config))) >= 3


def test_nothing_is_active_behind_an_end() -> None:
    model = ending_model("bd3lm")
    watched = Watched.begin(model, [5, 6, 7], CONFIG)
    events = sampling.stream(model, [[5, 6, 7]], CONFIG)
    for event in events:
        watched.see(event)
        if watched.generation is None and watched.active[0] == watched.active[1]:
            break
    else:
        pytest.fail("the end of the answer was not seen before its generation")
    assert watched.final() == next(e.generation.text for e in events if e.generation)


def test_what_may_become_a_stop_text_is_kept_back() -> None:
    assert watch._certain("abc##", ["###"]) == "abc"
    assert watch._certain("abc#!", ["###"]) == "abc#!"
    assert watch._certain("ab###c", ["###"]) == "ab"
    assert watch._certain("ab\ufffd", []) == "ab"


def test_the_shares_of_tokens_make_up_the_text_and_a_character_is_whole() -> None:
    tokenizer = byte_model("bd3lm").tokenizer
    tokens = tokenizer("naïve 🌊 sea")["input_ids"]
    shares = pieces(tokenizer, tokens)
    assert "".join(shares) == "naïve 🌊 sea"
    assert not any("\ufffd" in share for share in shares)
    assert pieces(tokenizer, [*tokens[:2], None, *tokens[4:5]]) == ["n", "a", "", "v"]


# --- the conversation -----------------------------------------------------------------------------


def test_showing_an_answer_does_not_change_it(model: DiffusionModel) -> None:
    config, seen = replace(CONFIG, temperature=1.0), []
    shown = Chat(model, config).answer("Upper: sea", lambda watched, _: seen.append(watched.nfe))
    unseen = Chat(model, config).answer("Upper: sea")
    assert (shown.text, shown.nfe, shown.tokens) == (unseen.text, unseen.nfe, unseen.tokens)
    assert seen and seen[-1] == shown.nfe


def test_an_interrupted_answer_ends_at_its_first_mask_and_the_chat_goes_on() -> None:
    model = byte_model("bd3lm", block_size=4)
    conversation = Chat(model, CONFIG)

    def interrupt(watched: Watched, _: float) -> None:
        if watched.active[0] > watched.canvas.begin + 4:
            raise KeyboardInterrupt

    stopped = conversation.answer("Upper: sea", interrupt)
    whole = Chat(model, CONFIG).answer("Upper: sea")
    assert stopped.stopped and not whole.stopped
    assert 4 < stopped.tokens < whole.tokens and stopped.nfe < whole.nfe
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert not conversation.answer("Upper: sea").stopped


def test_what_was_interrupted_at_once_is_not_remembered(model: DiffusionModel) -> None:
    conversation = Chat(model, CONFIG)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    answer = conversation.answer("Upper: sea", interrupt)
    assert answer.stopped
    assert [m["content"] for m in conversation.messages[1:]] == [answer.text] * bool(answer.text)


def test_a_full_context_is_told_and_the_system_prompt_stays(model: DiffusionModel) -> None:
    conversation = Chat(model, CONFIG)
    conversation.instruct("Be brief")
    assert [conversation.answer("x" * 20).forgotten for _ in range(4)].count(0) < 4
    assert model.encode_messages(conversation.system)[:5] == conversation._prompt(conversation.messages)[:5]
    assert "the context of 128 positions is full: the oldest 2 turns were left out: /reset" in chat.forgot(conversation, 2)
    with pytest.raises(UserError, match="context"):
        conversation.answer("x" * 128)


# --- its commands ---------------------------------------------------------------------------------


def test_settings_are_changed_told_and_refused(model: DiffusionModel) -> None:
    conversation, fixed = Chat(model, CONFIG), {"batch_size": "a chat has one prompt at a time"}
    assert obey(conversation, "settings", "threshold=0.5 stop=a b temperature=1", fixed) == 'threshold=0.5\nstop=["a b"]\ntemperature=1.0'
    assert conversation.config == replace(CONFIG, threshold=0.5, stop=("a b",), temperature=1.0)
    assert "threshold          0.5" in obey(conversation, "settings", "", fixed)
    assert "batch_size" not in obey(conversation, "settings", "", fixed)
    assert obey(conversation, "settings", "top_k", fixed).startswith("top_k=null: Draw only among")
    wrong = {
        "temperatur=1": "did you mean 'temperature'",
        "threshold=2": "must lie in",
        "batch_size=2": "a chat has one prompt at a time",
        "colour": "no setting 'colour'",
        "block_origin=prompt_end" if model.spec.objective == "mdlm" else "guidance=1": "Leave it ",
    }
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            obey(conversation, "settings", text, fixed)
    assert conversation.config.threshold == 0.5


def test_commands_of_a_conversation(model: DiffusionModel) -> None:
    conversation = Chat(model, CONFIG)
    conversation.answer("Upper: sea")
    obey(conversation, "system", "Be brief", {})
    assert conversation.system[0]["content"] == "Be brief" and conversation.messages
    obey(conversation, "reset", "", {})
    assert conversation.system and not conversation.messages
    obey(conversation, "system", "", {})
    assert not conversation.system
    assert "/settings" in obey(conversation, "help", "", {})
    with pytest.raises(UserError, match="no command /foo"):
        obey(conversation, "foo", "", {})


def test_a_template_without_a_system_prompt_says_so() -> None:
    model = byte_model("bd3lm")
    model.tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}?"
    with pytest.raises(UserError, match="takes no system prompt"):
        Chat(model, CONFIG).instruct("Be brief")
    with pytest.raises(UserError, match="leave out --raw"):
        Chat(model, CONFIG, raw=True).instruct("Be brief")


# --- the pipe and the terminal --------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    byte_model("bd3lm").save(folder)
    return str(folder)


def test_a_pipe_has_answers_alone_and_no_escape_codes(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, suppressed_tokens=NO_LETTERS)  # letters, so that an answer is one line
    terminal.run(config, checkpoint, source=io.StringIO("Upper: sea\n\n/help\n/settings top_k=1\n/reset\nUpper: sea\n/quit\nLast: sun\n"))
    out, err = capsys.readouterr()
    lines = out.split("\n")
    assert len(lines) == 3 and lines[0] == lines[1] != "" and lines[2] == ""
    assert "\x1b" not in out
    assert "/settings" in err and "top_k=1" in err
    with pytest.raises(UserError, match="no command /foo"):
        terminal.run(config, checkpoint, source=io.StringIO("/foo\n"))


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 40 columns and 8 lines is sent."""
    written = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=written, force_terminal=True, width=40, height=8, highlight=False))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return written


def test_a_terminal_shows_masks_the_answer_and_its_cost(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FRAMES_PER_SECOND", 1e9)
    model = byte_model("bd3lm")
    config = replace(CONFIG, max_new_tokens=90, suppressed_tokens=NO_LETTERS)
    talk = terminal._Terminal(Chat(model, config), "a model", 0)
    talk.reply("Upper: sea")
    shown, answer = screen.getvalue(), talk.conversation.messages[-1]["content"]
    assert terminal.MASKED in shown
    assert answer[:40] in shown.split(terminal.MASKED)[-1], "the whole answer stands in the end"
    assert "90 tokens · 90 evaluations · 1.0 toke…" in shown, "two columns are left for the terminal's own ^C"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor comes back"


def test_a_terminal_is_not_flooded(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FRAMES_PER_SECOND", 1e-9)
    talk = terminal._Terminal(Chat(byte_model("bd3lm"), CONFIG), "a model", 0)
    talk.reply("Upper: sea")
    assert screen.getvalue().count("evaluation") <= 2 * 3, "the first frame and the last"


def test_a_long_answer_is_shown_from_its_end_while_it_grows_and_whole_when_finished() -> None:
    view = terminal._View(byte_model("bd3lm"))
    view.watched = Watched.begin(view.model, [5, 6], replace(CONFIG, max_new_tokens=100))
    for position in range(2, 92):
        view.watched.marks[position] = watch.Mark(97, 0.5, 1)
    console = Console(width=10, height=6, file=io.StringIO())
    assert len(console.render_lines(view)) == 4 + 1
    view.answer = chat.Answer("a" * 90, 5, 90, 1.0)
    assert len(console.render_lines(view)) == 9 + 1


def test_an_answer_does_not_steer_the_terminal() -> None:
    assert terminal.plain("a\x1b[2Jb\x07\n\tc") == "a\ufffd[2Jb\ufffd\n\tc"
    assert [terminal.colour(p) for p in (0.2, 0.7, 0.99)] == ["bold red", "bold yellow", "bold green"]
