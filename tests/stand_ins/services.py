"""The services beside the cluster: S3 and Secrets Manager (moto), MLflow, Metaflow's metadata, and a machine set up for them."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from stand_ins.pod import CREDENTIALS

BUCKET = "bucket"


class Aws:
    """moto's server: `url`, and clients to look into it with."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request otherwise
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.url = "http://{}:{}".format(*self.server.get_host_and_port())
        self.client("s3").create_bucket(Bucket=BUCKET)

    def client(self, service: str) -> Any:
        keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.url, **keys)

    def stored(self) -> list[str]:
        """The keys of all that is stored."""
        pages = self.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return self.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()


def user_environment(place: Path, aws: Aws, **more: str) -> dict[str, str]:
    """The machine that starts runs: a user, and Metaflow configured for S3."""
    mine = {
        "METAFLOW_HOME": str(place / "home"),
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(place),
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": f"s3://{BUCKET}/metaflow",
        "METAFLOW_S3_ENDPOINT_URL": aws.url,
    }
    return os.environ | CREDENTIALS | mine | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(place: Path, name: str, port: int, command: list[str], **more: str) -> Iterator[str]:
    """A server as a process of its own, from when it answers."""
    log = place / f"{name}.log"
    with log.open("w") as file:
        options: dict[str, Any] = {"cwd": place, "stdout": file, "stderr": file, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], env=os.environ | more, **options)
    try:
        while not answers(port):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def mlflow_server(place: Path) -> Iterator[str]:
    port = free_port()
    stores = ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", str(place / "artifacts")]
    command = ["-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores]
    with serving(place, "mlflow", port, command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false") as url:
        yield url


@contextmanager
def metadata_service(place: Path) -> Iterator[str]:
    port = free_port()
    code = f"import uvicorn; from metaflow_local_service.server import create_app; uvicorn.run(create_app({str(place)!r}), port={port})"
    with serving(place, "metadata", port, ["-c", code]) as url:
        yield url
