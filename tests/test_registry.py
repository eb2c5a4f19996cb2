"""The registry: a version leads back to its run, is made once, and answers like the checkpoint, without a checkout."""

import dataclasses
import json
import os
import subprocess
import sys

import families
import mlflow
import pytest
import torch

from a2d_core import models, presets, sampling, tracking
from a2d_core.config import SampleConfig, UserError
from a2d_core.stages import register

SAMPLE = SampleConfig(max_new_tokens=12, threshold=0.9)
PROMPTS = ["Reverse: garden", "Upper: sea"]
NAME = "a2d-smoke-bd3lm"


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mlflow"))
        tracking.check_server(tracking.default_uri())
        yield tracking.start_parent(presets.resolve(presets.read("smoke"), "bd3lm"), name="run")
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def model():
    return families.byte_model("bd3lm")


@pytest.fixture(scope="module")
def put(parent, tmp_path_factory):
    """Register a model of this run, as the flow's step does."""

    def run(model, parent=parent):
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save(folder)
        tags = {"mlflow.parent_run": parent, "metaflow.run": "A2DFlow/1", "gate": "passed"}
        metrics = {"words/exact_match": 0.9, "words/exact_match_chance": None}
        with tracking.stage_run(parent, "register"):
            return register.run(folder, name=NAME, tags=tags, metrics=metrics, sample=SAMPLE)

    return run


@pytest.fixture(scope="module")
def registered(put, model):
    return put(model)


@pytest.fixture
def client():
    return mlflow.MlflowClient()


def predict(uri, folder, **params):
    """What the model at `uri` answers in a process that has no checkout, and where it found a2d_core."""
    code = (
        "import sys, json, mlflow, pandas; uri, prompts, params = json.loads(sys.argv[1]);"
        "answers = mlflow.pyfunc.load_model(uri).predict(pandas.DataFrame({'prompt': prompts}), params=params);"
        "import a2d_core; print(json.dumps([list(answers), a2d_core.__file__]))"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    command = [sys.executable, "-c", code, json.dumps([uri, PROMPTS, params])]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_version_leads_back_to_its_run_and_waits_for_review(registered, client, parent):
    version = client.get_model_version_by_alias(NAME, "candidate")
    assert int(version.version) == registered["version"] == 1
    assert version.tags["review"] == "pending"
    assert version.tags["mlflow.parent_run"] == parent
    assert version.tags["metaflow.run"] == "A2DFlow/1"
    assert version.tags["gate"] == "passed"
    assert client.get_run(version.run_id).data.tags["mlflow.parentRunId"] == parent


def test_the_model_carries_its_metrics_and_the_parameters_of_a_call(registered, client):
    info = mlflow.models.get_model_info(registered["uri"])
    found = {parameter.name: parameter.default for parameter in info.signature.params}
    assert found == {**SAMPLE.parameters(), "stop": [], "suppressed_tokens": []}
    assert (found["max_new_tokens"], found["threshold"], found["steps_per_block"]) == (12, 0.9, 0)
    metrics = {metric.key: metric.value for metric in mlflow.get_logged_model(info.model_id).metrics}
    assert metrics == {"words/exact_match": 0.9}


@pytest.fixture(scope="module")
def answered(registered, tmp_path_factory):
    return predict(registered["uri"], tmp_path_factory.mktemp("elsewhere"))


def test_it_answers_like_the_checkpoint_without_a_checkout(answered, model):
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]
    generated = sampling.generate(model, prompts, SAMPLE)
    assert answered[0] == [model.tokenizer.decode(g.tokens, skip_special_tokens=True) for g in generated]
    assert "mlruns" in answered[1]


def test_parameters_of_a_call_change_the_answer(answered, registered, tmp_path):
    short, _ = predict(registered["uri"], tmp_path, max_new_tokens=3)
    assert all(len(a.encode()) < len(b.encode()) for a, b in zip(short, answered[0], strict=True))


def test_the_parameters_of_a_call_are_the_fields_of_the_configuration():
    given = {"threshold": 0.0, "steps_per_block": 4, "stop": ["\n"], "top_k": 0, "temperature": 0.5}
    assert SAMPLE.with_parameters({}) == SAMPLE.with_parameters(SAMPLE.parameters()) == SAMPLE
    changed = dataclasses.replace(SAMPLE, threshold=None, steps_per_block=4, stop=("\n",), temperature=0.5)
    assert SAMPLE.with_parameters(given) == changed
    with pytest.raises(UserError, match="top_p must lie in"):
        SAMPLE.with_parameters({"top_p": 0.0})


@pytest.mark.parametrize("params", [{}, {"max_new_tokens": 9, "temperature": 1.0, "stop": ["e"]}])
def test_streamed_pieces_make_up_the_answer(registered, model, params):
    served = mlflow.pyfunc.load_model(registered["uri"])
    for prompt in PROMPTS:
        torch.manual_seed(0)
        (expected,) = served.predict([{"prompt": prompt}], params=params)
        torch.manual_seed(0)
        pieces = list(served.predict_stream({"prompt": prompt}, params=params))
        assert "".join(pieces) == expected
        assert all(pieces)


def test_a_registered_version_is_a_checkpoint_directory(registered, model):
    for uri in (registered["uri"], f"models:/{NAME}@candidate"):
        loaded = models.load(tracking.checkpoint_of(uri))
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_version_that_is_not_there_is_named(registered, tmp_path, monkeypatch):
    for uri in (f"models:/{NAME}/99", f"models:/{NAME}@nobody", "models:/nothing/1"):
        with pytest.raises(UserError, match=f"{uri} is no checkpoint that was registered here, at sqlite"):
            tracking.checkpoint_of(uri)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"there is no MLflow database .* with MLFLOW_TRACKING_URI"):
        tracking.checkpoint_of(registered["uri"])
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_run_again_registers_nothing_new(registered, put, model, client):
    assert put(model) == registered
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1


def test_another_run_and_other_weights_make_versions_of_their_own(registered, put, model, client):
    other = tracking.start_parent(presets.resolve(presets.read("smoke"), "bd3lm"), name="other")
    assert put(model, parent=other)["version"] == 2
    assert put(families.byte_model("bd3lm", seed=1))["version"] == 3
    assert int(client.get_model_version_by_alias(NAME, "candidate").version) == 3


def test_a_name_that_mlflow_does_not_take_is_refused_before_the_work():
    raw = presets.read("smoke")
    assert register.model_name(presets.resolve(raw, "mdlm")) == "a2d-smoke-mdlm"
    for name in ("a/b", "{seed}", "{", ""):
        with pytest.raises(UserError, match=r"register\.name"):
            register.model_name(presets.resolve(raw, "mdlm", [f"register.name={name}"]))


def task(value, stderr=0.01, chance=0.1, baseline=0.0, **more):
    return {"value": value, "stderr": stderr, "chance": chance, "baseline": baseline, **more}


@pytest.mark.parametrize(
    ("tasks", "verdict"),
    [
        ([task(0.9), task(0.5)], "passed"),
        ([task(0.9), task(0.11)], "failed"),
        ([task(0.9, baseline=0.95)], "failed"),
        ([task(0.9, chance=None, baseline=None)], "open"),
        ([task(3.0, chance=None, baseline=9.0, higher_is_better=False)], "open"),
        ([], "open"),
    ],
)
def test_the_gate_says_whether_training_bought_anything(tasks, verdict):
    assert register.gate({"tasks": tasks, "text": None}) == verdict
