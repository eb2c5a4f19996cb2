"""The evaluate stage, from the names of tasks to the table."""

import json
import math
import os
import shutil
import statistics
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from a2d_core import embedded, models, perplexity, sampling, tasks
from a2d_core.config import EvaluateConfig, SampleConfig, UserError
from a2d_core.sampling import Event, Generation
from a2d_core.scoring import Score, Scorer
from a2d_core.stages import evaluate, table

SAMPLE = SampleConfig(threshold=0.9)
SMALL = EvaluateConfig(limit=2, text_rows=3, text_length=32, nelbo_samples=2)
NO_TASKS = EvaluateConfig(tasks=(), text_rows=3, text_length=32, nelbo_samples=2)


def task_file(directory, **fields):
    """Write the file of a task; JSON is YAML too."""
    (directory / f"{fields['task']}.yaml").write_text(json.dumps({"output_type": "generate_until", "test_split": "test", **fields}))


# --- the whole stage ---


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_the_stage_scores_tasks_and_text_and_repeats_to_the_digit(objective, checkpoints, source, tmp_path):
    def run(name):
        directories = {"baseline_dir": checkpoints[objective], "source_dir": source}
        return evaluate.run(SMALL, SAMPLE, checkpoints[objective], tmp_path / name, seed=5, **directories)

    results = run("first")
    assert [row["task"] for row in results["tasks"]] == [*embedded.TASKS, "a2d_words"]
    for row in results["tasks"]:
        assert row["metric"] == "exact_match"
        assert row["value"] == row["baseline"]
        assert row["documents"] == (2 if row["task"] in embedded.TASKS else 10)
    assert set(results["questions"]) == {"a2d_words/exact_match", "text/nelbo"}  # of what stands for the tasks that were asked for
    text = results["text"]
    assert text["tokens"] == 3 * 31
    assert statistics.fmean(results["questions"]["text/nelbo"].values()) == pytest.approx(text["nelbo"])
    assert text["nelbo"] == pytest.approx(text["baseline_nelbo"])
    assert text["perplexity_bound"] == pytest.approx(math.exp(text["nelbo"]))
    assert text["stderr"] > 0
    assert text["ar_nll"] == pytest.approx(math.log(256), rel=0.2)
    assert json.loads((tmp_path / "first" / "results.json").read_text()) == results == run("second")
    full = json.loads((tmp_path / "first" / "lm_eval.json").read_text())
    assert len(full["samples"]["words_sort"]) == 2
    assert full["samples"]["words_sort"][0]["arguments"][0][0] == f"<|user|>Sort: {embedded.words()[1][0]}<|end|><|assistant|>"
    assert full["config"]["a2d"]["objective"] == objective
    assert (tmp_path / "first" / "lm_eval_baseline.json").exists()


def test_a_perfect_model_scores_one_on_every_held_out_word(checkpoints, tmp_path, monkeypatch):
    answers = {c["messages"][0]["content"]: c["messages"][1]["content"] for c in embedded.instructions("test")}
    budgets = set()

    def oracle(model, prompts, config, *, max_new_tokens, **_):
        budgets.update(max_new_tokens)
        for row, prompt in enumerate(prompts):
            answer = answers[model.tokenizer.decode(prompt).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")]
            yield Event(row, 1, generation=Generation(model.tokenizer(answer)["input_ids"], 1, True, answer, 0.0))

    monkeypatch.setattr(sampling, "stream", oracle)
    results = evaluate.run(EvaluateConfig(text_dataset=None), SAMPLE, checkpoints["mdlm"], tmp_path)
    assert results["text"] is None
    assert [(row["value"], row["stderr"], row["baseline"]) for row in results["tasks"]] == [(1.0, 0.0, None)] * 6
    assert [row["documents"] for row in results["tasks"]] == [200] * 5 + [1000]
    longest = max(len(answer) for answer in answers.values())
    assert all(budget > longest for budget in budgets)  # room for the end-of-sequence token


def test_the_group_is_the_mean_of_its_tasks_each_alike():
    rows = {task: {"sample_len": 10 * (i + 1), "exact_match,none": i / 4} for i, task in enumerate(embedded.TASKS)}
    assert tasks.load(EvaluateConfig())[0].aggregate(rows)["exact_match,none"] == pytest.approx(0.5)


def test_tasks_that_fail_on_the_same_words_are_no_more_certain_than_one():
    scores = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}
    known = {"filter": "none", "doc_hash": "", "prompt_hash": ""}
    samples = [{"doc": {"word": word}, "doc_id": i, "exact_match": score, **known} for i, (word, score) in enumerate(scores.items())]
    numbers = {"exact_match,none": 0.75, "exact_match_stderr,none": 0.25}
    results = {
        "results": {task: {**numbers, "sample_len": 4} for task in embedded.TASKS} | {"a2d_words": {**numbers, "sample_len": 20}},
        "group_subtasks": {"a2d_words": list(embedded.TASKS)},
        "samples": dict.fromkeys(embedded.TASKS, samples),
        "higher_is_better": {},
    }
    assert [row["stderr"] for row in table.rows_of(results, None)] == pytest.approx([0.25] * 6)


def test_few_shot_examples_are_training_words(checkpoints, tmp_path):
    evaluate.run(EvaluateConfig(tasks=("words_sort",), limit=4, num_fewshot=3, text_dataset=None), SAMPLE, checkpoints["mdlm"], tmp_path)
    samples = json.loads((tmp_path / "lm_eval.json").read_text())["samples"]["words_sort"]
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count("<|user|>Sort: ") == 4
        assert prompt.count("<|assistant|>") == 4
        shown = [turn.split("<|end|>")[0] for turn in prompt.split("<|user|>Sort: ")[1:-1]]
        assert not set(shown) & set(embedded.words()[1])


def test_choices_are_scored_by_likelihood(checkpoints, tmp_path):
    rows = [{"question": f"Q{i}", "choices": ["no", "yes"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task_file(
        tmp_path,
        task="yes_or_no",
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": str(tmp_path / "rows.json")}},
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    config = EvaluateConfig(tasks=("yes_or_no",), task_dirs=(str(tmp_path),), text_dataset=None, nelbo_samples=2)
    results = evaluate.run(config, SAMPLE, checkpoints["bd3lm"], tmp_path / "out")
    (row,) = results["tasks"]
    assert (row["metric"], row["documents"], row["chance"], row["higher_is_better"]) == ("acc", 4, None, True)
    assert 0 <= row["value"] <= 1


def test_a_sample_whose_metrics_raise_is_recorded_and_counted(checkpoints, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a", "answer": i} for i in range(4)]))
    (tmp_path / "score.py").write_text("def score(doc, results):\n    return {'inverse': 1 / doc['answer']}\n")
    (tmp_path / "some.yaml").write_text(
        f"task: some\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.json'}}}}\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: '{{{{answer}}}}'\n"
        f"process_results: !function score.score\ngeneration_kwargs: {{until: [], max_gen_toks: 4}}\n"
        f"metric_list: [{{metric: inverse, aggregation: mean, higher_is_better: true}}]\n"
    )
    config = EvaluateConfig(tasks=("some",), task_dirs=(str(tmp_path),), text_dataset=None)
    (row,) = evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path / "out")["tasks"]
    assert (row["documents"], row["failed"], row["value"]) == (3, 1, pytest.approx((1 + 1 / 2 + 1 / 3) / 3))
    samples = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["samples"]["some"]
    assert [sample["failed"] for sample in samples] == ["ZeroDivisionError: division by zero", None, None, None]
    with pytest.raises(UserError, match="every sample of task 'some' failed, the first with: ZeroDivisionError"):
        evaluate.run(replace(config, limit=1), SAMPLE, checkpoints["mdlm"], tmp_path / "out")


def test_a_sample_whose_likelihood_is_not_finite_is_no_part_of_the_mean(checkpoints, tmp_path, monkeypatch):
    rows = [{"question": f"Q{i}", "choices": ["yes", "no"], "answer": 0} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task_file(
        tmp_path, task="yes", dataset_path="json", dataset_kwargs={"data_files": {"test": str(tmp_path / "rows.json")}},
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip

    def score(self, questions, done=None):
        return [[Score(math.nan if i == 1 else -1.0 - j, 0.0, 1) for j in (0, 1)] for i in range(len(questions))]

    monkeypatch.setattr(Scorer, "score", score)
    config = EvaluateConfig(tasks=("yes",), task_dirs=(str(tmp_path),), text_dataset=None)
    (row,) = evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path / "out")["tasks"]
    assert (row["value"], row["documents"], row["failed"]) == (1.0, 2, 1)  # lm-eval takes the first of two that are -inf
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["failed"] for sample in samples] == [None, "the likelihood is not finite", None]


def test_two_processes_find_what_one_finds(checkpoints, tmp_path):
    rows = [{"question": f"Q{i}", "choices": ["no", "yes, indeed", "perhaps"], "answer": i % 3} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task_file(
        tmp_path, task="yes_or_no", dataset_path="json", dataset_kwargs={"data_files": {"test": str(tmp_path / "rows.json")}},
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "exact_match"}],
    )  # fmt: skip
    task_file(
        tmp_path, task="drawn", dataset_path="json", dataset_kwargs={"data_files": {"test": str(tmp_path / "rows.json")}},
        doc_to_text="{{question}}", doc_to_target="no", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0},
    )  # fmt: skip
    # One at a time: in other company a number is rounded in another way, and this network has no clear opinion.
    config = replace(SMALL, tasks=("yes_or_no", "drawn"), task_dirs=(str(tmp_path),), limit=5, batch_size=1)
    found = []
    for processes in (1, 2):
        summary = evaluate.run(config, SAMPLE, checkpoints["bd3lm"], tmp_path / str(processes), processes=processes)
        samples = json.loads((tmp_path / str(processes) / "lm_eval.json").read_text())["samples"]
        assert summary == json.loads((tmp_path / str(processes) / "results.json").read_text())
        found.append((summary, samples))
    (one, its_samples), (two, their_samples) = found
    texts = [{name: value for name, value in summary["text"].items() if value is not None} for summary in (one, two)]
    assert texts[1] == pytest.approx(texts[0], rel=1e-5) and two["tasks"] == one["tasks"]
    assert their_samples["drawn"] == its_samples["drawn"]
    for a, b in zip(its_samples["yes_or_no"], their_samples["yes_or_no"], strict=True):
        assert (a["doc_id"], a["nelbo_samples"], a["exact_match"]) == (b["doc_id"], b["nelbo_samples"], b["exact_match"])
        assert [score for ((score, _),) in a["resps"]] == pytest.approx([score for ((score, _),) in b["resps"]], rel=1e-5)


# --- text ---


def test_uniform_models_score_the_log_of_the_number_of_allowed_tokens(checkpoints, source, tmp_path):
    for directory, name in ((checkpoints["bd3lm"], "uniform"), (source, "uniform_source")):
        network = Qwen3ForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            network.lm_head.weight.zero_()
        network.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / name)
    text = evaluate.run(NO_TASKS, SAMPLE, tmp_path / "uniform", tmp_path / "out", source_dir=tmp_path / "uniform_source")["text"]
    tokens = len(embedded.build_tokenizer())
    assert text["nelbo"] == pytest.approx(math.log(tokens), rel=1e-5)  # of the converted model's tokens all but the mask token
    assert text["ar_nll"] == pytest.approx(math.log(tokens), rel=1e-5)
    assert text["stderr"] == pytest.approx(0, abs=1e-5)


def test_the_text_score_does_not_depend_on_the_batch_size(checkpoints, tmp_path):
    scores = [
        evaluate.run(
            EvaluateConfig(tasks=(), text_rows=5, text_length=32, nelbo_samples=2, batch_size=size), SAMPLE, checkpoints["mdlm"], tmp_path
        )["text"]["nelbo"]
        for size in (1, 2, 128)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


def test_scored_text_is_held_out(checkpoints):
    model = models.load(checkpoints["mdlm"])
    rows = perplexity.rows_of_text(EvaluateConfig(text_rows=20, text_length=64), model, seed=0)
    held_out = model.tokenizer.eos_token.join(embedded.corpus_split()[1])
    assert rows.shape == (20, 64)
    assert all(model.tokenizer.decode(row) in held_out for row in rows)


def test_without_a_baseline_and_a_source_their_numbers_are_absent(checkpoints, tmp_path):
    text = evaluate.run(NO_TASKS, SAMPLE, checkpoints["mdlm"], tmp_path)["text"]
    assert text["ar_nll"] is None
    assert text["baseline_nelbo"] is None
    assert not (tmp_path / "lm_eval.json").exists()


# --- mistakes, told before any work ---


def test_an_unknown_task_is_refused_with_near_ones(checkpoints, tmp_path, no_forward):
    with pytest.raises(UserError, match="unknown task 'words_revers': did you mean words_reverse"):
        evaluate.run(EvaluateConfig(tasks=("a2d_words", "words_revers")), SAMPLE, checkpoints["mdlm"], tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("on_the_hub",), "'on_the_hub' cannot be loaded .*'nobody/nothing'.*HF_HUB_OFFLINE"),
        (("writes_code",), "'writes_code' runs code that the model writes.*evaluate.code_execution=true"),
        (("group_with_code",), r"'group_with_code' runs code .*\(writes_code\)"),
        (("a2d_words", "words_sort"), "names words_sort twice"),
        (("asks_for_beams",), "unknown generation argument 'num_beams'"),
    ],
)
def test_a_task_that_cannot_run_is_refused(names, message, checkpoints, tmp_path, no_forward):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a", "answer": "b"}]))
    here = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}}
    texts = {"doc_to_text": "{{text}}", "doc_to_target": "{{answer}}"}
    task_file(tmp_path, task="on_the_hub", dataset_path="nobody/nothing", **texts)
    task_file(tmp_path, task="writes_code", unsafe_code=True, **here, **texts)
    task_file(tmp_path, task="asks_for_beams", generation_kwargs={"until": [], "num_beams": 4}, **here, **texts)
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "group_with_code", "task": ["words_sort", {"task": "writes_code"}]}))
    with pytest.raises(UserError, match=message):
        evaluate.run(EvaluateConfig(tasks=names, task_dirs=(str(tmp_path),)), SAMPLE, checkpoints["mdlm"], tmp_path / "out")


def test_code_runs_where_it_is_allowed_and_the_environment_is_put_back(checkpoints, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EXECUTION", raising=False)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a", "answer": "b"}] * 2))
    (tmp_path / "score.py").write_text(
        "import os\ndef score(doc, results):\n    return {'allowed': float(os.environ['HF_ALLOW_CODE_EXECUTION'])}\n"
    )
    (tmp_path / "writes_code.yaml").write_text(
        "task: writes_code\nunsafe_code: true\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.json'}}}}\n"
        "doc_to_text: '{{text}}'\ndoc_to_target: '{{answer}}'\nprocess_results: !function score.score\n"
        "generation_kwargs: {until: [], max_gen_toks: 4}\nmetric_list: [{metric: allowed, aggregation: mean, higher_is_better: true}]\n"
    )
    config = EvaluateConfig(tasks=("writes_code",), task_dirs=(str(tmp_path),), code_execution=True, text_dataset=None)
    assert evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path / "out")["tasks"][0]["value"] == 1.0
    assert "HF_ALLOW_CODE_EXECUTION" not in os.environ


@pytest.mark.parametrize("damage", ["short", "header", "absent"])
def test_a_damaged_checkpoint_is_refused(damage, checkpoints, tmp_path, no_forward):
    shutil.copytree(checkpoints["mdlm"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content, message = weights.read_bytes(), "model.safetensors' is damaged"
    weights.write_bytes(content[:-100] if damage == "short" else b"\xff" * 100)
    if damage == "absent":
        weights.unlink()
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
        message = "lacks model-1-of-2.safetensors, which model.safetensors.index.json names"
    for directories in ({"model_dir": tmp_path / "model"}, {"model_dir": checkpoints["mdlm"], "baseline_dir": tmp_path / "model"}):
        with pytest.raises(UserError, match=message):
            evaluate.run(SMALL, SAMPLE, output_dir=tmp_path / "out", **directories)


def test_a_task_that_asks_for_something_else_is_refused(checkpoints, tmp_path, no_forward):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a", "answer": "b"}]))
    (tmp_path / "odd.py").write_text(
        "from lm_eval.api.task import ConfigurableTask\n\n\nclass Odd(ConfigurableTask):\n    def __init__(self, config):\n"
        "        super().__init__(config={k: v for k, v in config.items() if k != 'class'})\n        self.OUTPUT_TYPE = 'classify'\n"
    )
    (tmp_path / "odd.yaml").write_text(
        f"task: odd\nclass: !function odd.Odd\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.json'}}}}\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: '{{{{answer}}}}'\n"
    )
    with pytest.raises(UserError, match=r"task 'odd' asks for 'classify', and the model does generate_until, .*: leave it out"):
        evaluate.run(EvaluateConfig(tasks=("odd",), task_dirs=(str(tmp_path),)), SAMPLE, checkpoints["mdlm"], tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "directories", "message"),
    [
        (EvaluateConfig(text_length=999), {}, r"text_length=999 .* context is 128"),
        (EvaluateConfig(), {"baseline_dir": "nowhere"}, "baseline 'nowhere' is not a diffusion checkpoint"),
        (EvaluateConfig(), {"source_dir": "nowhere"}, "source 'nowhere' is not the directory"),
        (EvaluateConfig(task_dirs=("nowhere",)), {}, "'nowhere' is not a directory"),
        (EvaluateConfig(text_dataset="nowhere.txt"), {}, "'nowhere.txt' does not exist"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(config, directories, message, checkpoints, tmp_path, no_forward):
    with pytest.raises(UserError, match=message):
        evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path, **directories)


def test_a_model_without_chat_template_is_refused_unless_none_is_asked_for(checkpoints, tmp_path, monkeypatch):
    whole = models.load

    def load(*args, **options):
        model = whole(*args, **options)
        model.tokenizer.chat_template = None
        return model

    monkeypatch.setattr(models, "load", load)
    config = EvaluateConfig(tasks=("words_last",), limit=1, text_dataset=None)
    with pytest.raises(UserError, match=r"has no chat template.*apply_chat_template=false"):
        evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path)
    plain = EvaluateConfig(tasks=("words_last",), limit=1, text_dataset=None, apply_chat_template=False)
    assert evaluate.run(plain, SAMPLE, checkpoints["mdlm"], tmp_path)["tasks"][0]["documents"] == 1
