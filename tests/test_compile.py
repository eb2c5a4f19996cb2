"""The compute profile: what it becomes on each platform, and the 8-GPU preset compiled for Kubernetes, with the code it ships."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from a2d_core import presets
from a2d_core.config import ComputeConfig
from a2d_core.settings import build

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "flows"))

import compute as flow_compute  # noqa: E402  (the flow's folder is no package: Metaflow ships it as it is)

FLOW = str(ROOT / "flows" / "a2d_flow.py")
TRAINING = ("pretrain", "sft")
SECRET = "hf_this_value_must_not_leave_the_machine"


UPLOADS: dict[str, bytes] = {}


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as an upload needs: nothing is there, and what is put is kept."""

    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def do_PUT(self):
        UPLOADS[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def bucket():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The shipped preset, and one of ours on top of it with all that a cluster may ask for."""
    path = tmp_path_factory.mktemp("presets") / "cluster.toml"
    path.write_text(
        'base = "qwen3-0.6b-8gpu"\n[compute]\nnamespace = "ml"\nservice_account = "trainer"\nsecrets = ["hf-token"]\n'
        'node_selector = { "accelerator" = "h100" }\n'
    )
    return str(path)


@pytest.fixture(scope="module")
def manifest(bucket, profile, tmp_path_factory):
    env = os.environ | {
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
        "METAFLOW_S3_ENDPOINT_URL": bucket,
        "METAFLOW_KUBERNETES_NAMESPACE": "ml",  # Argo wants it beside the preset's
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # else boto3 wraps the body in chunks
        "HF_TOKEN": SECRET,
    }
    command = [sys.executable, FLOW, "--config-value", "preset", profile, "argo-workflows", "create", "--only-json"]
    done = subprocess.run(command, env=env, cwd=tmp_path_factory.mktemp("argo"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compute(profile):
    return build(ComputeConfig, presets.read(profile)["compute"])


@pytest.fixture(scope="module")
def templates(manifest):
    return {t["name"]: t for t in manifest["spec"]["templates"] if t.get("container")}


@pytest.mark.parametrize("step", TRAINING)
def test_a_training_step_asks_for_eight_gpus_and_the_shared_memory_that_they_need(step, templates, compute):
    template = templates[step]
    resources = template["container"]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "8"  # which is a request too
    assert float(resources["requests"]["cpu"]) == compute.train.cpu
    assert float(resources["requests"]["memory"].removesuffix("M")) == compute.train.memory_mb
    assert float(resources["requests"]["ephemeral-storage"].removesuffix("M")) == compute.train.disk_mb
    assert any(v.get("emptyDir", {}).get("sizeLimit") == f"{compute.train.shared_memory_mb}Mi" for v in template["volumes"])
    assert template["nodeSelector"] == {"accelerator": "h100"}


def test_steps_without_a_gpu_go_to_any_node(templates):
    for step in ("start", "register", "end"):
        assert not (templates[step]["container"]["resources"].get("limits") or {}).get("nvidia.com/gpu")
        assert not templates[step].get("nodeSelector")


def test_a_secret_is_named_and_its_value_is_nowhere(manifest, templates):
    assert SECRET not in json.dumps(manifest)
    assert "hf-token" in [source["secretRef"]["name"] for source in templates["sft"]["container"]["envFrom"]]


@pytest.fixture(scope="module")
def unpacked(manifest, tmp_path_factory):
    """What a pod downloads, unpacked as the pod does it."""
    folder = tmp_path_factory.mktemp("pod")
    for content in UPLOADS.values():
        if content.startswith(b"\x1f\x8b"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(folder, filter="data")
    return folder


def test_the_code_package_holds_the_library_with_its_presets_and_tasks(unpacked):
    library = unpacked / ".mf_code" / "a2d_core"
    source = ROOT / "a2d_core"
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.suffix in (".py", ".toml", ".yaml")}
    assert {path.relative_to(library) for path in library.rglob("*") if path.is_file()} == wanted
    assert {"a2d_flow.py", "compute.py", "cards.py"} <= {path.name for path in unpacked.iterdir()}


def test_the_code_package_works_where_there_is_no_checkout(unpacked):
    env = os.environ | {"PYTHONPATH": str(unpacked / ".mf_code"), "METAFLOW_EXTRACTED_ROOT": str(unpacked)}
    code = (
        "import a2d_core, a2d_core.presets as p, cards, compute; print(a2d_core.__file__, p.names(), compute.read_preset('tiny')['name'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=unpacked, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked))


def test_a_preset_is_a_name_a_path_or_the_text_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('base = "smoke"\n[sft]\nmax_steps = 9\n')
    for text in ("mine.toml", 'base = "mine.toml"', '{"base": "smoke", "sft": {"max_steps": 9}}', (tmp_path / "mine.toml").read_text()):
        preset = flow_compute.read_preset(text)
        assert (preset["sft"]["max_steps"], preset["convert"]["model"]) == (9, "embedded:smoke")
    for text in ("smok", "{", "a = ", "missing.toml"):
        with pytest.raises(flow_compute.Refusal):
            flow_compute.read_preset(text)


def test_local_steps_have_resources_and_a_time_limit_and_no_platform():
    profile = flow_compute.read_compute(presets.read("tiny"))
    made = flow_compute.decorators(profile, profile.train)
    assert made == {"resources": {"cpu": 2, "memory": 3072}, "timeout": {"minutes": 60}}


def test_a_local_profile_knows_when_the_run_was_sent_elsewhere(monkeypatch):
    profile = flow_compute.read_compute(presets.read("tiny"))
    monkeypatch.delenv("METAFLOW_RUNTIME_ENVIRONMENT", raising=False)
    assert flow_compute.platform_here(profile) == "local"
    monkeypatch.setenv("METAFLOW_RUNTIME_ENVIRONMENT", "kubernetes")  # as Metaflow does in a pod
    assert flow_compute.platform_here(profile) == "kubernetes"


def test_batch_has_its_queue_and_refuses_what_is_kubernetes_own():
    preset = presets.read("qwen3-0.6b-batch")
    profile = flow_compute.read_compute(preset)
    made = flow_compute.decorators(profile, profile.train)
    assert made["batch"] == {"image": profile.image, "queue": profile.queue}
    assert made["resources"]["gpu"] == 8
    assert "kubernetes" not in made
    preset["compute"]["secrets"] = ["hf"]
    profile = flow_compute.read_compute(preset)
    made = flow_compute.decorators(profile, profile.train)
    assert made["secrets"] == {"sources": [{"type": "aws-secrets-manager", "id": "hf"}]}
    preset["compute"]["train"]["tolerations"] = [{"key": "spot"}]
    with pytest.raises(flow_compute.UserError, match=r"compute\.platform is batch, which knows no compute\.train\.tolerations"):
        flow_compute.read_compute(preset)
    with pytest.raises(flow_compute.UserError, match=r"kubernetes, which knows no compute\.queue"):
        flow_compute.read_compute(preset | {"compute": preset["compute"] | {"platform": "kubernetes"}})


def test_an_override_may_change_the_processes_of_a_step_and_their_strategy_and_nothing_else_of_the_profile():
    preset = presets.read("tiny")
    flow_compute.check_compute(presets.resolve(preset, "bd3lm", ["compute.train.processes=2", "compute.train.strategy=fsdp2"]), preset)
    with pytest.raises(flow_compute.UserError, match=r"compute\.train cannot be changed"):
        flow_compute.check_compute(presets.resolve(preset, "bd3lm", ["compute.train.cpu=9"]), preset)
    preset["mdlm"] = {"compute": {"platform": "batch"}}
    with pytest.raises(flow_compute.UserError, match=r"compute\.platform cannot be changed"):
        flow_compute.check_compute(presets.resolve(preset, "mdlm"), preset)
