"""Suites: the files, what they resolve to, and a run of one."""

import dataclasses
import json

import families
import pytest
from PIL import Image

from a2d_core import checkpoints as model_files
from a2d_core import report, sampling, suites, tasks
from a2d_core.config import OBJECTIVES, EvaluateConfig, SampleConfig, UserError
from a2d_core.stages import evaluate

PUBLISHED = {
    "bd3lm": {
        "GSM8K, 0 shots": 46.3, "GSM8K, 5 shots": 46.3, "BBH": 26.6, "MATH": 12.9, "MMLU": 39.1, "MMLU-Pro": 13.8, "HellaSwag": 39.3,
        "HumanEval": 46.3, "MBPP": 38.2,
    },
    "mdlm": {
        "GSM8K, 0 shots": 29.3, "GSM8K, 5 shots": 29.3, "BBH": 26.7, "MATH": 8.7, "MMLU": 40.0, "MMLU-Pro": 17.3, "HellaSwag": 42.1,
        "HumanEval": 30.5, "MBPP": 29.2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    source = families.save_source(tmp_path_factory.mktemp("source"), layers=1, max_position_embeddings=2048)
    return families.convert_both(source, tmp_path_factory.mktemp("converted"))


def test_every_suite_reads_for_both_objectives_and_says_what_it_is_for():
    assert {"tiny", "warmup", "published", "code"} == set(suites.names())
    for name in suites.names():
        for objective in OBJECTIVES:
            suite = suites.read(name, objective)
            assert suite.summary
            parts = suites.parts(EvaluateConfig(suite=name), SampleConfig(), objective)
            assert {entry.name for part in parts for entry in part.entries} == {entry.name for entry in suite.entries}


def test_every_task_of_a_suite_is_known():
    names = {entry.task for name in suites.names() for entry in suites.read(name, "mdlm").entries}
    manager = tasks._manager(EvaluateConfig(tasks=tuple(names)))
    assert names <= set(manager.task_index)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_published_scores_are_those_of_the_table_with_their_source(objective):
    entries = suites.read("published", objective).entries
    assert {entry.name: entry.published for entry in entries} == pytest.approx({k: v / 100 for k, v in PUBLISHED[objective].items()})
    assert all("ZHZisZZ/dllm" in entry.source for entry in entries)


def test_the_published_sampler_reveals_one_token_at_a_time_whatever_the_recipe_says():
    recipe = SampleConfig(threshold=0.5, temperature=1.0, batch_size=3)
    for objective, block in (("mdlm", 256), ("bd3lm", None)):
        parts = suites.parts(EvaluateConfig(suite="published", limit=7), recipe, objective)
        samplers = {entry.name: part.sample for part in parts for entry in part.entries}
        assert samplers["BBH"] == SampleConfig(max_new_tokens=256, block_size=block, batch_size=3)
        assert samplers["MMLU"].max_new_tokens == 3
        assert {part.evaluate.limit for part in parts} == {7}
        assert {e.name: p.evaluate.num_fewshot for p in parts for e in p.entries if "GSM8K" in e.name} == {
            "GSM8K, 0 shots": 0, "GSM8K, 5 shots": 5,
        }  # fmt: skip
        assert {part.generation["max_gen_toks"] for part in parts} == {3, 256}


def test_entries_with_equal_settings_share_a_call(tmp_path):
    (tmp_path / "mine.toml").write_text(
        '# Mine.\n[defaults]\nnum_fewshot = 1\n[[entries]]\ntask = "words_sort"\n[[entries]]\ntask = "words_last"\n'
        '[[entries]]\nname = "sorted, sampled"\ntask = "words_sort"\nsample = { temperature = 0.5 }\n'
    )
    parts = suites.parts(EvaluateConfig(suite=str(tmp_path / "mine.toml")), SampleConfig(threshold=0.9), "mdlm")
    assert [part.evaluate.tasks for part in parts] == [("words_sort", "words_last"), ("words_sort",)]
    assert [part.sample for part in parts] == [SampleConfig(threshold=0.9), SampleConfig(temperature=0.5)]
    assert [part.generation for part in parts] == [{}, {}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[entries]]\ntask = "a"\nfewshot = 3', r"unknown field 'bad.entries\[0\].fewshot': did you mean 'num_fewshot'"),
        ('[[entries]]\ntask = "a"\nsample = { treshold = 1 }', "unknown field .*treshold"),
        ('[[entries]]\ntask = "a"\n[[entries]]\ntask = "a"', "two entries are called 'a'"),
        ('[[entries]]\nname = "a"', "names no task"),
        ('[[entry]]\ntask = "a"', "unknown table or field 'entry'"),
        ('[[entries]]\ntask = "a"\npublished = { ar = 1.0 }', "has scores for mdlm, bd3lm, not ar"),
        ("entries = [", "bad.toml"),
    ],
)
def test_a_mistake_in_a_suite_is_told(text, message, tmp_path):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        suites.read(str(tmp_path / "bad.toml"), "mdlm")


def test_an_unknown_suite_is_refused_with_a_near_one():
    with pytest.raises(UserError, match="unknown suite 'publishd': did you mean 'published'"):
        suites.read("publishd", "mdlm")


# --- a run ---


SUITE = """# For the tests.
source = "a paper"
[[entries]]
name = "plain"
task = "words_sort"
[[entries]]
name = "with shots"
task = "words_sort"
metric = "exact_match"
num_fewshot = 2
sample = { max_new_tokens = 5 }
published = { mdlm = 0.4 }
note = "five tokens"
"""


@pytest.fixture(scope="module")
def output(checkpoints, tmp_path_factory):
    """The output of a suite with a frontier."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "mine.toml").write_text(SUITE)
    config = EvaluateConfig(
        suite=str(folder / "mine.toml"), limit=3, text_dataset=None, frontier=("steps_per_block=1,2", "threshold=0.5"), num_fewshot=0
    )
    champion = {"words_sort 2-shot/exact_match": 0.25}
    evaluate.run(config, SampleConfig(threshold=0.9), checkpoints["mdlm"], folder / "out", seed=1, champion=champion)
    return folder / "out"


def read(output, name):
    return json.loads((output / name).read_text())


def test_a_task_with_two_settings_has_two_rows_and_the_published_score_stands_beside_ours(output):
    rows = read(output, "results.json")["tasks"]
    assert [(r["task"], r["entry"], r["num_fewshot"], r["published"], r["champion"]) for r in rows] == [
        ("words_sort 0-shot", "plain", 0, None, None), ("words_sort 2-shot", "with shots", 2, 0.4, 0.25),
    ]  # fmt: skip
    assert [row["independent"] for row in rows] == [3, 3]
    head, *cells = report.task_table(rows).head, *report.task_table(rows).rows
    assert dict(zip(head, cells[1], strict=True))["vs published"] == f"{rows[1]['value'] - 0.4:+.3f}"
    assert dict(zip(head, cells[0], strict=True))["vs published"] == "–"


def test_an_entrys_length_wins_over_the_tasks_own(output):
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["tokens"] <= 5 for row in rows[3:])
    assert all(1 <= row["nfe"] <= row["tokens"] + 1 for row in rows[3:])


def test_the_frontier_tries_one_setting_at_a_time(output):
    frontier = read(output, "results.json")["frontier"]
    assert [row["sampler"] for row in frontier] == [
        name for name in ("steps_per_block=1", "steps_per_block=2", "threshold=0.5") for _ in "ab"
    ]
    once = [row for row in frontier if row["sampler"] == "steps_per_block=1"]
    assert [row["evaluations"] for row in once] == [1, 1]  # a canvas is filled at once
    assert evaluate.samplers(["threshold=0.5,0.7"], SampleConfig(steps_per_block=4))["threshold=0.7"] == SampleConfig(threshold=0.7)
    with pytest.raises(UserError, match="'temperature=1' is none of threshold="):
        evaluate.samplers(["temperature=1"], SampleConfig())


def test_the_record_says_what_a_number_depends_on(output, checkpoints):
    record = read(output, "evaluation.json")
    assert record["seed"] == 1
    assert record["weights"]["model"] == model_files.digest(checkpoints["mdlm"])
    assert {"torch", "transformers", "lm_eval", "python"} <= set(record["versions"])
    assert [part["sample"]["max_new_tokens"] for part in record["parts"]] == [128, 5]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert record["evaluations"] == sum(row["nfe"] for row in samples)
    assert record["seconds"] > 0


def test_the_page_and_the_card_have_the_same_content(output):
    page, blocks = (output / "report.html").read_text(), report.read(output)
    assert page == report.html("Evaluation", blocks)
    for word in ("with shots", "five tokens", "Published: a paper", "95% interval", "vs champion", "steps_per_block=2", "Worst samples"):
        assert word in page
    assert Image.open(output / "frontier.png").size[0] > 500


def test_what_a_model_writes_is_only_ever_text(output):
    blocks = [report.Text("<script>alert(1)</script>"), report.Table(("a",), (("<b>",),))]
    page = report.html("x", blocks)
    assert "<script>" not in page and "<b>" not in page


def test_the_interval_of_a_share_stays_between_zero_and_one_and_is_wide_where_all_are_right():
    assert report.interval(1.0, 0.0, 20) == pytest.approx((0.839, 1.0), abs=1e-3)
    assert report.interval(0.0, 0.0, 20) == pytest.approx((0.0, 0.161), abs=1e-3)
    assert report.interval(0.5, 0.05, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert report.interval(0.9, (0.9 * 0.1 / 19) ** 0.5, 20)[1] < 1
    assert report.interval(7.0, 1.0) == pytest.approx((5.04, 8.96), abs=1e-2)
    assert report.interval(7.0, None) is None


def test_the_worst_and_the_best_samples_are_those_with_the_lowest_and_highest_scores():
    def sample(score, nfe, failed=None):
        return {
            "task": "t",
            "prompt": f"p{score}-{nfe}",
            "target": "x",
            "answer": "y",
            "filter": "none",
            "scores": {"other": 1 - score, "m": score},
            "nfe": nfe,
            "failed": failed,
        }

    samples = [sample(score, nfe) for score in (0.0, 1.0) for nfe in range(1, 8)] + [sample(0.5, 1, failed="ValueError: no")]
    tasks = [{"metric": "m", "is_main": True, "higher_is_better": None}, {"metric": "other", "is_main": False, "higher_is_better": None}]
    failures, told, table, _, worst, _, best = [*report._failures(samples), *report._samples(samples, tasks)]
    assert failures.text == "Failed samples"
    assert told.text.startswith("1 of 15")
    assert table.rows == (("t", "1", "ValueError: no"),)
    assert [row[1] for row in worst.rows] == ["p0.5-1", "p0.0-7", "p0.0-6", "p0.0-5", "p0.0-4"]
    assert [row[1] for row in best.rows] == [f"p1.0-{nfe}" for nfe in range(1, 6)]
    tasks[0]["higher_is_better"] = False
    _, turned, _, _ = report._samples(samples[:-1], tasks)
    assert [row[4] for row in turned.rows] == ["1"] * 5


def test_an_answer_is_shown_once_though_several_filters_look_at_it():
    row = {"task": "t", "doc_id": 0, "prompt": "p", "target": "x", "answer": "y", "nfe": 1, "failed": None, "scores": {"m": 1.0}}
    samples = [row | {"filter": "strict"}, row | {"filter": "flexible"}]
    tasks = [{"metric": f"m/{name}", "is_main": name == "flexible", "higher_is_better": True} for name in ("strict", "flexible")]
    _, shown = report._samples(samples, tasks)
    assert len(shown.rows) == 1


# --- what the suites run ---


def let_answer(monkeypatch, answer):
    """Put what `answer` makes of a prompt's text in the place of the sampler."""

    def stream(model, prompts, *_, **__):
        for row, prompt in enumerate(prompts):
            text = answer(model.tokenizer.decode(prompt))
            yield sampling.Event(row, 1, generation=sampling.Generation(model.tokenizer(text)["input_ids"], 1, True, text, 0.0))

    monkeypatch.setattr(sampling, "stream", stream)


def test_generative_hellaswag_counts_the_first_letter_of_an_ending(checkpoints, tmp_path, monkeypatch):
    kitchen = {
        "activity_label": "Cooking",
        "ctx_a": "A man is in a kitchen.",
        "ctx_b": "he",
        "endings": ["cuts [x] it.", "flies.", "c", "d"],
    }
    for split in ("train", "validation"):
        rows = [{**kitchen, "ind": i, "label": str(i)} for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = iter(["A.", "the 2nd: B", "C", "z"])

    let_answer(monkeypatch, lambda prompt: next(answers))
    config = EvaluateConfig(tasks=("hellaswag_gen",), datasets={"hellaswag_gen": str(tmp_path)}, text_dataset=None, num_fewshot=0)
    evaluate.run(config, SampleConfig(), checkpoints["mdlm"], tmp_path / "out")
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert (
        "Cooking: A man is in a kitchen. He\nQuestion: Which ending makes the most sense?\nA. cuts it.\nB. flies.\n" in samples[0]["prompt"]
    )
    assert [(s["target"], s["answer"]) for s in samples] == [("a", "a"), ("b", "d"), ("c", "c"), ("d", "[invalid]")]


def test_programs_of_humaneval_and_mbpp_run_in_the_sandbox_and_only_with_leave(checkpoints, tmp_path, monkeypatch):
    add = {"prompt": "def add(a, b):\n", "entry_point": "add", "test": "def check(f):\n    assert f(2, 3) == 5", "task_id": "0"}
    add |= {"canonical_solution": "    return a + b"}
    two = {"task_id": 1, "text": "two", "code": "x = 2", "test_list": ["assert two() == 2"] * 3}
    for name, row in (("humaneval", add), ("mbpp", two)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(2)))
    names = ("humaneval_instruct", "mbpp_instruct")
    folders = {name: str(tmp_path / name.partition("_")[0]) for name in names}
    config = EvaluateConfig(tasks=names, datasets=folders, text_dataset=None, num_fewshot=0, code_isolation="process")
    with pytest.raises(UserError, match="runs code that the model writes"):
        evaluate.run(config, SampleConfig(), checkpoints["mdlm"], tmp_path / "out")
    adding = iter(["    return a + b\n```", "    return a - b\n```"])
    twos = iter(["\ndef two(): return 2\n```", "\nimport os\nos._exit(0)\n```"])  # a word right behind ``` is a language to lm-eval

    let_answer(monkeypatch, lambda prompt: next(adding if "add(" in prompt else twos))
    config = dataclasses.replace(config, code_execution=True)
    rows = evaluate.run(config, SampleConfig(), checkpoints["mdlm"], tmp_path / "out")["tasks"]
    found = [(row["task"], row["metric"], row["value"], row["documents"]) for row in rows]
    assert found == [("humaneval_instruct", "pass@1/create_test", 0.5, 2), ("mbpp_instruct", "pass_at_1/extract_code", 0.5, 2)]
