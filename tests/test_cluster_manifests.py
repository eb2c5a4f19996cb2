"""Every preset as a deployed workflow: Argo's for Kubernetes, Step Functions' for AWS Batch, checked against the platforms' own schemas."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import botocore.session
import kubernetes_validate
import pytest
from botocore.validate import validate_parameters
from hera.workflows.models import WorkflowTemplate
from stand_ins.aws_batch import Batch
from stand_ins.services import Aws, free_port, user_environment

from a2d_core import presets
from a2d_core.config import ComputeConfig
from a2d_core.settings import build

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "flows"))

import compute as flow_compute  # noqa: E402  (the flow's folder is no package: Metaflow ships it as it is)

STEPS = ("start", "convert", "pretrain", "sft", "sample", "evaluate", "register", "end")
SECRET = "hf_this_value_must_not_leave_the_machine"
IMAGE = "your-org/a2d:configured"
OURS = """
name = "ours"
base = "qwen3-0.6b-8gpu"
[compute]
namespace = "ml"
service_account = "trainer"
secrets = ["hf-token"]
node_selector = { accelerator = "h100" }
tolerations = [{ key = "nvidia.com/gpu", effect = "NoSchedule" }]
[compute.train]
tolerations = [{ key = "nvidia.com/gpu" }, { key = "capacity", operator = "Equal", value = "spot", effect = "NoExecute" }]
[compute.register]
image = "your-org/a2d:small"
secrets = []
"""
OURS_ON_BATCH = """
name = "ours-on-batch"
base = "qwen3-0.6b-batch"
[compute]
secrets = ["hf-token"]
[compute.register]
queue = "a2d-cpu"
"""
RECIPES = {name: presets.read(name) for name in presets.names()}
COMPUTE = {name: build(ComputeConfig, recipe.get("compute", {})) for name, recipe in RECIPES.items()}
ON_ARGO = [name for name, compute in COMPUTE.items() if compute.platform != "batch"]
ON_BATCH = [name for name, compute in COMPUTE.items() if compute.platform == "batch"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Preset -> the manifest of its workflow and its compute profile; presets with one profile between them have one manifest."""
    place = tmp_path_factory.mktemp("manifests")
    for name, text in (("ours", OURS), ("ours-on-batch", OURS_ON_BATCH)):
        (place / f"{name}.toml").write_text(text)
    aws, batch = Aws(), Batch(place, free_port(), "a2d-gpu", "a2d-cpu")
    role = "arn:aws:iam::123456789012:role/metaflow"
    env = user_environment(
        place,
        aws,
        AWS_ENDPOINT_URL_SFN=aws.url,
        AWS_ENDPOINT_URL_BATCH=batch.url,
        METAFLOW_ECS_S3_ACCESS_IAM_ROLE=role,
        METAFLOW_SFN_IAM_ROLE=role,
        METAFLOW_KUBERNETES_NAMESPACE="ml",  # Argo wants it beside the preset's
        METAFLOW_KUBERNETES_CONTAINER_IMAGE=IMAGE,  # for a preset that names none
        **dict.fromkeys(("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"), SECRET),
    )

    @cache
    def manifest(preset: str, command: str) -> dict:
        done = subprocess.run(
            [sys.executable, str(ROOT / "flows" / "a2d_flow.py"), "--config-value", "preset", preset, command, "create", "--only-json"],
            env=env,
            cwd=place,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def of(name: str) -> tuple[dict, ComputeConfig]:
        if name not in COMPUTE:
            path = f"{name}.toml"
            compute = build(ComputeConfig, presets.read(str(place / path))["compute"])
        else:
            compute = COMPUTE[name]
            path = next(other for other in COMPUTE if COMPUTE[other] == compute)
        return manifest(path, "step-functions" if compute.platform == "batch" else "argo-workflows"), compute

    yield of, batch
    batch.close()
    aws.server.stop()


@pytest.mark.parametrize("name", [*ON_ARGO, "ours"])
def test_argo_and_kubernetes_accept_a_preset_and_each_step_asks_for_what_its_profile_says(name, compiled):
    manifest, compute = compiled[0](name)
    WorkflowTemplate.model_validate(manifest)
    assert SECRET not in json.dumps(manifest)
    templates = {template["name"]: template for template in manifest["spec"]["templates"] if template.get("container")}
    assert set(STEPS) <= set(templates)
    for step in STEPS:
        need, template = flow_compute.need_of(step, compute), templates[step]
        container = template["container"]
        kubernetes_validate.validate(job(template), kubernetes_validate.latest_version(), strict=True)
        assert container["image"] == (need.image or compute.image or IMAGE)
        assert template.get("retryStrategy", {}).get("limit", 0) == need.retries
        assert template["activeDeadlineSeconds"] == need.timeout_minutes * 60
        asked, limits = container["resources"]["requests"], container["resources"].get("limits") or {}
        least = 4096 if compute.platform == "local" else 0  # where Metaflow adds @kubernetes by itself
        assert (float(asked["cpu"]), megabytes(asked["memory"])) == (need.cpu, max(need.memory_mb, least))
        assert int(limits.get("nvidia.com/gpu", 0)) == need.gpu
        assert need.disk_mb is None or megabytes(asked["ephemeral-storage"]) == need.disk_mb
        volumes = [volume.get("emptyDir", {}) for volume in template.get("volumes") or []]
        shared = [volume["sizeLimit"] for volume in volumes if "sizeLimit" in volume]
        assert shared == ([f"{need.shared_memory_mb}Mi"] if need.shared_memory_mb else [])


def megabytes(quantity: str) -> float:
    return float(quantity.removesuffix("M"))


def job(template: dict) -> dict:
    """A Job with the pod that Argo makes of a template."""
    container = {key: value for key, value in template["container"].items() if value is not None}
    pod = {"restartPolicy": "Never", "containers": [container]}
    for field in ("volumes", "tolerations", "nodeSelector", "serviceAccountName", "activeDeadlineSeconds"):
        if template.get(field):
            pod[field] = template[field]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": template["name"]}, "spec": {"template": {"spec": pod}}}


def test_nodes_taints_and_secrets_come_from_the_profile_and_a_step_may_have_its_own(compiled):
    templates = {template["name"]: template for template in compiled[0]("ours")[0]["spec"]["templates"] if template.get("container")}
    on_gpus = {"key": "nvidia.com/gpu", "operator": "Exists"}
    spot = {"key": "capacity", "operator": "Equal", "value": "spot", "effect": "NoExecute"}
    assert templates["sft"]["tolerations"] == [on_gpus, spot]
    assert templates["evaluate"]["tolerations"] == [on_gpus | {"effect": "NoSchedule"}]
    assert not templates["register"].get("tolerations")
    assert templates["convert"]["nodeSelector"] == {"accelerator": "h100"} and not templates["end"].get("nodeSelector")
    assert {template["serviceAccountName"] for template in templates.values()} == {"trainer"}
    secrets = {step: [source["secretRef"]["name"] for source in templates[step]["container"].get("envFrom") or []] for step in STEPS}
    assert secrets == {step: [] if step in ("start", "register", "end") else ["hf-token"] for step in STEPS}


@pytest.mark.parametrize("name", [*ON_BATCH, "ours-on-batch"])
def test_aws_batch_accepts_each_state_and_a_step_asks_for_what_its_profile_says(name, compiled):
    (machine, compute), batch = compiled[0](name), compiled[1]
    assert SECRET not in json.dumps(machine)
    submit = botocore.session.get_session().get_service_model("batch").operation_model("SubmitJob").input_shape
    step, seen = machine["StartAt"], []
    while step:
        state = machine["States"][step]
        need = flow_compute.need_of(step, compute)
        request = as_request(state["Parameters"])
        assert state["Resource"] == "arn:aws:states:::batch:submitJob.sync"
        validate_parameters(request, submit)
        asked = {item["type"]: item["value"] for item in request["containerOverrides"]["resourceRequirements"]}
        assert asked == {"VCPU": str(need.cpu), "MEMORY": str(need.memory_mb)} | ({"GPU": str(need.gpu)} if need.gpu else {})
        definition = batch.store.get_job_definition_by_arn(request["jobDefinition"])["containerProperties"]
        assert definition["image"] == (need.image or compute.image)
        assert definition["linuxParameters"].get("sharedMemorySize") == need.shared_memory_mb
        assert request["jobQueue"] == (need.queue or compute.queue)
        assert request["timeout"]["attemptDurationSeconds"] == need.timeout_minutes * 60
        assert request["retryStrategy"]["attempts"] == need.retries + 1
        seen.append(step)
        step = state.get("Next")
    assert tuple(seen) == STEPS


def as_request(value):
    """A state's parameters as the request that Step Functions makes of them: its own spelling, and references filled in."""
    if isinstance(value, dict):
        keys = {key: key.removesuffix(".$") for key in value}
        return {key if key.startswith("metaflow.") else key[0].lower() + key[1:]: as_request(value[old]) for old, key in keys.items()}
    return [as_request(item) for item in value] if isinstance(value, list) else value
