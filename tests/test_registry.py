"""The registry: a version leads back to its run, is made once, answers like the checkpoint, and is reviewed before it is promoted."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import count
from pathlib import Path

import families
import mlflow
import pytest
import torch
from stand_ins.services import free_port

from a2d_core import __main__ as cli
from a2d_core import checkpoints, gate, models, presets, registry, review, sampling, settings, tracking
from a2d_core.config import ConvertConfig, SampleConfig, UserError
from a2d_core.stages import convert, register

SAMPLE = SampleConfig(max_new_tokens=12, threshold=0.9)
PROMPTS = ["Reverse: garden", "Upper: sea"]
NAME = "a2d-smoke-bd3lm"
RECIPE = replace(presets.resolve(presets.read("smoke"), "bd3lm"), sample=SAMPLE)


def task(value, stderr=0.01, chance=0.1, baseline=0.0, name="words", metric="exact_match", **more):
    return {"task": name, "metric": metric, "value": value, "stderr": stderr, "chance": chance, "baseline": baseline, **more}


def evaluation(*tasks, text=None):
    return {"tasks": list(tasks), "text": text}


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

    def run(model, parent=parent, written=None):
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save(folder)
        tags = {"mlflow.parent_run": parent, "metaflow.run": "A2DFlow/1", "gate": "passed"}
        samples = [{"prompt": "Upper: sea", "answer": "SEA"}]
        facts = {"sft": {"weights_sha256": written or checkpoints.digest(folder), "data_digest": "d" * 64, "train_rows": 3}}
        with tracking.stage_run(parent, "register"):
            return register.run(folder, RECIPE, tags=tags, results=evaluation(task(0.9)), samples=samples, facts=facts)

    return run


@pytest.fixture(scope="module")
def registered(put, model):
    return put(model)


@pytest.fixture
def client():
    return mlflow.MlflowClient()


def elsewhere():
    """The environment of a process that has no checkout."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return env | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PATH": binaries}


def ask(uri, folder):
    """What the model at `uri` answers in a process that has no checkout, and where it found a2d_core."""
    code = """
import json, sys, mlflow, pandas
uri, prompts = json.loads(sys.argv[1])
model = mlflow.pyfunc.load_model(uri)
table = pandas.DataFrame({"prompt": prompts})
try:
    list(model.predict_stream({"prompt": 5}))
except mlflow.MlflowException as error:
    refused = str(error)
import a2d_core
found = {
    "answers": model.predict(table),
    "short": model.predict(table, params={"max_new_tokens": 3}),
    "stream": list(model.predict_stream({"prompt": prompts[0]})),
    "refused": refused,
    "home": a2d_core.__file__,
}
print(json.dumps(found))
"""
    command = [sys.executable, "-c", code, json.dumps([uri, PROMPTS])]
    done = subprocess.run(command, cwd=folder, env=elsewhere(), capture_output=True, text=True, timeout=120)
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
    assert found == {**settings.parameters(SAMPLE), "stop": [], "suppressed_tokens": []}
    assert (found["max_new_tokens"], found["threshold"], found["steps_per_block"]) == (12, 0.9, 0)
    bars = {"stderr": 0.01, "chance": 0.1, "baseline": 0.0}
    metrics = {metric.key: metric.value for metric in mlflow.get_logged_model(info.model_id).metrics}
    assert metrics == {"words/exact_match": 0.9} | {f"words/exact_match_{part}": v for part, v in bars.items()}


@pytest.fixture(scope="module")
def answered(registered, tmp_path_factory):
    return ask(registered["uri"], tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def expected(model):
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]
    return [model.tokenizer.decode(g.tokens, skip_special_tokens=True) for g in sampling.generate(model, prompts, SAMPLE)]


def test_it_answers_like_the_checkpoint_without_a_checkout(answered, expected):
    assert answered["answers"] == expected
    assert "".join(answered["stream"]) == expected[0]
    assert "mlruns" in answered["home"]


def test_parameters_of_a_call_change_the_answer(answered):
    assert all(len(a.encode()) < len(b.encode()) for a, b in zip(answered["short"], answered["answers"], strict=True))


@pytest.fixture(scope="module")
def served(registered, tmp_path_factory):
    """`mlflow models serve` of the champion, in a directory without a checkout: POST JSON, get the status and the reply."""
    mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", str(registered["version"]))
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, "-p", str(port)], cwd=folder, env=elsewhere(), stdout=log, stderr=log, start_new_session=True)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(body, path="invocations"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=60) as reply:
                return reply.status, json.loads(reply.read().strip() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                post(None, "ping")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield post
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def test_the_champion_is_served_over_http_with_parameters(served, expected, answered):
    assert served({"inputs": {"prompt": PROMPTS}}) == (200, {"predictions": expected})
    assert served({"dataframe_split": {"columns": ["prompt"], "data": [[p] for p in PROMPTS]}}) == (200, {"predictions": expected})
    assert served({"inputs": {"prompt": PROMPTS}, "params": {"max_new_tokens": 3}}) == (200, {"predictions": answered["short"]})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": {"prompt": ["a"]}, "params": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"inputs": {"prompt": ["a"]}, "params": {"steps_per_block": 2.5}}, "steps_per_block"),
        ({"inputs": {"prompt": ["a"]}, "params": {"threshold": 7.0}}, "threshold must lie in (0, 1], not 7.0"),
        ({"inputs": {"prompt": ["a"]}, "params": {"max_new_tokens": 4000}}, "the model's context is"),
        ({"inputs": {"prompt": [5]}}, "a prompt must be text, not 5"),
        ({"inputs": {"prompt": [None]}}, "a prompt must be text, not None"),
        ({"dataframe_records": [{"prompt": ["a", ["b"]]}]}, "a prompt must be text, not ['b']"),
        ({"inputs": {"question": ["a"]}}, "missing inputs ['prompt']"),
    ],
)
def test_what_is_of_a_wrong_type_or_out_of_range_is_400(served, body, message):
    status, reply = served(body)
    assert status == 400
    assert message in reply["message"]


def test_a_stream_refuses_what_is_no_text(answered):
    assert "a prompt must be text, not 5" in answered["refused"]


def test_the_parameters_of_a_call_are_the_fields_of_the_configuration():
    given = {"threshold": 0.0, "steps_per_block": 4, "stop": ["\n"], "top_k": 0, "temperature": 0.5}
    assert settings.with_parameters(SAMPLE, {}) == settings.with_parameters(SAMPLE, settings.parameters(SAMPLE)) == SAMPLE
    changed = dataclasses.replace(SAMPLE, threshold=None, steps_per_block=4, stop=("\n",), temperature=0.5)
    assert settings.with_parameters(SAMPLE, given) == changed
    with pytest.raises(UserError, match="top_p must lie in"):
        settings.with_parameters(SAMPLE, {"top_p": 0.0})


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
    for name in ("a/b", "a's", "{seed}", "{preset.name}", "{", ""):
        with pytest.raises(UserError, match=r"register\.name"):
            register.model_name(presets.resolve(raw, "mdlm", [f"register.name={name}"]))


def test_weights_that_training_did_not_write_are_refused(put, model, registered, client):
    with pytest.raises(UserError, match="are not those that training wrote"):
        put(model, written="0" * 64)


def test_a_stage_says_which_weights_it_wrote(tmp_path):
    facts = convert.run(ConvertConfig(model="embedded:smoke", block_size=8), "bd3lm", tmp_path)
    assert facts["weights_sha256"] == checkpoints.digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1] + b"x")
    assert facts["weights_sha256"] != checkpoints.digest(tmp_path)


def test_a_version_says_where_it_comes_from(registered, client):
    version = registry.read(NAME, 1)
    lines = review.lineage(version)
    assert lines["source model"] == "embedded:smoke"
    assert lines["sft data"] == "embedded:tasks, 3 rows, digest dddddddddddd"
    assert lines["weights"] == version.tags["checkpoint_sha256"][:12]
    assert re.match(r"source [0-9a-f]{12}", lines["code"])
    assert lines["Metaflow run"] == "A2DFlow/1"
    assert version.record["recipe"]["sft"]["max_steps"] == RECIPE.sft.max_steps
    page = client.get_model_version(NAME, "1").description
    assert "words/exact_match" in page and "SEA" in page and "embedded:smoke" in page


# --- the gate ---


@pytest.mark.parametrize(
    ("tasks", "word"),
    [
        ([task(0.9), task(0.5, name="other")], "passed"),
        ([task(0.9), task(0.11, name="other")], "failed"),
        ([task(0.9, baseline=0.95)], "failed"),
        ([task(0.9, chance=None, baseline=None)], "open"),
        ([task(3.0, chance=None, baseline=9.0, higher_is_better=False)], "passed"),
        ([task(9.0, chance=None, baseline=3.0, higher_is_better=False)], "failed"),
        ([], "open"),
    ],
)
def test_the_gate_says_whether_training_bought_anything(tasks, word):
    assert gate.judge(evaluation(*tasks)).word == word


@pytest.mark.parametrize(
    ("candidate", "champion", "better", "word"),
    [
        (0.80, 0.82, True, "failed"),  # the standard error of the difference is 0.014
        (0.80, 0.81, True, "passed"),
        (0.82, 0.80, True, "passed"),
        (3.02, 3.00, False, "failed"),
        (3.01, 3.00, False, "passed"),
        (3.00, 3.02, False, "passed"),
    ],
)
def test_a_metric_falls_when_it_is_worse_by_more_than_its_standard_error(candidate, champion, better, word):
    plain = {"chance": None, "baseline": None, "higher_is_better": better}
    verdict = gate.judge(evaluation(task(candidate, **plain)), evaluation(task(champion, **plain)))
    assert verdict.word == word
    assert ("words/exact_match" in verdict.why) == (word == "failed")


def test_the_nelbo_of_held_out_text_is_lower_is_better():
    def text(nelbo):
        return evaluation(text={"nelbo": nelbo, "stderr": 0.02})

    assert gate.judge(text(2.5), text(2.2)).word == "failed"
    assert gate.judge(text(2.2), text(2.5)).word == "passed"


def test_a_metric_that_only_the_champion_has_leaves_the_gate_open():
    verdict = gate.judge(evaluation(task(0.9)), evaluation(task(0.9), task(0.9, name="sort")))
    assert verdict == gate.Verdict("open", "the champion has sort/exact_match, which was not measured")


# --- review and promotion ---


@pytest.fixture
def versions(client, tmp_path, parent):
    """A model of its own; `add(value)` makes a version of it whose task scored so, without weights, and returns its number."""
    name = f"model-{next(NUMBERS)}"
    client.create_registered_model(name)

    def add(value=0.9, word="passed", steps=4):
        folder = tmp_path / f"{next(NUMBERS)}"
        (folder / "artifacts").mkdir(parents=True)
        samples = [{"prompt": "Upper: sea", "answer": f"SEA {value}"}]
        record = {"results": evaluation(task(value)), "samples": samples, "recipe": {"seed": 0, "sft": {"max_steps": steps}}}
        (folder / "artifacts" / "review.json").write_text(json.dumps(record))
        tags = {"review": "pending", "gate": word, "gate.why": "it fell", "code": "source 0", "base_model": "base"}
        number = client.create_model_version(name, folder.as_uri(), tags=tags).version
        client.set_registered_model_alias(name, "candidate", number)
        return int(number)

    add.name = name
    return add


NUMBERS = count()


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a verb of the registry: exit code, and what was printed."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")

    def command(verb, name, *arguments):
        code = cli.main(["registry", verb, name, "--mlflow", mlflow.get_tracking_uri(), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return command


def test_a_review_shows_candidate_and_champion_in_a_pipe_and_as_json(versions, command):
    versions(0.9, steps=4)
    command("approve", versions.name)
    command("promote", versions.name)
    versions(0.7, steps=8)
    code, text = command("review", versions.name)
    assert (code, "Downloading" in text) == (0, False)
    for words in (
        "candidate version 2 (review pending) against champion version 1",
        "gate: failed: worse than the champion: words/exact_match 0.700 ± 0.010 (champion 0.900 ± 0.010)",
        "candidate  SEA 0.7",
    ):
        assert words in text
    assert re.search(r"words/exact_match +0\.700 ± 0\.010 +0\.900 ± 0\.010 +worse", text)
    assert re.search(r"sft\.max_steps +8 +4", text)
    assert "\x1b" not in text
    found = json.loads(command("review", versions.name, "--json")[1])
    assert found["metrics"][0]["candidate"] == {"value": 0.7, "stderr": 0.01}
    assert found["samples"] == [{"prompt": "Upper: sea", "candidate": "SEA 0.7", "champion": "SEA 0.9"}]
    assert found["differences"] == [{"field": "sft.max_steps", "candidate": 8, "champion": 4}]


def test_an_answer_cannot_command_the_terminal_of_its_reviewer():
    samples = [{"prompt": "é 日本", "answer": "a\x1b[2J\x9b1m\x07b"}]
    shown = review.text(review.build(review.Version("name", 1, {}, {"samples": samples}), None))
    assert shown.endswith("> é 日本\n  candidate  a\ufffd[2J\ufffd1m\ufffdb")


def test_a_decision_is_recorded_with_who_when_and_why(versions, command, client):
    versions()
    command("reject", versions.name, "--why", "it repeats itself")
    tags = client.get_model_version(versions.name, "1").tags
    assert (tags["review"], tags["review.by"], tags["review.why"]) == ("rejected", "ada", "it repeats itself")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", tags["review.at"])
    assert "candidate" not in client.get_registered_model(versions.name).aliases
    command("approve", versions.name, "--version", 1)
    tags = client.get_model_version(versions.name, "1").tags
    assert (tags["review"], tags["review.why"]) == ("approved", "-")
    events = sorted((k, v) for k, v in client.get_registered_model(versions.name).tags.items() if k.startswith("event."))
    assert [event for _, event in events] == ["ada rejected version 1: it repeats itself", "ada approved version 1"]


@pytest.mark.parametrize(
    ("is_approved", "word", "value", "why"),
    [
        (False, "passed", 0.9, "its review is pending"),
        (True, "failed", 0.9, "it failed its gate (it fell)"),
        (True, "passed", 0.7, "it fails the gate against version 1 (worse than the champion: words/exact_match 0.700"),
    ],
)
def test_a_promotion_against_the_review_or_the_gate_needs_force_and_a_reason(versions, command, client, is_approved, word, value, why):
    versions(0.9)
    command("approve", versions.name)
    assert command("promote", versions.name)[0] == 0
    versions(value, word)
    if is_approved:
        command("approve", versions.name)
    code, text = command("promote", versions.name)
    assert code == 2
    assert why in text and "--force --why" in text
    assert command("promote", versions.name, "--force")[0] == 2
    assert int(client.get_registered_model(versions.name).aliases["champion"]) == 1
    assert command("promote", versions.name, "--force", "--why", "a demonstration")[0] == 0
    model = client.get_registered_model(versions.name)
    assert {alias: int(number) for alias, number in model.aliases.items()} == {"champion": 2}
    assert client.get_model_version(versions.name, "2").tags["promoted.why"] == "a demonstration"
    assert any(why in line and "a demonstration" in line for key, line in model.tags.items() if key.startswith("event."))


def test_rollback_goes_back_one_champion_at_a_time(versions, command, client):
    for _ in range(3):
        versions()
        command("approve", versions.name)
        command("promote", versions.name)

    def champion():
        return int(client.get_registered_model(versions.name).aliases["champion"])

    assert champion() == 3
    assert "is the champion: take it back first" in command("reject", versions.name, "--version", 3, "--why", "no")[1]
    assert "rolled back from version 3 to version 2: it was slow" in command("rollback", versions.name, "--why", "it was slow")[1]
    assert champion() == 2
    assert client.get_model_version(versions.name, "3").tags["rolled_back.why"] == "it was slow"
    client.delete_model_version(versions.name, "1")
    assert command("rollback", versions.name) == (
        2,
        f"error: '{versions.name}' has no earlier champion to go back to: promote another version\n",
    )
    assert command("promote", versions.name, "--version", 3)[0] == 0
    assert command("rollback", versions.name)[0] == 0
    assert champion() == 2


def test_a_champion_that_was_set_by_hand_is_not_forgotten(versions, command, client):
    versions()
    versions()
    client.set_registered_model_alias(versions.name, "champion", "1")
    command("approve", versions.name)
    command("promote", versions.name)
    assert "from version 2 to version 1" in command("rollback", versions.name)[1]


def test_what_is_not_there_is_named(versions, command):
    assert "there is no registered model 'nobody'" in command("review", "nobody")[1]
    assert "no version of" in command("review", versions.name)[1]
    versions()
    assert "has no version 7" in command("approve", versions.name, "--version", 7)[1]
    assert "has no earlier champion to go back to: no version has been promoted yet" in command("rollback", versions.name)[1]
    command("approve", versions.name)
    command("promote", versions.name)
    assert "is the champion already" in command("promote", versions.name, "--version", 1)[1]
    assert "is the champion: promote another version first" in command("reject", versions.name, "--version", 1, "--why", "no")[1]
