"""A team's MLflow: four flows at once against one server, started as the Kubernetes manifest starts it, on PostgreSQL and S3."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
import psycopg2
import pytest
import yaml
from stand_ins.pod import CREDENTIALS
from stand_ins.services import Aws, free_port

from a2d_core import checkpoints, presets, registry, tracking
from a2d_core.config import SampleConfig

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
PASSWORD = "of-this-test-alone"
FLOWS = [("bd3lm", 0), ("mdlm", 0), ("bd3lm", 1), ("mdlm", 1)]
STAGES = {"convert", "pretrain", "sft", "sample", "evaluate", "register"}
STEPS = [1, 2, 3, 4]
TROUBLE = r"(?i)\b(dead)?lock(ed|s)?\b|serialize|OperationalError|QueuePool|too many (clients|connections)|Traceback|Internal Server Error"
EXPECTED = ("duplicate key value violates unique constraint", "the database system is starting up")  # the former: two made the same thing


@contextmanager
def running(command, log, **options):
    """A process of this test, with its output in a file; it is asked to stop at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # to PostgreSQL: end all sessions now
        process.wait(timeout=60)


def wait_until(is_ready, process, log):
    deadline = time.monotonic() + 240
    while not is_ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@contextmanager
def postgres(room, log):
    """Debian's PostgreSQL on a loopback port, with the user and the database of the manifest; yields the port."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    assert found, "this test needs PostgreSQL: apt-get install postgresql"
    binaries, data, port = found[-1].parent, room / "data", free_port()
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to work for root
    if user:
        shutil.chown(room, "postgres", "postgres")
    (room / "password").write_text(PASSWORD)
    (room / "password").chmod(0o644)
    initdb = [binaries / "initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={room / 'password'}", "--encoding=UTF8"]
    subprocess.run(initdb, check=True, cwd=room, stdout=subprocess.DEVNULL, **user)
    arguments = container("postgres.yaml", "StatefulSet")["args"]
    command = [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", room, *arguments]
    with running(command, log, cwd=room, **user) as process:
        ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, process, log)
        with_password = os.environ | {"PGPASSWORD": PASSWORD}
        subprocess.run([binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"], check=True, env=with_password)
        yield port


def manifest(file, kind):
    documents = yaml.safe_load_all((ROOT / "infra" / "kubernetes" / file).read_text())
    return next(document for document in documents if document["kind"] == kind)


def container(file, kind):
    return manifest(file, kind)["spec"]["template"]["spec"]["containers"][0]


def server_of_the_manifest(port, postgres_port):
    """The command and the environment of the Deployment, with this machine's addresses in the place of the cluster's."""
    pod = container("mlflow.yaml", "Deployment")
    values = dict(manifest("settings.yaml", "ConfigMap")["data"])
    for variable in pod["env"]:
        values[variable["name"]] = variable.get("value", PASSWORD).replace("$(POSTGRES_PASSWORD)", PASSWORD)
    values["MLFLOW_BACKEND_STORE_URI"] = values["MLFLOW_BACKEND_STORE_URI"].replace("@postgres:5432", f"@127.0.0.1:{postgres_port}")
    here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
    arguments = [here.get(argument, argument).replace("localhost:5000", f"127.0.0.1:{port}") for argument in pod["args"]]
    return [sys.executable, "-m", *pod["command"], *arguments], values


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The server's URI, a connection to its database, its bucket, and where the logs are."""
    logs = tmp_path_factory.mktemp("team")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        aws = Aws()
        stack.callback(aws.server.stop)
        bucket = aws.client("s3")
        bucket.create_bucket(Bucket="your-bucket")
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="a2d-postgres-")))  # pytest's own is closed to others
        port, database_port = free_port(), stack.enter_context(postgres(room, logs / "postgres.log"))
        command, values = server_of_the_manifest(port, database_port)
        environment = os.environ | values | CREDENTIALS | {"MLFLOW_S3_ENDPOINT_URL": aws.url, "HOME": str(logs)}
        (logs / "cwd").mkdir()
        server = stack.enter_context(running(command, logs / "mlflow.log", env=environment, cwd=logs / "cwd"))
        uri = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{uri}/health"), server, logs / "mlflow.log")
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        database = psycopg2.connect(values["MLFLOW_BACKEND_STORE_URI"].replace("+psycopg2", ""))
        database.autocommit = True
        stack.callback(database.close)
        yield {"uri": uri, "database": database, "bucket": bucket, "logs": logs}


def answers(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return response.status == 200
    except OSError:
        return False


def query(team, text):
    with team["database"].cursor() as cursor:
        cursor.execute(text)
        return cursor.fetchall()


@pytest.fixture(scope="module")
def flows(team):
    """The Metaflow run ids of four flows that ran at once, each on a datastore of its own, as on four machines."""
    started = []
    for objective, seed in FLOWS:
        place = team["logs"] / f"{objective}-{seed}"
        place.mkdir()
        command = [sys.executable, str(ROOT / "flows" / "a2d_flow.py"), "--config-value", "preset", "smoke", "run", "--run-id-file", "id"]
        options = ["--objective", objective, "--seed", str(seed), "--overrides", "register.name=team"]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(place),
            "MLFLOW_TRACKING_URI": team["uri"],
        }
        with (place / "log").open("w") as log:
            process = subprocess.Popen([*command, *options], cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)
        started.append((place, process))
    for place, process in started:
        assert process.wait(timeout=1500) == 0, (place / "log").read_text()
    return [(place / "id").read_text() for place, _ in started]


def test_the_server_answers_to_the_names_of_its_service_and_to_no_other(team):
    service = manifest("mlflow.yaml", "Service")["metadata"]["name"]
    for host, is_known in ((f"{service}.a2d:5000", True), (f"{service}:5000", True), ("elsewhere.example", False)):
        assert answers(f"{team['uri']}/api/2.0/mlflow/experiments/search?max_results=1", Host=host) == is_known


def test_runs_that_begin_at_once_make_one_experiment(team):
    recipe = presets.resolve(presets.read("smoke"), "bd3lm", ["tracking.experiment=at-once"])
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda number: tracking.start_parent(recipe, name=str(number)), range(8)))
    client = mlflow.MlflowClient()
    assert len({client.get_run(run).info.experiment_id for run in runs}) == 1


def test_versions_that_are_registered_at_once_have_numbers_of_their_own(team, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    recipe = presets.resolve(presets.read("smoke"), "bd3lm", ["tracking.experiment=at-once"])

    def register(number):
        parent = tracking.start_parent(recipe, name=str(number))
        with tracking.stage_run(parent, "register"):
            tags = {"mlflow.parent_run": parent}
            return registry.register(tmp_path, name="at-once", tags=tags, metrics={}, sample=SampleConfig())["version"]

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(register, range(8))) == list(range(1, 9))
    client = mlflow.MlflowClient()
    assert client.get_model_version_by_alias("at-once", "candidate").version == "8"


def test_each_flow_has_its_finished_parent_and_all_its_children(team, flows):
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("a2d").experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert sorted(run.data.tags["metaflow.run"] for run in parents.values()) == sorted(f"A2DFlow/{number}" for number in flows)
    assert sorted((run.data.params["objective"], int(run.data.params["seed"])) for run in parents.values()) == sorted(FLOWS)
    children = sorted((run.data.tags["mlflow.parentRunId"], run.data.tags["a2d.stage"]) for run in runs if run.info.run_id not in parents)
    assert children == sorted((parent, stage) for parent in parents for stage in STAGES)


def test_every_number_is_there_once(team, flows):
    assert query(team, "select run_uuid, key, step from metrics group by run_uuid, key, step having count(*) > 1") == []
    for key in ("loss", "grad_norm"):
        curves = query(
            team,
            "select run_uuid, array_agg(step order by step) from metrics join tags using (run_uuid) "
            f"where metrics.key = '{key}' and tags.key = 'a2d.stage' and tags.value in ('pretrain', 'sft') group by run_uuid",
        )
        assert [steps for _, steps in curves] == [STEPS] * 2 * len(FLOWS)


def test_each_flow_registered_a_version_of_its_own_that_loads_from_s3(team, flows):
    versions = mlflow.MlflowClient().search_model_versions("name = 'team'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4]
    assert sorted(version.tags["metaflow.run"] for version in versions) == sorted(f"A2DFlow/{number}" for number in flows)
    for version in versions:
        checkpoint = tracking.checkpoint_of(f"models:/team/{version.version}")
        assert checkpoints.digest(checkpoint) == version.tags[registry.DIGEST_TAG]
    assert len({version.tags[registry.DIGEST_TAG] for version in versions}) == len(FLOWS)


def test_every_artifact_lies_in_the_bucket(team, flows):
    pages = team["bucket"].get_paginator("list_objects_v2").paginate(Bucket="your-bucket")
    keys = {found["Key"] for page in pages for found in page.get("Contents", [])}
    client = mlflow.MlflowClient()
    for run in client.search_runs([client.get_experiment_by_name("a2d").experiment_id], max_results=1000):
        folder = run.info.artifact_uri.replace("mlflow-artifacts:/", "mlflow/")
        for artifact in client.list_artifacts(run.info.run_id):
            assert f"{folder}/{artifact.path}" in keys
        if "mlflow.parentRunId" not in run.data.tags:
            stored = team["bucket"].get_object(Bucket="your-bucket", Key=f"{folder}/recipe.json")["Body"].read()
            assert json.loads(stored)["objective"] == run.data.params["objective"]


def test_no_log_speaks_of_locks_or_of_a_failure(team, flows):
    logs = [team["logs"] / "mlflow.log", team["logs"] / "postgres.log", *(team["logs"] / f"{o}-{s}" / "log" for o, s in FLOWS)]
    for log in logs:
        lines = [line for line in log.read_text().splitlines() if re.search(TROUBLE, line)]
        assert not lines, f"{log.name}: {lines}"
    errors = re.findall(r" (?:ERROR|FATAL|PANIC):  (.*)", (team["logs"] / "postgres.log").read_text())
    assert [error for error in errors if not error.startswith(EXPECTED)] == []


def test_the_server_writes_nothing_outside_its_scratch_volume(team, flows):
    assert list((team["logs"] / "cwd").iterdir()) == []  # the pod's file system is read-only
