"""The flow on Kubernetes and on AWS Batch, over stand-ins: each step from the uploaded package, in a clean directory of its own.

sft is killed once a training checkpoint is stored, and its retry goes on from there.
"""

import json
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_ins.aws_batch import Batch
from stand_ins.kubernetes_api import Kubernetes, container
from stand_ins.services import Aws, free_port, metadata_service, mlflow_server, user_environment

FLOW = str(Path(__file__).resolve().parents[1] / "flows" / "a2d_flow.py")
STEPS = ("start", "convert", "pretrain", "sft", "sample", "evaluate", "register", "end")
STAGES = ("pretrain", "sample", "evaluate", "register")
SECRET = "hf_this_value_must_not_leave_the_secret"
PRESET = """
base = "smoke"
tracking = {{ uri = "{tracking}" }}
[sft]
max_steps = 100
save_every = 20
eval_every = 50
log_every = 5
[compute]
platform = "{platform}"
image = "your-org/a2d:1"
secrets = ["hf-token"]
"""
SPOT = """
[compute.train]
cpu = 3
memory_mb = 3000
shared_memory_mb = 512
retries = 1
minutes_between_retries = 0
"""
SPOT_NODES = """node_selector = { capacity = "spot" }
tolerations = [{ key = "capacity", operator = "Equal", value = "spot" }]
"""
QUICK = "".join(f"[{stage}]\nenabled = false\n" for stage in STAGES)  # their steps run, and pass the model on


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def aws():
    service = Aws()
    yield service
    service.server.stop()


@pytest.fixture(scope="module")
def tracking(place):
    with mlflow_server(place) as url:
        yield url


def run_and_kill_sft(place, aws, service, name, preset, **more):
    """Start a run, end the first sft container when a training checkpoint is stored; the run's exit code and output."""
    (place / f"{name}.toml").write_text(preset)
    command = [sys.executable, FLOW, "--config-value", "preset", f"{name}.toml"]
    log = place / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "run", "--objective", "bd3lm", "--run-id-file", f"{name}.id"],
            cwd=place,
            env=user_environment(place, aws, **more),
            stdout=file,
            stderr=file,
        )
    is_checkpoint = re.compile(r"/sft/.*/0\.training\.[^/]*\.metadata$").search
    while process.poll() is None:
        time.sleep(0.1)
        run_id = (place / f"{name}.id").read_text() if service.pods_of("sft") else ""
        if run_id and any(is_checkpoint(key) for key in aws.stored() if run_id in key):
            service.pods_of("sft")[0].kill()
            break
    return process.wait(), log.read_text()


def check(place, service, name, outcome):
    """What must hold on either platform."""
    code, output = outcome
    assert code == 0, output
    assert [len(service.of_step(step)) for step in STEPS] == [1, 1, 1, 2, 1, 1, 1, 1]
    for pod in (pod for step in STEPS for pod in service.pods_of(step)):
        package = pod.home / "metaflow" / ".mf_code" / "a2d_core"
        assert (pod.home / "metaflow" / "a2d_flow.py").is_file()
        assert list(package.glob("__pycache__/config.*.pyc"))  # Python has imported this copy
    killed, again = service.pods_of("sft")
    assert killed.killed and not again.killed
    [step] = re.findall(r"sft goes on from step (\d+)", output)
    assert int(step) >= 20
    assert "step 100/100" in output
    with sqlite3.connect(f"file:{place}/mlflow.db?mode=ro", uri=True) as database:
        mine = "select run_uuid from tags where key = 'metaflow.run' and value = ?"
        [(parent, status)] = database.execute(
            f"select run_uuid, status from runs where run_uuid in ({mine})", [f"A2DFlow/{(place / f'{name}.id').read_text()}"]
        ).fetchall()
        steps = database.execute(
            "select step from metrics m join runs r using (run_uuid) join tags t using (run_uuid) where r.name = 'sft'"
            " and m.key = 'loss' and t.key = 'mlflow.parentRunId' and t.value = ? order by step",
            [parent],
        ).fetchall()
    assert status == "FINISHED"
    assert [step for (step,) in steps] == list(range(5, 101, 5))  # none twice, and none lost


def on_kubernetes(place, aws, tracking, name, extra="", **more):
    cluster = Kubernetes(place, secrets={"hf-token": {"HF_TOKEN": SECRET}})
    try:
        preset = PRESET.format(tracking=tracking, platform="kubernetes") + SPOT + SPOT_NODES + extra
        outcome = run_and_kill_sft(place, aws, cluster, name, preset, KUBECONFIG=str(cluster.kubeconfig), **more)
        check(place, cluster, name, outcome)
    finally:
        cluster.close()
    return cluster, outcome[1]


@pytest.mark.long
def test_on_kubernetes_each_step_runs_from_the_package_and_a_killed_one_goes_on_from_its_checkpoint(place, aws, tracking):
    cluster, _ = on_kubernetes(place, aws, tracking, "kubernetes", QUICK)
    for job in cluster.of_step("sft"):
        pod, asked = job["spec"]["template"]["spec"], container(job)["resources"]["requests"]
        assert (float(asked["cpu"]), float(asked["memory"].removesuffix("M"))) == (3, 3000)
        assert [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"]] == ["512Mi"]
        assert pod["nodeSelector"] == {"capacity": "spot"}
        assert pod["tolerations"] == [{"key": "capacity", "operator": "Equal", "value": "spot"}]
        assert container(job)["image"] == "your-org/a2d:1"
    [job] = cluster.of_step("convert")
    assert not job["spec"]["template"]["spec"].get("tolerations")
    assert [source["secretRef"]["name"] for source in container(job)["envFrom"]] == ["hf-token"]
    assert SECRET not in json.dumps(cluster.jobs)


@pytest.mark.long
def test_a_local_preset_that_is_sent_to_kubernetes_refuses_a_database_that_its_pods_cannot_share(place, aws):
    cluster = Kubernetes(place, secrets={})
    command = [sys.executable, FLOW, "--config-value", "preset", "smoke", "run", "--with", "kubernetes:image=your-org/a2d:1"]
    env = user_environment(place, aws, KUBECONFIG=str(cluster.kubeconfig))
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    cluster.close()
    assert done.returncode == 1
    assert "steps on kubernetes cannot share sqlite:" in done.stdout + done.stderr
    assert len(cluster.jobs) == 1


@pytest.mark.long
def test_all_stages_work_on_kubernetes_and_with_a_metadata_service_their_cards_too(place, aws, tracking):
    with metadata_service(place) as url:
        more = {"METAFLOW_SERVICE_URL": url, "METAFLOW_SERVICE_INTERNAL_URL": url, "METAFLOW_DEFAULT_METADATA": "service"}
        _, output = on_kubernetes(place, aws, tracking, "everything", **more)
    assert "Created version '1' of model 'a2d-everything-bd3lm'" in output
    assert "Card render failed" not in output
    run_id = (place / "everything.id").read_text()
    for step in ("pretrain", "sft", "sample", "evaluate"):
        cards = [key for key in aws.stored() if f"/{run_id}/" in key and f"/{step}/" in key and key.endswith(".html")]
        assert cards and all(b"<html" in aws.read(card) for card in cards), step


@pytest.mark.long
def test_on_aws_batch_each_step_runs_from_the_package_and_a_killed_one_goes_on_from_its_checkpoint(place, aws, tracking):
    aws.client("secretsmanager").create_secret(Name="hf-token", SecretString=json.dumps({"HF_TOKEN": SECRET}))
    batch = Batch(place, free_port(), "a2d-cpu", "a2d-train")
    preset = PRESET.format(tracking=tracking, platform="batch") + 'queue = "a2d-cpu"\n' + SPOT + 'queue = "a2d-train"\n' + QUICK
    role = "arn:aws:iam::123456789012:role/metaflow"
    batch.runner.inject_env = {"AWS_ENDPOINT_URL_SECRETS_MANAGER": aws.url}
    try:
        more = {"AWS_ENDPOINT_URL_BATCH": batch.url, "METAFLOW_ECS_S3_ACCESS_IAM_ROLE": role}
        check(place, batch, "batch", run_and_kill_sft(place, aws, batch, "batch", preset, **more))
    finally:
        batch.close()
    assert {job["jobQueue"] for job in batch.of_step("sft")} == {"a2d-train"}
    assert {job["jobQueue"] for job in batch.of_step("convert")} == {"a2d-cpu"}
    for job in batch.of_step("sft"):
        asked = {item["type"]: item["value"] for item in job["containerOverrides"]["resourceRequirements"]}
        assert asked == {"VCPU": "3", "MEMORY": "3000"}
        definition = batch.store.get_job_definition_by_arn(job["jobDefinition"])["containerProperties"]
        assert definition["linuxParameters"]["sharedMemorySize"] == 512
    assert SECRET not in json.dumps(batch.store.get_jobs())
