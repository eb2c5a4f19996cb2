"""Task definitions that come with lm-eval, run offline on small files in the schema of their data sets."""

import json
import math

import families
import pytest
from lm_eval.tasks import TaskManager

from a2d_core import models, perplexity, tasks
from a2d_core.config import EvaluateConfig, SampleConfig, UserError
from a2d_core.harness import DiffusionLM
from a2d_core.stages import evaluate, table

SUBJECTS = ("anatomy", "college_physics", "world_religions")
SAMPLE = SampleConfig(max_new_tokens=8, threshold=0.9)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Task or group -> a directory with a few rows of its data set's schema."""
    root = tmp_path_factory.mktemp("datasets")
    apples = [{"question": f"Tom has {i} apples and buys 2. How many has he?", "answer": f"{i}+2={i + 2}\n#### {i + 2}"} for i in range(2)]
    write(root / "gsm8k" / "main" / "test.jsonl", apples)
    endings = ["cuts a carrot.", "flies to the moon [title] again.", "is a door.", "sings in Latin, and goes on and on."]
    kitchen = {"activity_label": "Cooking", "ctx_a": "A man is in a kitchen.", "ctx_b": "he", "endings": endings}
    for split in ("train", "validation"):
        write(root / "hellaswag" / f"{split}.jsonl", [{**kitchen, "ind": i, "label": str(i % 4)} for i in range(3)])
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            rows = [{"question": f" Which is {i}? ", "choices": ["1", "2", "3", "4"], "answer": i} for i in range(3)]
            write(root / "mmlu" / subject / f"{split}.jsonl", [{**row, "subject": subject} for row in rows])
    write(root / "wikitext" / "test.jsonl", [{"page": " = Robert = \n Robert is an actor , and he had a role in 2000 . \n" * 4}])
    return {name: str(root / path) for name, path in (("gsm8k_cot", "gsm8k"), *((n, n) for n in ("hellaswag", "mmlu", "wikitext")))}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    source = families.save_source(tmp_path_factory.mktemp("source"), layers=1, max_position_embeddings=4096)
    return families.convert_both(source, tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def results(checkpoints, datasets, tmp_path_factory):
    """Everything on block diffusion, with the tasks' own few-shot examples; (results.json, lm_eval.json)."""
    output = tmp_path_factory.mktemp("output")
    config = EvaluateConfig(
        tasks=("gsm8k_cot", "hellaswag", *(f"mmlu_{subject}" for subject in SUBJECTS), "wikitext"),
        datasets=datasets, text_dataset=None, apply_chat_template=False, max_nelbo_samples=16,
    )  # fmt: skip
    summary = evaluate.run(config, SAMPLE, checkpoints["bd3lm"], output)
    return summary, json.loads((output / "lm_eval.json").read_text())


def test_every_task_has_the_metrics_that_its_definition_asks_for(results):
    found = {(row["task"], row["metric"]): row for row in results[0]["tasks"]}
    assert set(found) == {
        *(("gsm8k_cot", f"exact_match/{way}") for way in ("strict-match", "flexible-extract")),
        *(("hellaswag", metric) for metric in ("acc", "acc_norm")),
        *((f"mmlu_{subject}", "acc") for subject in SUBJECTS),
        *(("wikitext", metric) for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    }  # fmt: skip
    assert all(row["failed"] == 0 and math.isfinite(row["value"]) for row in found.values())
    assert found["hellaswag", "acc"]["documents"] == 3
    assert {row["metric"] for row in found.values() if row["independent"] is None} == {
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
    }
    # An untrained network knows nothing: a byte costs about 8 bits.
    assert found["wikitext", "bits_per_byte"]["value"] == pytest.approx(8, rel=0.1)


def test_the_definitions_own_code_made_the_prompts(results):
    samples = results[1]["samples"]
    prompt, arguments = samples["gsm8k_cot"][0]["arguments"][0]
    assert prompt.count("Q: ") == 9 and prompt.startswith("Q: There are 15 trees") and prompt.endswith("How many has he?\nA:")
    assert arguments["until"] == ["Q:", "</s>", "<|im_end|>"]
    choices = [argument for _, argument in samples["hellaswag"][0]["arguments"]]
    assert samples["hellaswag"][0]["arguments"][0][0] == "Cooking: A man is in a kitchen. He"
    assert choices[1] == " flies to the moon. again."  # process_docs
    assert samples["mmlu_anatomy"][0]["arguments"][2] == [samples["mmlu_anatomy"][0]["arguments"][0][0], " C"]
    assert "Robert is an actor, and" in samples["wikitext"][0]["arguments"][0][0]  # the detokenizer


def test_a_metric_is_the_mean_of_its_parts_by_question_where_it_is_a_mean(results):
    main = {f"{row['task']}/{row['metric']}": row for row in results[0]["tasks"] if row["is_main"]}
    assert {name for name, parts in results[0]["questions"].items() if not parts} == {"wikitext/word_perplexity"}
    for name, parts in ((name, parts) for name, parts in results[0]["questions"].items() if parts):
        assert sum(parts.values()) / len(parts) == pytest.approx(main[name]["value"])
        assert len(parts) == main[name]["documents"]


def test_the_parts_of_a_groups_mean_weigh_as_its_tasks_do():
    samples = {
        task: [{"doc_id": i, "doc_hash": "", "prompt_hash": "", "filter": "none", "acc": float(i == 0)} for i in range(count)]
        for task, count in (("few", 1), ("many", 3))
    }
    for value, weights in ((0.5, [1.0, 1.0, 0, 0]), (2 / 3, [2.0, 2 / 3, 0, 0])):  # by size, and each task alike
        found = {"samples": samples, "group_subtasks": {"both": ["few", "many"]}, "results": {"both": {"acc,none": value}}}
        assert list(table._questions(found, "both", "acc", "none").values()) == pytest.approx(weights)


def test_each_answer_has_a_standard_error_and_single_letters_have_none(results):
    samples = results[1]["samples"]
    for row in samples["mmlu_anatomy"]:  # a space and a letter: all three masks of two bytes are summed
        assert row["stderr"] == [0.0] * 4 and row["nelbo_samples"] == [0] * 4
    for row in samples["hellaswag"]:
        assert len(row["stderr"]) == 4 and all(error > 0 for error in row["stderr"])
        assert set(row["nelbo_samples"]) <= {8, 16}
    assert all(len(row["stderr"]) == 1 and row["stderr"][0] > 0 for row in samples["wikitext"])


def test_a_group_reads_a_folder_for_each_of_its_tasks_and_is_their_mean(checkpoints, datasets, tmp_path):
    (tmp_path / "three.yaml").write_text(
        json.dumps({
            "group": "three_subjects", "task": [f"mmlu_{subject}" for subject in SUBJECTS],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        })
    )  # fmt: skip
    config = EvaluateConfig(
        tasks=("three_subjects",), task_dirs=(str(tmp_path),), datasets={"mmlu": datasets["mmlu"]}, text_dataset=None, likelihood="exact",
    )  # fmt: skip
    rows = {row["task"]: row for row in evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path / "out")["tasks"]}
    assert rows["three_subjects"]["value"] == pytest.approx(sum(rows[f"mmlu_{subject}"]["value"] for subject in SUBJECTS) / 3)
    assert rows["three_subjects"]["documents"] == 9
    prompt = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["samples"]["mmlu_anatomy"][0]["arguments"][0][0]
    assert prompt.startswith("<|system|>") or "<|user|>" in prompt


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("mmlu_virology",), {}, r"task 'mmlu_virology' needs dev and test in '.*mmlu'.*there are none"),
        (("hellaswag",), {"datasets": {"wikitext": "here"}}, "names 'wikitext', and none of evaluate.tasks=hellaswag"),
        (("hellaswag",), {"datasets": {"hellaswag": "nowhere"}}, "'nowhere', the data of 'hellaswag', is not a directory"),
        (("hellaswag",), {"datasets": {"hellswag": "here"}}, "unknown task 'hellswag'"),
        (("arc_easy",), {"datasets": {}}, "'arc_easy' cannot be loaded .*HF_HUB_OFFLINE"),
        (("hellaswag", "gsm8k_cot"), {}, r"task 'gsm8k_cot': a request of 2\d\d\d tokens with an answer of 2000 needs 4\d\d\d positions"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_any_work(names, changes, message, checkpoints, datasets, tmp_path, no_forward, monkeypatch):
    monkeypatch.setattr(perplexity, "rows_of_text", None)
    wanted = {name: path for name, path in datasets.items() if any(part.startswith(name) for part in names)}
    changes = {"datasets": wanted, **changes}
    changes["datasets"] = {name: str(tmp_path) if path == "here" else path for name, path in changes["datasets"].items()}
    config = EvaluateConfig(tasks=names, text_dataset=None, apply_chat_template=False, **changes)
    with pytest.raises(UserError, match=message):
        evaluate.run(config, SampleConfig(max_new_tokens=2000), checkpoints["mdlm"], tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q": "How many?", "answer": "#### 1"}', "'question' is undefined"),
        ('{"question": "How', "generating the dataset"),
        ("", "."),
    ],
)
def test_local_data_that_do_not_fit_the_task_are_told(text, message, checkpoints, tmp_path, no_forward):
    (tmp_path / "test.jsonl").write_text(text)
    config = EvaluateConfig(tasks=("gsm8k_cot",), datasets={"gsm8k_cot": str(tmp_path)}, text_dataset=None, num_fewshot=0)
    told = rf"task 'gsm8k_cot' cannot be loaded \(.*{message}.*\): see that the files of evaluate.datasets are whole, and have the columns"
    with pytest.raises(UserError, match=told):
        evaluate.run(config, SAMPLE, checkpoints["mdlm"], tmp_path / "out")


def test_whether_the_greedy_sampler_reproduces_a_choice_is_found_out_only_for_metrics_that_read_it(checkpoints, datasets, monkeypatch):
    manager = TaskManager(include_defaults=False)
    config = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": datasets["hellaswag"] + "/validation.jsonl"}},
        "validation_split": "validation", "doc_to_text": "{{ctx_a}}", "doc_to_choice": "endings", "doc_to_target": "{{label}}",
        "output_type": "multiple_choice",
    }  # fmt: skip
    with tasks.quiet():
        loaded = manager.load([
            {**config, "task": "reads", "metric_list": [{"metric": "exact_match"}]},
            {**config, "task": "reads_not", "metric_list": [{"metric": "acc"}]},
        ])["tasks"]  # fmt: skip
    lm, asked = DiffusionLM(models.load(checkpoints["mdlm"]), nelbo_samples=1, max_nelbo_samples=1), []
    monkeypatch.setattr(lm, "_reproduced", lambda pairs: asked.extend(pairs) or [True] * len(pairs))
    lm.plan(loaded.values())
    for task in loaded.values():
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=1, rank=0, world_size=1)
    answers = {name: lm.loglikelihood(task.instances) for name, task in loaded.items()}
    assert len(asked) == 4
    assert [same for _, same in answers["reads"]] == [True] * 4 and [same for _, same in answers["reads_not"]] == [False] * 4
