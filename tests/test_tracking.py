"""What a run tells MLflow: one parent, a child per stage that is found again, and each number once."""

import math
import time
from pathlib import Path

import mlflow
import pytest

from a2d_core import presets, tracking
from a2d_core.config import TrackingConfig, UserError

RESULTS = {
    "tasks": [
        {"task": "words", "metric": "exact_match/flexible", "value": 0.9, "stderr": 0.01, "chance": 0.1, "baseline": 0.0, "documents": 200},
        {"task": "other", "metric": "acc", "value": 0.5, "stderr": None, "chance": None, "baseline": None, "documents": 10},
    ],
    "text": {"nelbo": 1.5, "stderr": 0.1, "ar_nll": None, "perplexity_bound": 4.5, "tokens": 100},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A database of our own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tracking.check_server(tracking.default_uri())
        yield folder
    mlflow.set_tracking_uri(None)


@pytest.fixture
def parent(server):
    return tracking.start_parent(presets.resolve(presets.read("smoke"), "bd3lm"), name="run", run="A2DFlow/1")


@pytest.fixture
def client():
    return mlflow.MlflowClient()


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_the_default_is_a_file_of_the_working_directory_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/other.db")
    assert tracking.default_uri() == f"sqlite:///{tmp_path}/sub/other.db"
    assert tracking.default_uri(TrackingConfig(uri="http://tracking:5000")) == "http://tracking:5000"


@pytest.mark.parametrize("uri", ["https://ada:hunter2@mlflow.example:5000", "postgresql+psycopg2://mlflow:hunter2@db/mlflow"])
def test_a_password_in_the_uri_is_refused_and_not_shown(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for config in (None, TrackingConfig(uri=uri)):
        with pytest.raises(UserError, match=r"has a password in it.* MLFLOW_TRACKING_PASSWORD") as refused:
            tracking.default_uri(config)
        assert "hunter2" not in str(refused.value)


def test_telemetry_is_off_unless_the_user_has_said_otherwise(monkeypatch):
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    tracking.quiet()
    import os

    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_a_server_that_does_not_answer_is_named_within_seconds_with_its_cause(server):
    started = time.monotonic()
    uri = mlflow.get_tracking_uri()
    try:
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 \(.*refused\).*MLFLOW_TRACKING_URI"):
            tracking.check_server("http://127.0.0.1:9")
    finally:
        mlflow.set_tracking_uri(uri)
    assert time.monotonic() - started < 60  # MLflow alone would try for minutes


def test_the_parent_carries_the_resolved_recipe(parent, client, server):
    run = client.get_run(parent)
    assert run.data.params["objective"] == "bd3lm"
    assert run.data.tags["metaflow.run"] == "A2DFlow/1"
    assert run.info.artifact_uri.startswith((server / "mlruns").as_uri())
    recipe = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/recipe.json")
    assert recipe["name"] == "smoke"


def test_a_stage_finds_its_run_again(parent, client):
    with tracking.stage_run(parent, "sft", params={"learning_rate": 0.1}, tags={"metaflow.task": "1"}) as first:
        pass
    with tracking.stage_run(parent, "sft", params={"learning_rate": 0.2}, tags={"metaflow.task": "2"}) as second:
        pass
    with tracking.stage_run(parent, "pretrain") as other:
        pass
    assert first == second != other
    run = client.get_run(first)
    assert run.data.params == {"learning_rate": "0.1"}
    assert run.data.tags["metaflow.task"] == "2"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.status == "FINISHED"


def test_a_stage_that_fails_marks_both_runs_until_it_is_taken_up_again(parent, client):
    with pytest.raises(RuntimeError, match="boom"), tracking.stage_run(parent, "sft") as run_id:
        raise RuntimeError("boom")
    assert [client.get_run(i).info.status for i in (run_id, parent)] == ["FAILED", "FAILED"]
    with tracking.stage_run(parent, "sft"):
        assert [client.get_run(i).info.status for i in (run_id, parent)] == ["RUNNING", "RUNNING"]
    tracking.finish(parent)
    assert [client.get_run(i).info.status for i in (run_id, parent)] == ["FINISHED", "FINISHED"]


def test_a_step_that_is_there_is_not_logged_twice(parent, client):
    with tracking.stage_run(parent, "sft") as run_id:
        for steps in ((1, 2, 3), (2, 3, 4)):  # killed after 3, resumed from 1
            log = tracking.MetricLog(run_id)
            log.add([{"step": step, "max_steps": 4, "loss": 1 / step, "grad_norm": math.nan} for step in steps])
            log.send()
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert set(client.get_run(run_id).data.metrics) == {"loss"}


def test_what_half_arrived_is_sent_again_but_once(parent, client, monkeypatch):
    with tracking.stage_run(parent, "sft") as run_id:
        log = tracking.MetricLog(run_id)
        log.add([{"step": step, "loss": 1.0} for step in range(1500)])
        send = log._client.log_batch
        calls = []

        def breaks(*args, **kwargs):
            send(*args, **kwargs)
            calls.append(kwargs)
            raise ConnectionError("the answer was lost")

        monkeypatch.setattr(log._client, "log_batch", breaks)
        with pytest.raises(ConnectionError):
            log.send()
        monkeypatch.setattr(log._client, "log_batch", send)
        assert log.send() == 500
    assert len(calls) == 1
    assert [step for step, _ in history(client, run_id, "loss")] == list(range(1500))


def test_final_numbers_go_to_the_stage_and_its_parent_and_leave_curves_alone(parent, client):
    for _ in range(2):
        with tracking.stage_run(parent, "sft") as run_id:
            log = tracking.MetricLog(run_id)
            log.add([{"step": 7, "eval_nelbo": 2.0}])
            log.send()
            tracking.log_numbers({"eval_nelbo": 1.9, "steps": 7, "dropped": {}, "best": None}, summary={"sft/eval_nelbo": 1.9})
    assert history(client, run_id, "eval_nelbo") == [(7, 2.0)]
    assert history(client, run_id, "steps") == [(0, 7.0)]
    assert history(client, parent, "sft/eval_nelbo") == [(0, 1.9)]


def test_numbers_that_an_attempt_has_logged_are_not_logged_again_and_changed_results_get_a_step(parent, client):
    for seconds, loss in ((1.0, 2.0), (1.5, 2.0), (1.2, 1.9)):  # killed after it had logged, then run again with other code
        with tracking.stage_run(parent, "evaluate") as run_id:
            tracking.log_numbers({"seconds": seconds, "loss": loss}, summary={"loss": loss})
    assert history(client, run_id, "seconds") == [(0, 1.0)]
    assert history(client, run_id, "loss") == history(client, parent, "loss") == [(0, 2.0), (1, 1.9)]


def test_a_run_that_was_begun_is_taken_up_with_the_parameters_that_it_lacks(server, client):
    recipe = presets.resolve(presets.read("smoke"), "bd3lm")
    mlflow.set_experiment(recipe.tracking.experiment)
    with mlflow.start_run(tags={"metaflow.run": "A2DFlow/killed"}) as killed:
        mlflow.log_param("preset", "smoke")
    for begun in (["A2DFlow/resumed", "A2DFlow/killed"], []):
        taken = tracking.start_parent(recipe, name="run", run="A2DFlow/resumed", begun=begun)
        assert (taken == killed.info.run_id) == bool(begun)
        assert client.get_run(taken).data.params["objective"] == "bd3lm"


def test_samples_are_a_table_that_a_second_attempt_replaces(parent, client):
    samples = [{"prompt": "a", "completion": "b", "nfe": 2.0}]
    for _ in range(2):
        with tracking.stage_run(parent, "sample") as run_id:
            tracking.log_samples(samples)
    mlflow.set_experiment("a2d")
    table = mlflow.load_table("samples.json", run_ids=[run_id])
    assert table.to_dict("records") == samples


def test_an_evaluation_is_logged_with_errors_and_baselines_and_its_files(parent, client, tmp_path):
    for name in ("results.json", "lm_eval.json"):
        (tmp_path / name).write_text("{}")
    with tracking.stage_run(parent, "evaluate") as run_id:
        tracking.log_evaluation(RESULTS, tmp_path)
    metrics = client.get_run(run_id).data.metrics
    assert metrics["words/exact_match/flexible"] == 0.9
    assert metrics["words/exact_match/flexible_stderr"] == 0.01
    assert metrics["words/exact_match/flexible_baseline"] == 0.0
    assert metrics["text/nelbo"] == 1.5
    assert "other/acc_chance" not in metrics
    assert {Path(file.path).name for file in client.list_artifacts(run_id)} == {"results.json", "lm_eval.json"}
    summary = client.get_run(parent).data.metrics
    assert {"words/exact_match/flexible", "other/acc", "text/nelbo"} <= set(summary)
    assert not [name for name in summary if name.endswith(("_chance", "/exact_match/flexible_stderr"))]


def test_a_deleted_experiment_is_named_with_the_way_back(server, client):
    recipe = presets.resolve(presets.read("smoke"), "bd3lm", ["tracking.experiment=gone"])
    run = client.get_run(tracking.start_parent(recipe, name="run"))
    client.delete_experiment(run.info.experiment_id)
    with pytest.raises(UserError, match=r"'gone' was deleted.*restore"):
        tracking.start_parent(recipe, name="run")


def test_an_experiment_that_another_run_makes_meanwhile_is_shared(server, client, monkeypatch):
    made = tracking._experiment(client, "shared")
    look, looks = client.get_experiment_by_name, []

    def too_early_at_first(name):
        looks.append(name)
        return look(name) if len(looks) > 1 else None

    monkeypatch.setattr(client, "get_experiment_by_name", too_early_at_first)
    assert tracking._experiment(client, "shared") == made
