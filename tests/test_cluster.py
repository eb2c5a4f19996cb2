"""The flow on Kubernetes and on AWS Batch, over stand-ins: each step from the uploaded package, in a clean directory of its own.

sft is killed once a training checkpoint is stored, and the retry goes on from there.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from moto.server import ThreadedMotoServer
from stand_ins.aws_batch import Batch
from stand_ins.kubernetes_api import Kubernetes, container
from stand_ins.pod import CREDENTIALS

ROOT = Path(__file__).resolve().parents[1]
FLOW = str(ROOT / "flows" / "a2d_flow.py")
STEPS = ("start", "convert", "pretrain", "sft", "sample", "evaluate", "register", "end")
TOKEN = "hf_this_value_must_not_leave_the_secret"
PRESET = """
base = "smoke"
tracking = {{ uri = "{tracking}" }}
[sft]
max_steps = 160
save_every = 20
eval_every = 80
log_every = 5
[compute]
image = "your-org/a2d:1"
{platform}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def s3():
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="none", aws_secret_access_key="none", region_name="us-east-1"
    )
    client.create_bucket(Bucket="bucket")
    yield SimpleNamespace(url=url, client=client)
    server.stop()


@pytest.fixture(scope="module")
def mlflow_server(place):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", str(place / "artifacts")]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (place / "mlflow.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store],
            cwd=place,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not answers(port):
        assert process.poll() is None, (place / "mlflow.log").read_text()
        time.sleep(0.1)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def environment(place, s3, **more):
    """The machine that starts the run: a user, and Metaflow configured for S3."""
    mine = {
        "METAFLOW_HOME": str(place / "home"),
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(place),
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
        "METAFLOW_S3_ENDPOINT_URL": s3.url,
    }
    return os.environ | CREDENTIALS | mine | more


def run_and_kill_sft(place, s3, service, preset, name, **more):
    """Start the run, end the first sft container with a training checkpoint stored, and wait for the end; its exit code and output."""
    (place / f"{name}.toml").write_text(preset)
    command = [sys.executable, FLOW, "--config-value", "preset", f"{name}.toml", "run", "--objective", "bd3lm"]
    with (place / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=place, env=environment(place, s3, **more), stdout=log, stderr=log)
    while process.poll() is None:
        time.sleep(0.1)
        stored = s3.client.list_objects_v2(Bucket="bucket").get("Contents", ()) if len(service.pods_of("sft")) == 1 else ()
        if any(re.search(r"/sft/.*/0\.training\.[^/]*\.metadata$", item["Key"]) for item in stored):
            service.pods_of("sft")[0].kill()
            break
    process.wait()
    return process.returncode, (place / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def kubernetes(place):
    cluster = Kubernetes(place, secrets={"hf-token": {"HF_TOKEN": TOKEN}})
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def on_kubernetes(place, s3, mlflow_server, kubernetes):
    platform = """platform = "kubernetes"
secrets = ["hf-token"]
[compute.train]
retries = 1
minutes_between_retries = 0
"""
    preset = PRESET.format(tracking=mlflow_server, platform=platform)
    return run_and_kill_sft(place, s3, kubernetes, preset, "kubernetes", KUBECONFIG=str(kubernetes.kubeconfig))


def test_kubernetes(on_kubernetes, kubernetes):
    code, output = on_kubernetes
    print(output)
    for step in STEPS:
        for pod in kubernetes.pods_of(step):
            print("=====", step, pod.home, pod.process.returncode)
            print(pod.log()[-1500:])
    assert code == 0
    assert [len(kubernetes.of_step(step)) for step in STEPS] == [1, 1, 1, 2, 1, 1, 1, 1]
