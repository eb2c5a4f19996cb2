"""Text and conversations -> rows -> batches: nothing lost, nothing supervised that should not be, and mistakes said early."""

import json

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import data, embedded, objectives
from a2d_core.config import TrainConfig, UserError

TOKENIZER = embedded.build_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
TEXTS = ["one", "two\nlines", "", "three three three", "ünïcode"]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- loading ---


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "saved", "saved_splits", "directory"])
def test_every_kind_of_local_source_gives_the_same_documents(kind, tmp_path):
    texts = [f"text {i}" for i in range(20)]
    dataset, path = Dataset.from_dict({"text": texts, "other": list(range(20))}), tmp_path / f"data.{kind}"
    if kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "saved_splits":
        DatasetDict({"train": dataset}).save_to_disk(path)
    elif kind == "directory":
        path.mkdir()
        dataset.select(range(12)).to_parquet(path / "a.parquet")
        dataset.select(range(12, 20)).to_parquet(path / "b.parquet")
    else:
        {"jsonl": dataset.to_json, "json": dataset.to_json, "parquet": dataset.to_parquet, "csv": dataset.to_csv}[kind](path)
    train, held_out = data.load_documents(str(path), TrainConfig(eval_fraction=0.1))
    assert train.column_names == held_out.column_names == ["text"]
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted([*train["text"], *held_out["text"]]) == sorted(texts)


def test_a_text_file_is_one_document_whose_end_is_held_out(tmp_path):
    (tmp_path / "play.txt").write_text("".join(f"line {i}\n\n" for i in range(100)))
    train, held_out = data.load_documents(str(tmp_path / "play.txt"), TrainConfig(eval_fraction=0.1))
    whole = (tmp_path / "play.txt").read_text()
    assert train[0]["text"] + held_out[0]["text"] == whole
    assert len(held_out[0]["text"]) == round(0.1 * len(whole))


def test_text_files_of_a_directory_are_one_document_each(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n{name}")
    train, held_out = data.load_documents(str(tmp_path), TrainConfig())
    assert sorted([*train["text"], *held_out["text"]]) == ["a\na", "b\nb", "c\nc"]


def test_an_eval_split_is_taken_as_it_is(tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(count)])
    train, held_out = data.load_documents(str(tmp_path), TrainConfig(eval_split="test"))
    assert train["text"][:] == [f"train {i}" for i in range(5)]
    assert held_out["text"][:] == [f"test {i}" for i in range(3)]


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_held_out_rows_depend_on_the_seed_alone_and_leave_both_sides_a_row(fraction, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(4)])
    config = TrainConfig(eval_fraction=fraction)
    one, again = (data.load_documents(path, config, seed=3) for _ in range(2))
    assert [part["text"][:] for part in one] == [part["text"][:] for part in again]
    assert min(map(len, one)) >= 1
    assert sum(map(len, one)) == 4


def test_the_embedded_sets_have_their_own_held_out_part():
    train, held_out = data.load_documents("embedded:corpus", TrainConfig())
    assert (tuple(train["text"]), tuple(held_out["text"])) == embedded.corpus_split()
    config = TrainConfig(max_steps=5, batch_size=4, gradient_accumulation_steps=2)
    train, held_out = data.load_conversations("embedded:tasks", config, seed=1)
    assert train["messages"][:] == [row["messages"] for row in embedded.instructions("train", 40, seed=1)]
    assert held_out["messages"][:] == [row["messages"] for row in embedded.instructions("test")]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": TALK, "id": 1}, {}),
        ({"chat": TALK}, {"messages_field": "chat"}),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, {}),
        ({"question": "hi", "answer": "yo"}, {"prompt_field": "question", "response_field": "answer"}),
        ({"messages": [], "question": "hi", "answer": "yo"}, {"prompt_field": "question", "response_field": "answer"}),
        ({"instruction": "hi", "input": "", "output": "yo", "text": "..."}, {}),
        ({"instruction": "hi", "output": "yo"}, {}),
    ],
)
def test_conversations_are_read_from_every_known_layout(row, fields, tmp_path):
    train, held_out = data.load_conversations(write_jsonl(tmp_path / "a.jsonl", [row, row]), TrainConfig(**fields))
    assert train[0] == held_out[0] == {"messages": TALK}


def test_an_alpaca_input_stands_below_its_instruction(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    train, _ = data.load_conversations(write_jsonl(tmp_path / "a.jsonl", [row, row]), TrainConfig())
    assert train[0]["messages"][0]["content"] == "Add.\n\n1 2"


def test_mistakes_in_the_data_name_the_value_and_the_remedy(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "n": 1}] * 3)
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "ü"}\n{"text": "b"}\n'.encode("latin-1"))
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "bare").mkdir()
    one = write_jsonl(tmp_path / "one.jsonl", [{"messages": TALK}])
    load, talk = data.load_documents, data.load_conversations
    for function, spec, fields, message in [
        (load, path, {}, "no column 'text' .*: its columns are body, n"),
        (load, path, {"text_field": "n"}, "column 'n' .* not text"),
        (load, path, {"text_field": "body", "train_split": "dev"}, "split 'dev' .*'train'"),
        (load, path, {"text_field": "body", "eval_split": "dev"}, "split 'dev' .*'train'"),
        (talk, path, {}, "no column 'messages': its columns are body, n; .*prompt_field"),
        (talk, path, {"messages_field": "body"}, "column 'body' .*role/content"),
        (talk, path, {"prompt_field": "q", "response_field": "body"}, r"no column 'q' \(prompt_field\)"),
        (talk, one, {}, "1 rows .*eval_split"),
        (load, str(tmp_path / "missing.jsonl"), {}, "does not exist"),
        (load, "no/such/place", {}, "does not exist"),
        (load, str(tmp_path / "notes.md"), {}, "known type: use one of .txt"),
        (load, str(tmp_path / "empty.jsonl"), {}, "empty"),
        (load, str(tmp_path / "broken.jsonl"), {}, "JSON parse error"),
        (load, str(tmp_path / "latin.jsonl"), {}, "cannot load split 'train' .*UTF-?8"),
        (load, str(tmp_path / "latin.txt"), {}, "cannot load split 'train' .*: convert the file to UTF-8"),
        (load, str(tmp_path / "bare"), {}, "holds no data files"),
        (load, "embedded:news", {}, "embedded:corpus .*embedded:tasks"),
        (load, "nobody/no-such-data", {}, "'nobody/no-such-data'.*HF_TOKEN.*HF_HUB_OFFLINE=1"),
    ]:
        with pytest.raises(UserError, match=message):
            function(spec, TrainConfig(**fields))


# --- rows of text ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(2, 20), st.booleans())
def test_rows_are_the_documents_in_order_without_the_tail(texts, max_length, insert_eos):
    line = [token for text in filter(None, texts) for token in [*TOKENIZER(text)["input_ids"], *[EOS] * insert_eos]]
    dataset = Dataset.from_dict({"text": texts})
    if len(line) < max_length:
        with pytest.raises(UserError, match=f"max_length={max_length}"):
            data.pretraining_rows(dataset, TOKENIZER, max_length, insert_eos)
        return
    rows, dropped = data.pretraining_rows(dataset, TOKENIZER, max_length, insert_eos)
    assert dropped == ({"empty": texts.count("")} if "" in texts else {})
    assert {len(ids) for ids in rows["input_ids"]} == {max_length}
    assert [token for ids in rows["input_ids"] for token in ids] == line[: len(line) - len(line) % max_length]
    assert rows["row"][:] == list(range(len(rows)))


def test_rows_run_on_across_the_batches_in_which_documents_are_tokenised(tmp_path):
    texts = [f"document {i}" for i in range(2500)]  # more than the 1,000 that are tokenised at once
    train, _ = data.load_documents(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), TrainConfig(eval_fraction=0.001))
    line = [token for text in train["text"] for token in [*TOKENIZER(text)["input_ids"], EOS]]
    for _ in range(2):  # the second time from the cache of the datasets library
        rows, _ = data.pretraining_rows(train, TOKENIZER, 64, True)
        assert [token for ids in rows["input_ids"] for token in ids] == line[: len(line) - len(line) % 64]


# --- batches ---

BLOCKS, ONE_BLOCK = (objectives.make(name, block_size=4, mask_token_id=0) for name in ("bd3lm", "mdlm"))
ROWS = [
    {"input_ids": [1, 2, 3], "turn": [0, 1, 1], "row": 7},
    {"input_ids": [4, 5, 6, 7, 8], "turn": [0, 0, 1, 1, 1], "row": 9},
]


def test_rows_of_text_are_all_maskable_and_need_no_padding():
    batch = data.DiffusionCollator(ONE_BLOCK, EOS)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    streams = batch["streams"]
    assert streams.noised_ids_BT.tolist() == [[1, 2, 3], [4, 5, 6]] and streams.is_maskable_BT.all() and streams.noised.valid.all()
    assert set(batch) == {"streams", "tokens"} and batch["tokens"] == 6


def test_a_block_is_filled_with_maskable_ends_and_the_rest_is_padding():
    streams = data.DiffusionCollator(BLOCKS, EOS, "block")(ROWS)["streams"]
    assert streams.noised_ids_BT[0, :4].tolist() == [1, 2, 3, EOS] and streams.noised_ids_BT[1].tolist() == [4, 5, 6, 7, 8, EOS, EOS, EOS]
    assert streams.is_maskable_BT.long().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert streams.is_fill_BT.long().tolist() == [[0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert streams.noised.valid.tolist() == [[True] * 4 + [False] * 4, [True] * 8]


def test_a_canvas_is_filled_to_the_longest_row_or_further():
    streams = data.DiffusionCollator(ONE_BLOCK, EOS, "batch")(ROWS)["streams"]
    assert streams.noised_ids_BT.tolist() == [[1, 2, 3, EOS, EOS], [4, 5, 6, 7, 8]] and streams.noised.valid.all()
    wider = streams.extended(7, EOS)
    assert wider.noised_ids_BT[:, 5:].tolist() == [[EOS, EOS]] * 2 and wider.is_maskable_BT[:, 5:].all() and wider.is_fill_BT[:, 5:].all()
    assert wider.noised.position.tolist() == [list(range(7))] and wider.key != streams.key


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.sampled_from([None, "block", "batch"]))
def test_every_row_keeps_its_tokens_and_padding_is_never_scored(lengths, fill_to):
    rows = [{"input_ids": list(range(1, length + 1))} for length in lengths]
    streams = data.DiffusionCollator(BLOCKS if fill_to == "block" else ONE_BLOCK, EOS, fill_to)(rows)["streams"]
    valid = streams.noised.valid.expand(len(rows), -1)
    assert not (streams.is_maskable_BT & ~valid).any()
    own = valid & ~streams.is_fill_BT
    assert [ids[kept].tolist() for ids, kept in zip(streams.noised_ids_BT, own, strict=True)] == [row["input_ids"] for row in rows]
    assert (streams.noised_ids_BT[streams.is_fill_BT] == EOS).all() and streams.is_maskable_BT[own].all()
    if fill_to == "block":
        assert not (valid.sum(1) % 4).any()


def test_row_numbers_go_through():
    assert data.DiffusionCollator(ONE_BLOCK, EOS)(ROWS)["row"].tolist() == [7, 9]


def test_a_fill_of_blocks_without_blocks_is_refused():
    with pytest.raises(UserError, match="needs an objective with blocks"):
        data.DiffusionCollator(ONE_BLOCK, EOS, "block")


def test_a_digest_stands_for_the_rows_and_their_number():
    def rows(texts, length=4):
        return data.pretraining_rows(Dataset.from_dict({"text": texts}), TOKENIZER, length, True)[0]

    first = data.digest(rows(TEXTS))
    assert data.digest(rows(list(TEXTS))) == first
    others = (rows([*TEXTS[:-1], "unicode"]), rows(TEXTS[::-1]), rows(TEXTS, 5), rows(TEXTS + TEXTS), rows(TEXTS).select([]))
    assert len({first, *map(data.digest, others)}) == 6
