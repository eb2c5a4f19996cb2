"""The embedded default: its text, its tokenizer, its tasks, and the model that is trained on the spot."""

import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2d_core import embedded
from a2d_core.config import UserError

TOKENIZER = embedded.build_tokenizer()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The smallest model, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A2D_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield embedded.build_base("smoke")


def test_no_paragraph_is_both_trained_on_and_held_out():
    train, held_out = ({" ".join(p.split()) for text in part for p in text.split("\n\n")} for part in embedded.corpus_split())
    assert train
    assert held_out
    assert not train & held_out


def test_the_split_holds_out_about_a_twentieth_of_the_text_and_loses_nothing():
    train, held_out = embedded.corpus_split()
    assert sorted(train + held_out) == sorted(embedded.corpus())
    share = sum(map(len, held_out)) / sum(map(len, embedded.corpus()))
    assert 0.04 < share <= 0.05


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_tokenizer_spells_any_text_with_a_token_per_byte(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_a_saved_tokenizer_reads_as_it_did(built):
    again = AutoTokenizer.from_pretrained(built)
    text = "  It's 12°, isn't it?\n\n\t日本語 "
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert (again.pad_token, again.eos_token, again.model_max_length) == ("<|pad|>", "<|end|>", embedded.CONTEXT)
    messages = embedded.instructions("test", 1)[0]["messages"]
    prompt = again.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = again.apply_chat_template(messages, tokenize=False)
    assert prompt == f"<|user|>{messages[0]['content']}<|end|><|assistant|>"
    assert whole == f"{prompt}{messages[1]['content']}<|end|>"
    assert again(whole)["input_ids"][-1] == again.eos_token_id


def test_test_words_are_never_trained_on():
    test_words = {row["word"] for row in embedded.instructions("test")}
    train_words = {row["word"] for row in embedded.instructions("train", 20_000, seed=1)}
    assert not test_words & train_words
    assert all(word.isalpha() and word.islower() and 3 <= len(word) <= 6 for word in test_words | train_words)


def test_each_task_has_two_hundred_distinct_short_test_prompts():
    rows = embedded.instructions("test")
    assert len(rows) == 200 * len(embedded.TASKS)
    for task in embedded.TASKS:
        prompts = {row["messages"][0]["content"] for row in rows if row["task"] == task}
        assert len(prompts) == 200
        assert max(map(len, prompts)) <= 16


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("words_reverse", "tenalp"),
        ("words_upper", "PLANET"),
        ("words_sort", "aelnpt"),
        ("words_last", "t"),
        ("words_repeat", "planet-planet"),
    ],
)
def test_a_task_answers_as_its_name_says(task, answer):
    assert embedded.TASKS[task][1]("planet") == answer


def test_training_instructions_are_a_function_of_the_seed_and_cover_every_task():
    rows = embedded.instructions("train", 1000, seed=3)
    assert rows[:10] == embedded.instructions("train", 10, seed=3)
    assert rows[:10] != embedded.instructions("train", 10, seed=4)
    assert all(sum(row["task"] == task for row in rows) == 200 for task in embedded.TASKS)


def test_chance_is_what_shuffled_letters_score():
    draw = torch.Generator().manual_seed(0)
    for task in embedded.TASKS:
        rows = [row for row in embedded.instructions("test") if row["task"] == task]
        hits = 0
        for row in rows * 20:
            word, answer = row["word"], row["messages"][1]["content"]
            shuffled = "".join(word[i] for i in torch.randperm(len(word), generator=draw))
            hits += shuffled[: len(answer)] == answer
        assert hits / (20 * len(rows)) == pytest.approx(embedded.chance_level(task), abs=0.03)


def test_training_is_determined_by_the_seed_and_leaves_the_global_generator_alone():
    recipe = embedded.Size(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16, steps=3, batch_size=2, row_length=16)
    before = torch.random.get_rng_state()
    (one, losses), (two, _), (other, _) = (embedded.train_base(recipe, TOKENIZER, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert losses["held_out_loss"] > 0


def test_the_base_is_a_qwen3_that_learnt_something_and_is_built_once(built, monkeypatch):
    monkeypatch.setenv("A2D_CACHE", str(built.parent))
    monkeypatch.setattr(embedded, "train_base", lambda *_: pytest.fail("trained again"))
    assert embedded.build_base("smoke") == built
    record = json.loads((built / "training.json").read_text())
    assert record["steps"] == embedded.SIZES["smoke"].steps
    assert record["held_out_loss"] < torch.tensor(float(len(TOKENIZER))).log().item()  # a uniform guess
    model = AutoModelForCausalLM.from_pretrained(built)
    assert model.config.model_type == "qwen3"
    assert model.config.eos_token_id == TOKENIZER.eos_token_id


def test_two_builders_at_once_train_one_model_and_leave_nothing_half_made(tmp_path, monkeypatch):
    monkeypatch.setenv("A2D_CACHE", str(tmp_path))
    calls, train_base = [], embedded.train_base
    recipe = embedded.Size(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16, steps=1, batch_size=1, row_length=16)
    monkeypatch.setitem(embedded.SIZES, "smoke", recipe)
    monkeypatch.setattr(embedded, "train_base", lambda *args: calls.append(args) or train_base(*args))
    threads = [threading.Thread(target=embedded.build_base, args=("smoke",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == ["", ".lock"]


def test_another_seed_or_recipe_is_another_directory(built, monkeypatch):
    recipe = embedded.SIZES["smoke"]
    keys = {embedded._key(r, TOKENIZER, seed) for r in (recipe, embedded.SIZES["tiny"]) for seed in (0, 1)}
    assert len(keys) == 4
    assert built.name.endswith(embedded._key(recipe, TOKENIZER, 0)[:16])


def test_a_mistake_names_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="tiny, smoke"):
        embedded.build_base("huge")
    with pytest.raises(UserError, match="train or test"):
        embedded.instructions("validation")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("A2D_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="A2D_CACHE"):
        embedded.build_base("smoke")
