"""Conversations -> rows: the supervised tokens are the answer and its end, and stand behind what sampling sees, or are refused."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from a2d_core import data, embedded, models
from a2d_core.config import UserError

TOKENIZER = embedded.build_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def talk(*contents, system=None):
    """Contents of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


TALK = talk("hi", "yo")
LONG_TALK = talk("hi", "yo", "so?", "nothing", "bye", "see you")


def with_template(template, **special):
    tokenizer = embedded.build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|stop|>"], **special}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def make(talks, tokenizer=TOKENIZER, max_length=256, block_size=None, **options):
    return data.conversation_rows(Dataset.from_dict({"messages": list(talks)}), tokenizer, max_length, block_size, **options)


def supervised(row):
    """(what is given before it, its tokens) of each supervised turn of a row."""
    turns = row["turn"]
    assert len(turns) == len(row["input_ids"])
    numbers = sorted({number for number in turns if number})
    assert numbers == list(range(1, len(numbers) + 1))
    spans = []
    for number in numbers:
        start, end = turns.index(number), len(turns) - turns[::-1].index(number)
        assert turns[start:end] == [number] * (end - start)
        spans.append((row["input_ids"][:start], row["input_ids"][start:end]))
    return spans


def seen_by_sampling(tokenizer, messages):
    model = SimpleNamespace(tokenizer=tokenizer, require_chat_template=lambda remedy: None)
    return models.DiffusionModel.encode_messages(model, messages)


def answers(rows, tokenizer=TOKENIZER):
    return [[tokenizer.decode(ids) for _, ids in supervised(row)] for row in rows]


# --- the supervised span, for each way in which templates are written ---

EACH = "{% for m in messages %}{% set c = m['content'] %}{% set r = m['role'] %}"
CHATML = EACH + "{{ '<|' + r + '|>\n' + c + '<|stop|>\n' }}{% endfor %}"
ASKED = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
UNASKED = "{{ '<|assistant|>\n' }}"
THINKING = """
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set c = m['content'] %}
    {%- if m['role'] == 'assistant' %}
        {%- set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}
        {%- set c = c.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.index0 > last.user and (loop.last or thought) %}
            {%- set c = '<think>\n' + thought + '\n</think>\n\n' + c %}
        {%- endif %}
    {%- endif %}
    {{- '<|' + m['role'] + '|>\n' + c + '<|stop|>\n' }}
{%- endfor %}"""
REFUSING = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
VARIANTS = {  # template -> what is supervised of LONG_TALK, in one row or in more
    "the embedded one": (TOKENIZER.chat_template, [["yo<|end|>", "nothing<|end|>", "see you<|end|>"]]),
    "white space behind the end of turn": (CHATML + ASKED, [["yo<|stop|>", "nothing<|stop|>", "see you<|stop|>"]]),
    "a beginning of sequence": ("{{ bos_token }}" + CHATML + ASKED, [["yo<|stop|>", "nothing<|stop|>", "see you<|stop|>"]]),
    "a header of its own behind each question (Qwen2)": (
        EACH + "{% if r == 'user' %}{{ c + '<|stop|>\n<|assistant|>\n' }}{% else %}{{ c + '<|stop|>\n' }}{% endif %}{% endfor %}",
        [["yo<|stop|>", "nothing<|stop|>", "see you<|stop|>"]],
    ),
    "a header of its own at the end": (
        EACH + "{{ '<|' + r + '|>\n' + c + '<|stop|>\n' }}{% endfor %}" + UNASKED,
        [["yo<|stop|>", "nothing<|stop|>", "see you<|stop|>"]],
    ),
    "an end of sequence behind the end of turn (Phi-3)": (
        CHATML + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        [["yo<|stop|>", "nothing<|stop|>", "see you<|stop|>"]],
    ),
    "no end of turn": (
        EACH + "{{ r + ': ' + c + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        [["yo<|end|>"], ["nothing<|end|>"], ["see you<|end|>"]],  # the template writes no end into the later prompts
    ),
    "no end of turn, and a header of its own at the end": (
        EACH + "{{ '<|' + r + '|>' + c }}{% endfor %}{{ '<|assistant|>' }}",
        [["yo<|end|>"], ["nothing<|end|>"], ["see you<|end|>"]],
    ),
    "another end for the last turn (gpt-oss)": (
        EACH + "{{ '<|' + r + '|>' + c + ('<|stop|>' if loop.last and r == 'assistant' else '<|end|>') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        [["yo<|stop|>"], ["nothing<|stop|>"], ["see you<|stop|>"]],
    ),
    "an empty thought in the last answer (Qwen3)": (
        THINKING + ASKED,
        [[f"<think>\n\n</think>\n\n{answer}<|stop|>"] for answer in ("yo", "nothing", "see you")],
    ),
    "an empty thought in the prompt (Qwen3 without thinking)": (
        THINKING + "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n\n</think>\n\n' }}{% endif %}",
        [["yo<|stop|>"], ["nothing<|stop|>"], ["see you<|stop|>"]],
    ),
    "roles that must alternate": (
        REFUSING + CHATML[len("{% for m in messages %}") :] + ASKED,
        [["yo<|stop|>", "nothing<|stop|>", "see you<|stop|>"]],
    ),
}


@pytest.mark.parametrize("template", VARIANTS)
def test_the_answer_and_its_end_are_supervised_behind_what_sampling_sees(template):
    text, expected = VARIANTS[template]
    tokenizer = with_template(text, bos_token="<|begin|>")
    joined, facts = make([LONG_TALK], tokenizer, block_size=4)
    assert answers(joined, tokenizer) == expected
    assert facts == {"dropped": {}}
    one_each, _ = make([LONG_TALK], tokenizer)
    assert answers(one_each, tokenizer) == [[answer] for row in expected for answer in row]
    prompts = [seen_by_sampling(tokenizer, LONG_TALK[:index]) for index in (1, 3, 5)]
    for rows in (joined, one_each):
        assert [prompt for row in rows for prompt, _ in supervised(row)] == prompts
        assert all(row["turn"][-1] for row in rows)  # what lies behind the last supervised turn is cut off
        assert rows["row"][:] == list(range(len(rows)))
        assert {answer[-1] for row in rows for _, answer in supervised(row)} == {data.end_of_turn(tokenizer)}


def test_a_thought_is_supervised_with_its_answer_and_left_out_of_later_prompts():
    tokenizer = with_template(THINKING + ASKED)
    rows, _ = make([talk("1+1", "<think>\neasy\n</think>\n\n2", "2+2", "4")], tokenizer, block_size=4)
    assert answers(rows, tokenizer) == [["<think>\neasy\n</think>\n\n2<|stop|>"], ["<think>\n\n</think>\n\n4<|stop|>"]]
    assert "easy" not in tokenizer.decode(rows[1]["input_ids"])


CONTENTS = st.text(st.sampled_from("ab \n."), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(CONTENTS, min_size=1, max_size=7), st.sampled_from(list(VARIANTS)), st.sampled_from(["drop", "truncate"]))
def test_one_row_supervises_the_same_turns_as_a_row_for_each(contents, template, too_long):
    tokenizer = with_template(VARIANTS[template][0], bos_token="<|begin|>")
    talks = [talk(*contents), TALK]
    (joined, facts), (one_each, same_facts) = (make(talks, tokenizer, 80, size, too_long=too_long) for size in (4, None))
    spans = [[span for row in rows for span in supervised(row)] for rows in (joined, one_each)]
    assert spans[0] == spans[1]
    assert facts == same_facts


@settings(max_examples=60, deadline=None)
@given(st.lists(CONTENTS, min_size=1, max_size=7))
def test_each_turn_is_supervised_or_counted(contents):
    rows, facts = make([talk(*contents), TALK], max_length=40, block_size=4)
    counted = sum(len(supervised(row)) for row in rows) + sum(facts["dropped"].values())
    assert counted == max(1, len(contents) // 2) + 1


# --- tokens that cross the boundary ---


def with_merge(add_prefix_space=False):
    """A tokenizer with a token for two line breaks, as real ones have it."""
    state = json.loads(TOKENIZER.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĊĊ"] = len(TOKENIZER)
    state["model"]["merges"] = [["Ċ", "Ċ"]]
    state["pre_tokenizer"]["add_prefix_space"] = add_prefix_space
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = (
        EACH + "{{ r + ':\n' + c + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    return tokenizer


def test_an_answer_whose_first_token_would_merge_into_the_prompt_goes_on_from_the_prompts_tokens():
    tokenizer, messages = with_merge(), talk("hi", "\nyo", "so?", "x")
    rows, facts = make([messages], tokenizer, block_size=4)
    assert answers(rows, tokenizer) == [["\nyo<|end|>"], ["x<|end|>"]]
    assert [supervised(row)[0][0] for row in rows] == [seen_by_sampling(tokenizer, messages[:index]) for index in (1, 3)]
    assert facts["dropped"] == {}


def test_an_answer_that_cannot_be_told_from_its_prompt_is_refused():
    _, facts = make([talk("hi", "\nyo"), TALK], with_merge(add_prefix_space=True))
    assert facts["dropped"] == {"tokens of prompt and response cannot be told apart": 1}


# --- what is left out, and why ---


def test_turns_that_cannot_be_supervised_are_counted_with_their_reason():
    talks = [TALK, talk("hi", "y" * 30), talk("hi"), [{"role": "assistant", "content": "hello"}], talk("hi", " "), talk("hi", "a<|end|>b")]
    rows, facts = make(talks, max_length=24)
    assert len(rows) == 1
    assert facts["dropped"] == {
        "longer than max_length=24": 1, "no assistant turn": 1, "no prompt": 1, "empty response": 1,
        "end-of-turn or mask token inside the response": 1,
    }  # fmt: skip


def test_a_refused_turn_is_context_of_the_later_ones():
    rows, facts = make([[{"role": "assistant", "content": "hello"}, *talk("hi", "", "so?", "x")]], block_size=4)
    ((prompt, answer),) = supervised(rows[0])
    assert TOKENIZER.decode(prompt) == "<|assistant|>hello<|end|><|user|>hi<|end|><|assistant|><|end|><|user|>so?<|end|><|assistant|>"
    assert TOKENIZER.decode(answer) == "x<|end|>"
    assert facts["dropped"] == {"no prompt": 1, "empty response": 1}


def test_the_mask_token_is_no_answer():
    tokenizer = embedded.build_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    _, facts = make([talk("hi", "a<|mask|>b"), TALK], tokenizer)
    assert facts["dropped"] == {"end-of-turn or mask token inside the response": 1}


def test_a_template_that_rewrites_its_prompt_its_end_or_the_answer_is_not_trained_on():
    for template, reason in [
        ("{{ messages | length }}" + TOKENIZER.chat_template, "template does not extend its prompt': 1"),
        (EACH + "{{ c + '<|end|>' * (c | length) }}{% endfor %}", "template ends this turn in another way': 1"),
        (EACH + "{{ c.split('o')[1] if r == 'assistant' and '@' not in c else c }}{% endfor %}", "empty response': 1"),
    ]:
        with pytest.raises(UserError, match=re.escape(reason)):
            make([TALK], with_template(template))


def test_a_conversation_that_the_template_refuses_is_counted_with_what_the_template_says():
    refusing = with_template(VARIANTS["roles that must alternate"][0])
    rows, facts = make([TALK, talk("hi", "yo", system="s")], refusing)
    assert len(rows) == 1
    assert facts["dropped"] == {"refused by the chat template: roles": 1}


def test_only_the_last_assistant_turn_is_learned_where_that_is_asked():
    for size in (None, 4):
        rows, facts = make([LONG_TALK, talk("hi", "yo", "so?"), talk("hi", "yo", "so?", "")], block_size=size, supervise="last")
        assert answers(rows) == [["see you<|end|>"], ["yo<|end|>"]]
        assert facts["dropped"] == {"empty response": 1}


def test_a_row_must_fit_max_length_once_its_last_block_is_filled():
    length = len(make([TALK])[0][0]["input_ids"])
    assert len(make([TALK], max_length=length)[0]) == 1
    with pytest.raises(UserError, match="longer than max_length"):
        make([TALK], max_length=length, block_size=length - 1)


def test_of_a_long_conversation_the_turns_that_fit_are_kept():
    rows, facts = make([LONG_TALK], max_length=24, block_size=4)
    assert answers(rows) == [["yo<|end|>", "nothing<|end|>"]]
    assert facts["dropped"] == {"longer than max_length=24": 1}


@pytest.mark.parametrize("block_size", [None, 4])
def test_truncated_rows_are_the_first_tokens_and_a_cut_turn_has_no_end(block_size):
    whole = make([LONG_TALK], block_size=block_size)[0]
    rows, facts = make([LONG_TALK], max_length=20, block_size=block_size, too_long="truncate")
    assert answers(rows)[-1][-1] == "nothin"
    assert [row["input_ids"] for row in rows] == [row["input_ids"][:20] for row in whole][: len(rows)]
    assert [row["turn"] for row in rows] == [row["turn"][:20] for row in whole][: len(rows)]
    assert facts["dropped"] == {"no response within max_length=20": 1}


def test_a_tokenizer_whose_template_is_missing_or_of_no_use_is_refused():
    for template, message in [
        (None, r"no chat template: .*chat_template\.jinja"),
        ("{{ raise_exception('never') }}", "refuses a question and its answer: never"),
        ("{{ messages[0]['content'] }}", "leaves out what the assistant says"),
    ]:
        with pytest.raises(UserError, match=message):
            make([TALK], with_template(template))


# --- packing ---


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.text("ab", min_size=1, max_size=9), min_size=2, max_size=6), min_size=1, max_size=12), st.sampled_from([1, 3, 8])
)
def test_packed_rows_are_the_filled_conversations_in_other_places(contents, block_size):
    talks = [talk(*turns) for turns in contents]
    rows, _ = make(talks, max_length=48, block_size=block_size)
    packed, facts = make(talks, max_length=48, block_size=block_size, pack=True)
    unpacked, filled = [], 0
    for row in packed:
        assert 0 < len(row["input_ids"]) == len(row["turn"]) == len(row["document"]) <= 48 - 48 % block_size
        assert row["document"][0] == 0 and all(after - before in (0, 1) for before, after in pairwise(row["document"]))
        supervised(row)  # its turns are numbered without a gap
        for document in range(row["document"][-1] + 1):
            place = [index for index, other in enumerate(row["document"]) if other == document]
            ids, turns = ([row[column][index] for index in place] for column in ("input_ids", "turn"))
            assert len(ids) % block_size == 0
            filled += len(ids)
            end = max(index for index in range(len(ids)) if ids[: index + 1] in rows["input_ids"][:])
            assert set(ids[end + 1 :]) <= {EOS} and set(turns[end + 1 :]) <= {turns[end]} and len(ids) - end - 1 < block_size
            first = next(filter(None, turns))
            unpacked.append((ids[: end + 1], [number and number - first + 1 for number in turns[: end + 1]]))
    assert sorted(unpacked) == sorted((row["input_ids"], row["turn"]) for row in rows)
    assert facts["padding"] == pytest.approx(1 - filled / (len(packed) * (48 - 48 % block_size)))
    assert packed["row"][:] == list(range(len(packed)))


def test_packing_leaves_less_padding_than_a_row_each():
    talks = [talk("q" * (i % 7), "a" * (1 + i % 11)) for i in range(60)]
    packed, facts = make(talks, max_length=64, block_size=4, pack=True)
    assert len(packed) < 30
    assert facts["padding"] < 0.1


def test_mdlm_has_nothing_to_pack():
    with pytest.raises(UserError, match=r"mdlm.*set pack=false"):
        make([TALK], pack=True)


# --- processes and the cache ---

AGAIN = """
import json, sys
from datasets import load_dataset
from a2d_core import data, embedded
dataset = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
rows, facts = data.conversation_rows(dataset, embedded.build_tokenizer(), 64, 4, pack=True)
print(json.dumps([rows[:], facts]))
"""


def test_another_process_takes_the_rows_from_the_cache(tmp_path):
    path, cache = str(tmp_path / "talks.jsonl"), tmp_path / "cache"
    Path(path).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (TALK, LONG_TALK, talk("hi"))))
    dataset = load_dataset("json", data_files=path, split="train", cache_dir=str(cache))
    tokenizer = embedded.build_tokenizer()
    tokenizer(["a", "long one"], padding=True)  # which it remembers
    tokenizer.name_or_path = "elsewhere"
    rows, facts = data.conversation_rows(dataset, tokenizer, 64, 4, pack=True)
    files = {(file, file.stat().st_mtime_ns) for file in cache.rglob("cache-*.arrow")}
    command, root = [sys.executable, "-c", AGAIN, path, str(cache)], Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [rows[:], facts]
    assert files
    assert files == {(file, file.stat().st_mtime_ns) for file in cache.rglob("cache-*.arrow")}


def test_rows_of_other_settings_are_not_taken_from_the_cache(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": LONG_TALK}) + "\n")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    other = embedded.build_tokenizer()
    other.chat_template = CHATML.replace("stop", "end") + ASKED
    settings = [{}, {"tokenizer": other}, {"max_length": 24}, {"block_size": None}, {"supervise": "last"}]
    settings += [{"max_length": 20}, {"max_length": 20, "too_long": "truncate"}]
    made = [data.conversation_rows(dataset, **{"tokenizer": TOKENIZER, "max_length": 64, "block_size": 4, **kind})[0] for kind in settings]
    assert len({json.dumps(rows[:]) for rows in made}) == len(settings)


def test_several_processes_make_the_same_rows_as_one():
    talks = [talk("hi", "a" * i, "b", "c") for i in range(9)]
    (rows, facts), (same, same_facts) = (make(talks, block_size=4, num_workers=workers) for workers in (1, 2))
    assert rows[:] == same[:]
    assert facts == same_facts == {"dropped": {"empty response": 1}}
