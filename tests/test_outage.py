"""MLflow that goes away while a model is trained: a real server, killed and frozen. Training goes on; no number is lost or twice."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import pytest
import torch
from families import byte_model
from stand_ins.services import free_port

from a2d_core import __main__ as cli
from a2d_core import presets, tracking, trainer
from a2d_core.config import TrainConfig, UserError
from a2d_core.data import DiffusionCollator
from a2d_core.follow import Follower
from a2d_core.stages import sft

FLOW = str(Path(__file__).resolve().parents[1] / "flows" / "a2d_flow.py")
STEPS = 30
CONFIG = TrainConfig(
    max_length=16, max_steps=STEPS, batch_size=2, precision="float32", eval_every=10, save_every=100, log_every=1,
)  # fmt: skip


class Server:
    """`mlflow server` on sqlite and a port of its own, which is the same after each start."""

    def __init__(self, folder):
        self.port = free_port()
        self.folder, self.uri, self.process = folder, f"http://127.0.0.1:{self.port}", None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            )

    def wait(self):
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def send(self, number):
        """A signal to the server and its workers: SIGKILL, or SIGSTOP, after which it accepts connections and answers none."""
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture(scope="module")
def the_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    with suppress(ProcessLookupError):
        server.send(signal.SIGKILL)


@pytest.fixture
def server(the_server):
    """The server, answering."""
    if the_server.process.poll() is not None:
        the_server.start()
    with suppress(ProcessLookupError):
        the_server.send(signal.SIGCONT)
    the_server.wait()
    tracking.check_server(the_server.uri)
    return the_server


@pytest.fixture
def parent(server):
    return tracking.start_parent(presets.resolve(presets.read("smoke"), "bd3lm"), name="run")


def train(folder, run_id, events, patience=60.0):
    """A training of `STEPS` steps whose numbers go to the run; `events` are step -> what happens when its rows are drawn."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(97, 122, (16,), generator=generator).tolist(), "row": i} for i in range(2 * STEPS)]
    model = byte_model()
    collate, drawn = DiffusionCollator(model.objective, model.eos_token_id), [0]
    follower = Follower(folder, log=tracking.MetricLog(run_id), interval=0.05, patience=patience)

    def draw(batch):
        drawn[0] += 1
        events.get(drawn[0], lambda _: None)(follower)
        return collate(batch)

    with follower:
        numbers = trainer.fit(model, CONFIG, rows, rows[:2], draw, folder, stage="pretrain")
    assert numbers["steps"] == STEPS
    return follower, numbers


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def sent(client, run_id, name="loss"):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def everything_once(run_id, folder):
    """Whether the run has every number of the training's own file, once."""
    client = mlflow.MlflowClient()
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if "loss" in row] == list(range(1, STEPS + 1))
    for name in {name for row in written for name in tracking.finite_numbers(row)}:
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]
        assert sorted(history) == sorted({(row["step"], row[name]) for row in written if name in row}), name
    return True


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_server_that_returns_gets_what_it_missed_and_nothing_twice(blow, server, parent, tmp_path, capsys):
    client = mlflow.MlflowClient()

    def away(follower):
        until(lambda: sent(client, run_id))  # it has begun, so that it is cut off in the middle
        server.send(blow)

    def noticed(follower):
        until(lambda: follower.refused)

    def back(follower):
        server.start() if blow == signal.SIGKILL else server.send(signal.SIGCONT)

    with tracking.stage_run(parent, "pretrain") as run_id:
        follower, numbers = train(tmp_path, run_id, {8: away, 16: noticed, 24: back})
        assert tracking.refusal("pretrain", numbers, follower.refused) is None
    assert everything_once(run_id, tmp_path)
    told = capsys.readouterr().err
    assert "MLflow does not take metrics" in told
    assert "MLflow answers again" in told
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    "blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)], ids=["killed", "frozen, waited for at every call"]
)
def test_what_a_server_that_stays_away_lacks_is_kept_and_sent_by_a_later_step(blow, server, parent, tmp_path, capsys):
    client = mlflow.MlflowClient()

    def away(follower):
        until(lambda: sent(client, run_id))
        server.send(blow)

    with tracking.stage_run(parent, "pretrain") as run_id:
        follower, numbers = train(tmp_path, run_id, {8: away}, patience=0.0)
        assert tracking.refusal("pretrain", numbers, follower.refused)
    assert "MLflow could not be told that pretrain is done" in capsys.readouterr().out
    with pytest.raises(UserError, match="MLflow does not answer"):
        tracking.check_server(server.uri)
    server.start() if blow == signal.SIGKILL else server.send(signal.SIGCONT)
    tracking.check_server(server.uri, patience=120)
    assert len(sent(client, run_id)) < STEPS or blow == signal.SIGSTOP  # what it had read before it froze, it takes
    owed = json.loads(json.dumps({"pretrain": {"rows": follower.rows, "numbers": numbers}}))
    for _ in range(2):  # a later step that fails after it is sent again by the next
        tracking.settle(parent, owed)
        assert everything_once(run_id, tmp_path)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(parent).data.metrics["pretrain/steps"] == STEPS


@contextmanager
def flow(folder, server, *arguments):
    """The flow as a person runs it, with the server as its MLflow."""
    env = {name: value for name, value in os.environ.items() if name != "METAFLOW_USER"}
    env |= {"OMP_NUM_THREADS": "1", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder), "MLFLOW_TRACKING_URI": server.uri}
    with (folder / "flow.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, FLOW, *arguments], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_run_whose_server_stays_away_ends_after_its_training_and_resume_sends_what_was_missing(blow, server, tmp_path):
    def query(text):
        with sqlite3.connect(f"file:{server.folder}/mlflow.db?mode=ro", uri=True) as database:
            return database.execute(text).fetchall()

    steps = 200
    changes = f"tracking.experiment={blow.name} sft.max_steps={steps} sft.log_every=1 sft.eval_every=0.1 sft.save_every=0.1"
    mine = f"from metrics join runs using (run_uuid) join experiments using (experiment_id) where experiments.name = '{blow.name}'"
    with flow(tmp_path, server, "--config-value", "preset", "smoke", "run", "--run-id-file", "first", "--overrides", changes) as first:
        until(lambda: query(f"select 1 {mine} and runs.name = 'sft' and key = 'loss'") or first.poll() is not None, seconds=400)
        server.send(blow)
        assert first.wait(timeout=400) != 0
    told = (tmp_path / "flow.log").read_text()
    for words in ("sft is done, but MLflow does not take its metrics", "/sample/", f"MLflow does not answer at {server.uri}"):
        assert words in told, told
    server.start() if blow == signal.SIGKILL else server.send(signal.SIGCONT)
    server.wait()
    with flow(tmp_path, server, "resume", "--origin-run-id", (tmp_path / "first").read_text()) as again:
        assert again.wait(timeout=400) == 0, (tmp_path / "flow.log").read_text()
    assert "sft starts at step 0" not in (tmp_path / "flow.log").read_text()
    assert query(f"select key, step, count(*) {mine} group by run_uuid, key, step having count(*) > 1") == []
    logged = query(f"select step {mine} and runs.name = 'sft' and key = 'loss' order by step")
    assert [step for (step,) in logged] == list(range(1, steps + 1))
    assert len(query(f"select step {mine} and runs.name = 'sft' and key = 'eval_nelbo'")) == 10
    statuses = query(f"select status from runs join experiments using (experiment_id) where experiments.name = '{blow.name}'")
    assert set(statuses) == {("FINISHED",)}


def test_the_command_line_says_where_its_model_and_metrics_are_and_resume_sends_them(server, tmp_path, monkeypatch, capsys):
    train = ["sft", "--preset", "smoke", "--model", str(tmp_path / "c"), "--output-dir", str(tmp_path / "out"), "--mlflow", server.uri]
    assert cli.main(["convert", "--preset", "smoke", "--objective", "bd3lm", "--output-dir", str(tmp_path / "c")]) == 0
    run = sft.run

    def cut_off(*args, **options):
        server.send(signal.SIGKILL)
        return run(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "run", cut_off)
        patch.setattr(Follower.__init__, "__kwdefaults__", Follower.__init__.__kwdefaults__ | {"patience": 0.0})
        assert cli.main(train) == 2
    assert f"'{tmp_path}/out/checkpoint-final' is its model, but MLflow does not take the metrics" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-final").is_dir()
    server.start()
    server.wait()
    assert cli.main([*train, "--resume"]) == 0
    runs = mlflow.MlflowClient().search_runs(["1"], "tags.`a2d.stage` = 'sft'", order_by=["attributes.start_time DESC"])
    assert sent(mlflow.MlflowClient(), runs[0].info.run_id) == [1, 2, 3, 4]
    assert runs[0].info.status == "FINISHED"
