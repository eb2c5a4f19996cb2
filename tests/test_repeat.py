"""Perplexity of any text, MLflow's record of an evaluation, and its repetition."""

import json
import math
from importlib.metadata import version

import pytest
import torch

from a2d_core import models, perplexity, tracking
from a2d_core.__main__ import main
from a2d_core.config import EvaluateConfig, Recipe, SampleConfig, UserError
from a2d_core.stages import evaluate, repeat

TEXT = "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch. 🌲\n" * 20
SETTINGS = "--set limit=2 --set text_rows=3 --set text_length=32 --set nelbo_samples=2 --set sample.temperature=0.7".split()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "goethe.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --- perplexity ---


def test_all_of_a_file_is_scored_and_its_bytes_are_counted_exactly(checkpoints, text_file):
    model = models.load(checkpoints["bd3lm"])
    config = EvaluateConfig(text_dataset=str(text_file), text_part="all", text_length=33, text_rows=10_000)
    rows_BL = perplexity.rows_of_text(config, model, seed=0)
    ids = model.tokenizer(TEXT)["input_ids"]
    assert rows_BL.flatten().tolist() == ids[: len(ids) // 33 * 33]  # no end-of-sequence token where the file was cut in two
    bytes_B = perplexity.byte_counts(model.tokenizer, rows_BL)
    assert bytes_B.sum() + len(rows_BL) == len(TEXT.encode()[: rows_BL.numel()])  # byte-level: the first token of a row is given
    assert bytes_B.tolist() == [32] * len(rows_BL)  # also where a row's end cuts a character


def test_special_tokens_have_no_bytes(checkpoints):
    tokenizer = models.load(checkpoints["mdlm"]).tokenizer
    row = tokenizer("ä")["input_ids"] + [tokenizer.eos_token_id] + tokenizer("bc")["input_ids"]
    assert perplexity.byte_counts(tokenizer, torch.tensor([row])).tolist() == [1 + 2]


def test_other_tokenizers_count_the_bytes_of_their_text(checkpoints):
    class Words:
        """A tokenizer that is not byte-level: a token is a word."""

        added_tokens_decoder, all_special_ids, words = {}, [9], ["das", " Öl", " ist", " 🌲"]

        def decode(self, ids, skip_special_tokens):
            return "".join(self.words[i] for i in ids if i not in self.all_special_ids)

    assert perplexity.byte_counts(Words(), torch.tensor([[0, 1, 2, 9], [0, 3, 3, 3]])).tolist() == [4 + 4, 15]


def test_bits_per_byte_are_nats_over_log_two_and_bytes_and_errors_are_those_of_the_ratio():
    nats_B, bytes_B = torch.tensor([10.0, 14.0, 12.0]), torch.tensor([5, 7, 6])
    found = perplexity.summary(nats_B, bytes_B, tokens=9, ar_B=torch.tensor([9.0, 13.0, 11.0], dtype=torch.double))
    assert found["nelbo"] == pytest.approx(4.0)
    assert found["stderr"] == pytest.approx(2 / 3**0.5 / 3)
    assert found["bits_per_byte"] == pytest.approx(2 / math.log(2))
    assert found["bits_per_byte_stderr"] == pytest.approx(0, abs=1e-12)  # every row has two nats per byte
    assert (found["gap"], found["gap_stderr"]) == pytest.approx((1 / 3, 0))  # the same in every row, though the rows differ
    assert found["ar_perplexity"] == pytest.approx(math.exp(11 / 3))


def test_perplexity_on_the_command_line_scores_a_file_beside_the_source(checkpoints, source, text_file, tmp_path, capsys):
    arguments = ["evaluate", "--model", str(checkpoints["mdlm"]), "--source", str(source), "--perplexity", str(text_file)]
    settings = ["--set", "text_length=64", "--set", "nelbo_samples=2", "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, *settings]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"] == []
    text = results["text"]
    assert text["tokens"] == len(TEXT.encode()) // 64 * 63 == text["bytes"]
    assert text["bits_per_byte"] == pytest.approx(text["nelbo"] / math.log(2))
    assert text["ar_bits_per_byte"] == pytest.approx(text["ar_nll"] / math.log(2))
    assert text["stderr"] > 0 and text["ar_stderr"] > 0 and text["gap_stderr"] > 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert "bits per byte" in (tmp_path / "out" / "report.html").read_text()


def test_a_text_that_is_too_short_for_a_row_names_the_field_to_lower(checkpoints, tmp_path):
    (tmp_path / "short.txt").write_text("hi")
    config = EvaluateConfig(text_dataset=str(tmp_path / "short.txt"), text_part="all")
    with pytest.raises(UserError, match=r"do not make one row of text_length=128 tokens: lower text_length"):
        perplexity.rows_of_text(config, models.load(checkpoints["mdlm"]), seed=0)


def test_text_that_was_trained_on_is_not_scored_whole():
    with pytest.raises(UserError, match=r"text_part=all scores all of 'embedded:corpus', which pretrain.dataset trains on"):
        Recipe("x", "mdlm", evaluate=EvaluateConfig(text_part="all"))


# --- MLflow, and again ---


@pytest.fixture(scope="module")
def tracked(checkpoints, source, tmp_path_factory):
    """(URI, id of the evaluation's run, id of its parent) of an evaluation that draws tokens at random."""
    folder = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    arguments = ["evaluate", "--model", str(checkpoints["bd3lm"]), "--source", str(source), "--tasks", "words_sort", *SETTINGS]
    assert main([*arguments, "--seed", "3", "--output-dir", str(folder / "out"), "--mlflow", uri]) == 0
    import mlflow

    (run,) = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`a2d.stage` = 'evaluate'", output_format="list")
    return uri, run.info.run_id, run.data.tags["mlflow.parentRunId"]


def test_mlflow_has_all_that_it_takes_to_repeat_a_number(tracked):
    import mlflow

    mlflow.set_tracking_uri(tracked[0])
    run = mlflow.get_run(tracked[1])
    mlflow.set_experiment(experiment_id=run.info.experiment_id)  # where load_table looks
    assert {"evaluation.json", "results.json", "samples.jsonl", "samples.json", "lm_eval.json", "report.html"} <= {
        artifact.path for artifact in mlflow.MlflowClient().list_artifacts(tracked[1])
    }
    assert {"words_sort/exact_match", "seconds", "evaluations", "failed", "text/bits_per_byte"} <= set(run.data.metrics)
    assert len(run.data.tags["a2d.weights"]) == 64
    assert run.data.tags["version.torch"] == version("torch")
    assert len(mlflow.load_table("samples.json", run_ids=[tracked[1]])) == 2


@pytest.mark.parametrize("which", ["evaluation", "parent"])
def test_a_repetition_is_equal_to_the_bit(which, tracked, tmp_path, capsys):
    uri, run, parent = tracked
    arguments = ["evaluate", "--repeat", run if which == "evaluation" else parent, "--mlflow", uri, "--output-dir", str(tmp_path / "again")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "equal: every number and every answer" in said
    assert "differ" not in said


def test_another_model_is_told_and_is_not_equal(tracked, checkpoints, tmp_path, capsys):
    other = models.load(checkpoints["bd3lm"])
    with torch.no_grad():
        other.network.lm_head.weight *= 2
    other.save(tmp_path / "other")
    arguments = ["--mlflow", tracked[0], "--output-dir", str(tmp_path / "again"), "--model", str(tmp_path / "other")]
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--repeat", tracked[1], *arguments])
    said = capsys.readouterr().out
    assert left.value.code == 1
    assert "settings, versions or weights differ:\n  weights.model: then" in said
    assert "results.text.nelbo: then" in said


def test_what_a_later_version_writes_besides_is_not_compared(checkpoints, tmp_path):
    config = EvaluateConfig(tasks=("words_last",), limit=2, text_dataset=None)
    evaluate.run(config, SampleConfig(), checkpoints["mdlm"], tmp_path / "first")
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    del results["questions"], results["tasks"][0]["independent"]
    (tmp_path / "first" / "results.json").write_text(json.dumps(results))
    assert repeat.run(tmp_path / "first", tmp_path / "again")[1:] == ([], [])
    results["tasks"][0]["documents"] = 3
    (tmp_path / "first" / "results.json").write_text(json.dumps(results))
    assert repeat.run(tmp_path / "first", tmp_path / "again")[2] == ["results.tasks[0].documents: then 3, now 2"]


def test_an_evaluation_of_another_version_is_named_as_one(checkpoints, tmp_path):
    record = {"paths": {"model": str(checkpoints["mdlm"])}, "code": "source 1", "evaluate": {"samples": 3}, "sample": {}}
    for name, text in (("evaluation.json", json.dumps(record)), ("results.json", "{}"), ("samples.jsonl", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"another version \(source 1\) made that evaluation.* unknown field 'evaluate.samples'"):
        repeat.run(tmp_path, tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "nowhere"], "has no run 'nowhere'"),
        ([], "evaluate needs --model DIR"),
        (["--model", "x", "--tasks", "a", "--suite", "tiny"], "--suite tiny brings its own tasks"),
        (["--model", "x", "--perplexity", "a", "--dataset", "b"], "both name the text"),
        (["--model", "x", "--champion", "a"], "--champion NAME is looked up in MLflow"),
    ],
)
def test_what_cannot_be_is_told(arguments, message, tracked, tmp_path, capsys):
    mlflow = ["--mlflow", tracked[0]] if "--repeat" in arguments else []
    assert main(["evaluate", *arguments, *mlflow, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_evaluated_nothing_cannot_be_repeated(tracked, tmp_path):
    tracking.check_server(tracked[0])
    parent = tracking.start_parent(Recipe("x", "mdlm"), name="empty")
    with pytest.raises(UserError, match="evaluated nothing"):
        tracking.fetch_evaluation(parent, tmp_path)


def test_differences_name_the_place_and_see_the_last_bit():
    then = {"a": [1.0, {"b": 0.1}], "c": None}
    assert repeat.differences(then, {"a": [1.0, {"b": 0.1}], "c": None}) == []
    assert repeat.differences(then, {"a": [1.0, {"b": math.nextafter(0.1, 1)}], "c": None}) == ["a[1].b: then 0.1, now 0.10000000000000002"]
    assert repeat.differences({"a": [1]}, {"a": [1, 2]}) == ["a: then [1], now [1, 2]"]
    assert repeat.differences({}, {"new": 1}) == ["new: then null, now 1"]


def test_the_champions_numbers_come_from_its_registered_version(tracked, checkpoints, tmp_path):
    from a2d_core import registry

    tracking.check_server(tracked[0])
    import mlflow

    assert tracking.champion_numbers("nobody") == {}
    parent = tracking.start_parent(Recipe("x", "mdlm"), name="registering")
    with tracking.stage_run(parent, "register"):
        made = registry.register(
            checkpoints["mdlm"], name="champ", tags={"mlflow.parent_run": parent}, metrics={"t/m": 0.5}, sample=SampleConfig()
        )
    assert tracking.champion_numbers("champ") == {}
    mlflow.MlflowClient().set_registered_model_alias("champ", "champion", made["version"])
    assert tracking.champion_numbers("champ") == {"t/m": 0.5}


def test_a_failed_sample_is_counted_in_the_record(checkpoints, tmp_path, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    whole = ConfigurableTask.process_results

    def process_results(self, doc, results):
        if doc["word"] == first[0]:
            raise ValueError("no such word")
        return whole(self, doc, results)

    from a2d_core import embedded

    first = embedded.words()[1]
    monkeypatch.setattr(ConfigurableTask, "process_results", process_results)
    config = EvaluateConfig(tasks=("words_sort",), limit=3, text_dataset=None)
    results = evaluate.run(config, SampleConfig(), checkpoints["mdlm"], tmp_path)
    assert results["tasks"][0]["failed"] == 1
    assert json.loads((tmp_path / "evaluation.json").read_text())["failed"] == 1
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["failed"] for row in rows] == ["ValueError: no such word", None, None]
    assert "ValueError: no such word" in (tmp_path / "report.html").read_text()
