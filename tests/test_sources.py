"""Several sources, filters, samples, known data sets, the cache of tokens, packed rows, and streams."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import datasets
import families
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from a2d_core import data, embedded, presets
from a2d_core.config import EvaluateConfig, Source, TrainConfig, UserError, parse_sources
from a2d_core.data import text
from a2d_core.data.readers import READERS
from a2d_core.stages import preflight, pretrain

TOKENIZER = embedded.build_tokenizer()
EOS = TOKENIZER.eos_token_id
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
STREAM = TrainConfig(streaming=True, max_steps=1, max_length=16, max_eval_rows=4, shuffle_buffer=8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path, name, count, **columns):
    return write(path / f"{name}.jsonl", [{"text": f"{name}{i}", **{k: v[i % len(v)] for k, v in columns.items()}} for i in range(count)])


# --- the grammar ---


def test_a_spec_names_sources_with_samples_filters_config_and_split():
    assert parse_sources("embedded:corpus") == (Source("embedded:corpus"),)
    assert parse_sources(" a/b-1.5[train:10,eval:2] + ./c.jsonl[config:main, split:dev,lang:c++,url:http://x] ") == (
        Source("a/b-1.5", train=10, test=2),
        Source("./c.jsonl", config="main", split="dev", filters=(("lang", "c++"), ("url", "http://x"))),
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "not a name"),
        ("a++b", "'' is not a name"),
        ("a[train:5", r"'a\[train:5' is not a name"),
        ("a[train:5]b", "not a name"),
        ("[train:5]", "not a name"),
        ("a[]", "'' in the brackets of 'a' is not key:value"),
        ("a[python]", "'python' .* is not key:value"),
        ("a[train:many]", "train:many of 'a' is not a number of rows"),
        ("a[test:0]", "test:0 of 'a' is not a number of rows"),
        ("a[test:1,eval:2]", "'test' stands twice"),
    ],
)
def test_a_malformed_spec_is_refused_with_an_example_before_anything_is_read(spec, message):
    with pytest.raises(UserError, match=rf"{message}.*owner/name\[train:10000,test:1000\]"):
        TrainConfig(dataset=spec)
    with pytest.raises(UserError, match=message):
        EvaluateConfig(text_dataset=spec)


# --- several sources ---


def test_rows_of_each_source_stand_evenly_over_the_whole(tmp_path):
    spec = "+".join(texts(tmp_path, name, count) for name, count in (("a", 40), ("b", 120), ("c", 4)))
    train, held_out = data.load_documents(spec, TrainConfig(eval_fraction=0.25))
    names = [row[0] for row in train["text"]]
    assert Counter(names) == {"a": 30, "b": 90, "c": 3}
    assert Counter(row[0] for row in held_out["text"]) == {"a": 10, "b": 30, "c": 1}
    for end in range(len(names)):
        for name, count in Counter(names).items():
            assert abs(names[:end].count(name) - count * end / len(names)) <= 1
    for name in "abc":  # in the order of the file
        numbers = [int(row[1:]) for row in train["text"] if row[0] == name]
        assert numbers == sorted(numbers)


def test_a_sources_held_out_rows_are_the_same_alone_and_among_others_sampled_or_not(tmp_path):
    a, b = texts(tmp_path, "a", 30), texts(tmp_path, "b", 30)
    alone = data.load_documents(a, TrainConfig(eval_fraction=0.3), seed=5)
    among = data.load_documents(f"{b}[train:3]+{a}", TrainConfig(eval_fraction=0.3), seed=5)
    sampled = data.load_documents(f"{a}[train:20,test:4]", TrainConfig(eval_fraction=0.3), seed=5)
    for one, mixed, drawn in zip(alone, among, sampled, strict=True):
        assert [row for row in mixed["text"] if row[0] == "a"] == one["text"][:]
        assert set(drawn["text"]) < set(one["text"])
    assert (len(sampled[0]), len(sampled[1])) == (20, 4)


def test_a_sample_depends_on_the_seed_and_a_part_with_fewer_rows_is_refused(tmp_path):
    path = texts(tmp_path, "a", 100)
    one, again, other = (data.load_documents(f"{path}[train:9]", TrainConfig(), seed=seed)[0]["text"][:] for seed in (1, 1, 2))
    assert one == again != other
    for wanted, message in (("train:96", "asks for 96 rows, and that part has 95"), ("test:6", "6 rows, .* has 5: raise eval_fraction")):
        with pytest.raises(UserError, match=message):
            data.load_documents(f"{path}[{wanted}]", TrainConfig())
    train, held_out = data.load_conversations("embedded:tasks[train:7,test:3]", TrainConfig())
    assert (len(train), len(held_out)) == (7, 3)


def test_filters_keep_the_rows_with_all_the_values(tmp_path):
    path = texts(tmp_path, "a", 60, lang=["en", "de", "fr"], good=[True, False], n=[1, 2, 3, 4, 5])
    for wanted, rows in (("lang:en", 20), ("lang:en,good:true", 10), ("n:3", 12)):
        assert sum(map(len, data.load_documents(f"{path}[{wanted}]", TrainConfig(num_workers=2)))) == rows
    with pytest.raises(UserError, match=r"no column 'language' \(\[language:en\]\): its columns are text, lang, good, n"):
        data.load_documents(f"{path}[language:en]", TrainConfig())
    with pytest.raises(UserError, match=r"no row .* passes \[lang:it\]: the commonest in 'lang' are 'en' \(20 rows\), 'de' \(20 rows\)"):
        data.load_documents(f"{path}[lang:it]", TrainConfig())


def test_text_and_conversations_do_not_mix_in_one_stage(tmp_path):
    documents, talks = texts(tmp_path, "a", 4), write(tmp_path / "talks.jsonl", [{"messages": TALK}] * 4)
    alpaca = write(tmp_path / "alpaca.jsonl", [{"instruction": "hi", "input": "", "output": "yo", "text": "hi yo"}] * 4)
    for path in (talks, alpaca):
        with pytest.raises(UserError, match=r"holds conversations .* do not mix"):
            data.load_documents(f"{documents}+{path}", TrainConfig())
    assert len(data.load_documents(f"{documents}+{alpaca}", TrainConfig(text_field="text"))[0]) == 6
    shakespeare = write(tmp_path / "tiny-shakespeare.jsonl", [{"Text": "to be"}] * 4)
    with pytest.raises(UserError, match=r"holds text, .* do not mix"):
        data.load_conversations(f"{talks}+{shakespeare}", TrainConfig())


# --- known data sets ---

ROWS = {
    "tiny-shakespeare": {"Text": "to be"},
    "openwebtext": {"text": "to be"},
    "alpaca": {"instruction": "hi", "input": "", "output": "yo", "text": "Below is an instruction"},
    "tulu-3-sft-mixture": {"id": "1", "messages": TALK, "source": "s"},
    "smoltalk": {"messages": TALK, "source": "s"},
    "opc-sft-stage1": {"instruction": "hi", "output": "yo", "tag": "t"},
    "opc-sft-stage2": {"seq_id": 1, "instruction": "hi", "output": "yo", "code": "c", "entry_point": "e", "testcase": ["t"]},
    "gsm8k": {"question": "hi", "answer": "yo"},
}


def snapshot(folder, row, configs=("default",), splits=("train",), rows=4):
    """A directory as the Hub's are: files for each configuration and split, and a card that lists them."""
    card = ["---", "configs:"]
    for config in configs:
        card += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            write(folder / config / f"{split}.jsonl", [{**row, "is": f"{config} {split} {i}"} for i in range(rows)])
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---"]))
    return str(folder)


def test_every_known_data_set_is_read_by_its_schema(tmp_path):
    assert set(ROWS) == set(READERS)
    for name, row in ROWS.items():
        reader = READERS[name]
        splits = ("train", reader.eval_split) if reader.eval_split else ("train",)
        path = snapshot(tmp_path / name, row, reader.configs or ("default",), splits)
        load = data.load_documents if reader.text else data.load_conversations
        train, held_out = load(path, TrainConfig())
        assert train[0] == held_out[0] == ({"text": "to be"} if reader.text else {"messages": TALK}), name
        assert len(train) + len(held_out) == 4 * len(splits) * max(1, len(reader.configs)), name
        if reader.eval_split:
            assert len(held_out) == 4, name


def test_a_copy_without_the_hubs_configurations_and_splits_is_read_too(tmp_path):
    for suffix in ("", ".jsonl"):
        path = write(tmp_path / f"gsm8k{suffix}" / "train.jsonl" if not suffix else tmp_path / "gsm8k.jsonl", [ROWS["gsm8k"]] * 4)
        train, held_out = data.load_conversations(path if suffix else str(tmp_path / "gsm8k"), TrainConfig())
        assert (len(train), len(held_out), train[0]) == (3, 1, {"messages": TALK})
    saved = tmp_path / "saved" / "smoltalk"
    part = Dataset.from_list([ROWS["smoltalk"]] * 4)
    DatasetDict({"train": part, "test": part.select(range(2))}).save_to_disk(saved)
    assert [len(part) for part in data.load_conversations(str(saved), TrainConfig())] == [4, 2]


def test_what_the_user_names_wins_over_a_known_data_set(tmp_path):
    row = {**ROWS["gsm8k"], "short": "42", "note": "a note"}
    path = snapshot(tmp_path / "gsm8k", row, ("main", "socratic"), ("train", "test", "dev"))
    train, _ = data.load_conversations(path, TrainConfig(prompt_field="question", response_field="short"))
    assert train[0]["messages"][1]["content"] == "42"
    fields = {"text_field": "is"}
    for spec, config, expected in (
        (path, TrainConfig(**fields), ("main train", "main test")),
        (path, TrainConfig(**fields, eval_split="dev"), ("main train", "main dev")),
        (path, TrainConfig(**fields, dataset_config="socratic"), ("socratic train", "socratic test")),
        (f"{path}[config:socratic,split:dev]", TrainConfig(**fields, dataset_config="main"), ("socratic dev", "socratic test")),
    ):
        parts = data.load_documents(spec, config)
        assert tuple({row.rsplit(" ", 1)[0] for row in part["text"]} for part in parts) == tuple({part} for part in expected)


def test_the_language_of_opc_sft_is_looked_for_in_the_answer(tmp_path):
    folder = tmp_path / "opc-sft-stage2"
    snapshot(folder, ROWS["opc-sft-stage2"], READERS["opc-sft-stage2"].configs)
    write(folder / "evol_instruct" / "train.jsonl", [{**ROWS["opc-sft-stage2"], "output": f"```{lang}"} for lang in ("python", "go") * 3])
    train, held_out = data.load_conversations(f"{folder}[lang:python]", TrainConfig())
    assert {row["messages"][1]["content"] for part in (train, held_out) for row in part} == {"```python"}
    assert len(train) + len(held_out) == 3
    with pytest.raises(UserError, match="the commonest in 'output' are 'yo'"):
        data.load_conversations(f"{folder}[lang:rust]", TrainConfig())


def test_evaluation_reads_the_same_part_of_every_source_as_pretraining_holds_out():
    def recipe(**overrides):
        return presets.resolve(presets.read("smoke"), "bd3lm", [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()])

    recipe(pretrain__dataset="a+b[train:5]", evaluate__text_dataset="b")
    recipe(pretrain__dataset="a[lang:en]+b", evaluate__text_dataset="a[lang:en]")
    for mistake, message in (
        ({"pretrain__dataset": "a+b", "evaluate__text_dataset": "b", "evaluate__text_fraction": 0.5}, "text_fraction=0.5 differs"),
        ({"pretrain__dataset": "a[lang:en]", "evaluate__text_dataset": "a"}, "another config, split or filter"),
        ({"pretrain__dataset": "a", "pretrain__streaming": "true", "evaluate__text_dataset": "a"}, "streams 'a'"),
    ):
        with pytest.raises(UserError, match=message):
            recipe(**mistake)


# --- rows ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab ", max_size=12), min_size=1, max_size=12), st.integers(2, 9), st.booleans())
def test_packed_rows_are_the_same_rows_with_their_documents_numbered(pieces, max_length, insert_eos):
    line = [(number, token) for number, ids in enumerate(text.tokenised(pieces, TOKENIZER, insert_eos)) for token in ids]
    if len(line) < max_length:
        return
    documents = Dataset.from_dict({"text": pieces})
    plain, _ = data.pretraining_rows(documents, TOKENIZER, max_length, insert_eos)
    packed, _ = data.pretraining_rows(documents, TOKENIZER, max_length, insert_eos, pack=True)
    assert plain.column_names == ["input_ids", "row"] and packed.column_names == ["input_ids", "document", "row"]
    assert plain["input_ids"][:] == packed["input_ids"][:]
    for row in packed:
        start = row["row"] * max_length
        numbers = [number for number, _ in line[start : start + max_length]]
        assert row["document"][0] == 0
        for (number, following), (document, next_document) in zip(pairwise(numbers), pairwise(row["document"]), strict=True):
            assert next_document - document == int(following != number)


def test_empty_documents_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": value} for value in ("one", "", None, "two")])
    rows, dropped = data.pretraining_rows(Dataset.from_json(path), TOKENIZER, 8, insert_eos=True)
    assert dropped == {"empty": 2}
    assert TOKENIZER.decode(rows[0]["input_ids"]) == "one<|end|>two<|end|>"


def test_several_processes_make_the_same_rows(tmp_path):
    path = texts(tmp_path, "a", 300)
    one, two = (data.pretraining_rows(Dataset.from_json(path), TOKENIZER, 16, True, num_workers=n)[0] for n in (1, 2))
    assert one.to_dict() == two.to_dict()
    one, two = (Dataset.from_json(path, cache_dir=str(tmp_path / str(n))) for n in (1, 2))  # and from no common cache
    one, two = (data.pretraining_rows(part, TOKENIZER, 16, True, num_workers=n)[0] for n, part in ((1, one), (2, two)))
    assert one.to_dict() == two.to_dict()


PROGRAM = """
import sys
from a2d_core import data, embedded
from a2d_core.config import TrainConfig
from a2d_core.data import text

text.tokenised = None  # must not be called
for part in data.load_documents(sys.argv[1], TrainConfig()):
    for max_length in (16, 32):
        rows, _ = data.pretraining_rows(part, embedded.build_tokenizer(), max_length, True)
        print(max_length, rows._fingerprint)
"""


def test_another_process_finds_the_tokens_in_the_cache(tmp_path):
    path, tokenizer = texts(tmp_path, "a", 600, lang=["en", "de"]), embedded.build_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # which it remembers
    spec = f"{path}[train:150,lang:en]+{path}[lang:de]"
    parts = data.load_documents(spec, TrainConfig(num_workers=2))
    made = {f"16 {data.pretraining_rows(part, tokenizer, 16, True, num_workers=2)[0]._fingerprint}" for part in parts}
    environment = {**os.environ, "HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE}
    command = [sys.executable, "-c", PROGRAM, spec]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert made < set(done.stdout.splitlines())  # rows of another length are cut from the same tokens


# --- streams ---


def rows_of(config, count, seed=0):
    stream, held_out = data.stream_rows(config, TOKENIZER, seed)
    return list(islice(stream, count)), held_out, stream


def shards(path, count=60):
    """Files of a directory, so that there are shards to shuffle."""
    for shard in range(4):
        write(path / f"{shard}.jsonl", [{"text": f"{i:06}", "lang": "en" if i % 2 else "de"} for i in range(shard, count, 4)])
    return str(path)


def documents_of(rows):
    line = [token for row in rows for token in row["input_ids"]]
    return TOKENIZER.decode(line).split(TOKENIZER.decode([EOS]))[:-1]


def test_a_stream_depends_on_the_seed_alone_and_its_rows_are_numbered(tmp_path):
    config = replace(STREAM, dataset=shards(tmp_path))
    (one, _, stream), (other, *_), (again, *_) = (rows_of(config, 80, seed) for seed in (0, 1, 0))
    assert one == again == list(islice(stream, 80)) != other
    assert [row["row"] for row in one] == list(range(80))
    assert {len(row["input_ids"]) for row in one} == {16}


def test_a_stream_goes_on_with_another_pass_in_another_order_and_never_shows_what_is_held_out(tmp_path):
    config = replace(STREAM, dataset=shards(tmp_path), max_length=14)
    rows, held_out, _ = rows_of(config, 200)  # a row is two documents of seven tokens
    held, seen = documents_of(held_out), documents_of(rows)
    assert len(held) == 8 and len(held_out) == 4 and held_out.column_names == ["input_ids", "row"]
    passes = [seen[start : start + 52] for start in range(0, 312, 52)]
    assert all(set(one) | set(held) == {f"{i:06}" for i in range(60)} and len(set(one)) == 52 for one in passes)
    assert passes[0] != passes[1] != sorted(passes[1])


def test_a_stream_packs_filters_counts_what_is_empty_and_takes_an_eval_split(tmp_path):
    for split, names in (("train", ("a", "", "b")), ("test", ("c",))):
        write(tmp_path / f"{split}.jsonl", [{"text": name * 3, "lang": lang} for lang in ("en", "de") for name in names * 40])
    config = replace(STREAM, dataset=f"{tmp_path}[lang:en]", eval_split="test", pack=True)
    rows, held_out, stream = rows_of(config, 10)
    assert set(documents_of(held_out)) <= {"ccc", "c", "cc", ""} and held_out.column_names == ["input_ids", "document", "row"]
    assert set(rows[0]) == {"input_ids", "document", "row"} and rows[0]["document"] == [i // 4 for i in range(16)]
    assert stream.dropped["empty"] > 0


def test_sources_of_a_stream_are_mixed_in_proportion_to_what_is_taken_of_them(tmp_path):
    for name, count in (("a", 400), ("b", 400)):
        texts(tmp_path, name, count)
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    with pytest.raises(UserError, match=rf"'{b}' has is not known .* {b}\[train:N\]"):
        data.stream_rows(replace(STREAM, dataset=f"{a}[train:10]+{b}"), TOKENIZER, 0)
    rows, *_ = rows_of(replace(STREAM, dataset=f"{a}[train:300]+{b}[train:100]", shuffle_buffer=1), 40)
    count = Counter(name[0] for name in documents_of(rows))
    assert 2 < count["a"] / count["b"] < 4.5


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with pytest.raises(UserError, match="streaming=true needs max_steps"):
        TrainConfig(streaming=True)
    path = write(tmp_path / "a.jsonl", [{"text": "one"}] * 20)
    talks = write(tmp_path / "b.jsonl", [{"messages": TALK}] * 4)
    with pytest.raises(UserError, match="reads text alone, for pretrain"):
        data.load_conversations(talks, STREAM)
    with pytest.raises(UserError, match="holds conversations"):
        data.stream_rows(replace(STREAM, dataset=talks), TOKENIZER, 0)
    with pytest.raises(UserError, match="does not make one row of max_length=100"):
        data.stream_rows(replace(STREAM, dataset=path, max_length=100), TOKENIZER, 0)
    with pytest.raises(UserError, match=r"does not make one row .* beside its held-out"):
        rows_of(replace(STREAM, dataset=path), 1)  # every document has the text of one that is held out
    overrides = ["pretrain.streaming=true", f"pretrain.dataset={talks}", "evaluate.text_dataset=none"]
    with pytest.raises(UserError, match="holds conversations"):
        preflight.inputs(presets.resolve(presets.read("smoke"), "bd3lm", overrides))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    families.byte_model("bd3lm", block_size=8).save(folder)
    return folder


def weights(folder):
    from a2d_core import models

    return models.load(folder / "checkpoint-final").network.state_dict()


@pytest.fixture
def streamed(tmp_path):
    fields = {"max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "precision": "float32", "log_every": 1}
    return replace(STREAM, dataset=shards(tmp_path / "text"), save_every=3.0, eval_every=3.0, keep_checkpoints=3, **fields)


def test_a_resumed_stream_equals_an_uninterrupted_one(streamed, checkpoint, tmp_path):
    whole = pretrain.run(streamed, checkpoint, tmp_path / "whole", seed=1)
    assert whole["dropped"] == {} and "train_rows" not in whole
    pretrain.run(streamed, checkpoint, tmp_path / "resumed", seed=1, resume_from=str(tmp_path / "whole" / "checkpoint-3"))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_share_a_stream_as_one_reads_it_with_the_doubled_batch(streamed, checkpoint, tmp_path):
    pretrain.run(streamed, checkpoint, tmp_path / "two", processes=2)
    pretrain.run(replace(streamed, batch_size=4), checkpoint, tmp_path / "one")
    histories = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("two", "one")]
    for key in ("loss", "eval_nelbo"):
        a, b = ([row[key] for row in history if key in row] for history in histories)
        assert a == pytest.approx(b, rel=1e-5), key
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
