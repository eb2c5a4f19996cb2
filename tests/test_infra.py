"""infra/: each file against its schema, offline, and against the others: names, ports, images and roles agree."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hera.workflows.models import WorkflowTemplate
from stand_ins.pod import CREDENTIALS
from stand_ins.services import Aws

from a2d_core import presets

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
README = (INFRA / "README.md").read_text()
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.strip().splitlines()]
FLOWS = [command for command in COMMANDS if "a2d_flow.py" in command]
KUSTOMIZATION = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())
OBJECTS = [d for name in KUSTOMIZATION["resources"] for d in yaml.safe_load_all((INFRA / "kubernetes" / name).read_text())]
PODS = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in OBJECTS if d["kind"] in ("Deployment", "StatefulSet")}
CONFIGS = {path.stem.removeprefix("config_"): json.loads(path.read_text()) for path in (INFRA / "metaflow").glob("config_*.json")}


class Template(yaml.SafeLoader):
    """CloudFormation's YAML: a tag like !Ref is a function of what follows."""


Template.add_multi_constructor(
    "!",
    lambda loader, tag, node: {tag: loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else loader.construct_object(node)},
)
STACK = yaml.load((INFRA / "aws" / "batch.yaml").read_text(), Template)


def found(kind, name):
    (match,) = (d for d in OBJECTS if (d["kind"], d["metadata"]["name"]) == (kind, name))
    return match


def container(name):
    (only,) = PODS[name]["containers"]
    return only


def variables(name):
    return {variable["name"]: variable.get("value") for variable in container(name)["env"]}


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# --- schemas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: f"{thing['kind']}-{thing['metadata']['name']}")
def test_kubernetes_accepts(thing):
    kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_would_be_found():
    wrong = json.loads(json.dumps(found("Deployment", "mlflow")).replace("readinessProbe", "readynessProbe"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_kustomization_names_every_manifest():
    assert KUSTOMIZATION.keys() == {"apiVersion", "kind", "namespace", "resources"}
    assert sorted([*KUSTOMIZATION["resources"], "kustomization.yaml"]) == sorted(path.name for path in (INFRA / "kubernetes").iterdir())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_all_objects_in_the_namespace():
    built = list(yaml.safe_load_all(run("kubectl", "kustomize", INFRA / "kubernetes")))
    assert len(built) == len(OBJECTS)
    assert {thing["metadata"]["namespace"] for thing in built} == {KUSTOMIZATION["namespace"]}


def test_cloudformation_accepts_the_template():
    run(BIN / "cfn-lint", "--include-checks", "I", "--", INFRA / "aws" / "batch.yaml")


def test_hadolint_accepts_the_dockerfile():
    run(BIN / "hadolint", INFRA / "Dockerfile")


def test_what_the_dockerfile_copies_is_there():
    sources = [name for line in re.findall(r"^COPY (.*)", (INFRA / "Dockerfile").read_text(), re.MULTILINE) for name in line.split()[:-1]]
    assert sources and all((ROOT / name).exists() for name in sources)


@pytest.mark.parametrize("path", sorted((INFRA / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_accepts_the_strategy(path):
    read = load_config_from_file(str(path))
    assert read.distributed_type.value in ("MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED", "NO")


@pytest.mark.parametrize("profile", CONFIGS)
def test_metaflow_knows_every_setting_of_the_profile(profile):
    code = "import json, metaflow.metaflow_config, metaflow.metaflow_config_funcs as c; print(json.dumps(list(c._all_configs)))"
    known = json.loads(run(sys.executable, "-c", code))
    assert CONFIGS[profile].keys() <= set(known)


# --- what a cluster would refuse or regret --------------------------------------------------------


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_not_root_and_has_its_limits_and_probes(name):
    pod, own = PODS[name], container(name)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert own["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= own.keys()
    assert {"cpu", "memory"} <= own["resources"]["requests"].keys() and "memory" in own["resources"]["limits"]


def test_the_server_runs_as_the_user_of_the_image():
    made, used = re.search(r"--uid (\d+)", text := (INFRA / "Dockerfile").read_text()), re.search(r"^USER (\d+)", text, re.MULTILINE)
    assert made[1] == used[1] == str(PODS["mlflow"]["securityContext"]["runAsUser"])


def test_secrets_are_named_and_no_value_is_in_the_repository():
    assert not [thing for thing in OBJECTS if thing["kind"] == "Secret"]
    needed = {
        (ref["name"], ref["key"]) for name in PODS for v in container(name)["env"] if (ref := v.get("valueFrom", {}).get("secretKeyRef"))
    }
    made = {(name, key) for name, key in re.findall(r"create secret generic (\S+) --from-literal=(\w+)=\"\$\(openssl", README)}
    assert needed == made
    words = [
        variable for name in PODS for variable, value in variables(name).items() if value and re.search("PASSWORD|SECRET|KEY", variable)
    ]
    assert not words


def test_every_volume_that_is_mounted_exists():
    claims = {claim["metadata"]["name"] for claim in found("StatefulSet", "postgres")["spec"]["volumeClaimTemplates"]}
    for name, pod in PODS.items():
        mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} | (claims if name == "postgres" else set())


# --- agreement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PODS)
def test_a_service_leads_to_a_port_of_its_pod(name):
    service, own = found("Service", name)["spec"], container(name)
    workload = next(d for d in OBJECTS if d["kind"] in ("Deployment", "StatefulSet") and d["metadata"]["name"] == name)
    assert service["selector"] == workload["spec"]["template"]["metadata"]["labels"] == workload["spec"]["selector"]["matchLabels"]
    ports = {port["name"]: port["containerPort"] for port in own["ports"]}
    assert all(ports[port["targetPort"]] == port["port"] for port in service["ports"])
    probes = [own[probe].get("httpGet", {}).get("port") for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert set(probes) <= {*ports, None}


def test_the_server_and_its_database_agree():
    uri = re.fullmatch(r"postgresql\+psycopg2://(\w+):\$\((\w+)\)@(\w+):(\d+)/(\w+)", variables("mlflow")["MLFLOW_BACKEND_STORE_URI"])
    database = variables("postgres")
    assert (uri[1], uri[5]) == (database["POSTGRES_USER"], database["POSTGRES_DB"])
    assert int(uri[4]) == found("Service", uri[3])["spec"]["ports"][0]["port"]
    order = list(variables("mlflow"))
    assert order.index(uri[2]) < order.index("MLFLOW_BACKEND_STORE_URI")  # only what stands before is filled in
    (rule,) = found("NetworkPolicy", "postgres")["spec"]["ingress"]
    assert rule["from"][0]["podSelector"]["matchLabels"] == found("Deployment", "mlflow")["spec"]["template"]["metadata"]["labels"]
    assert rule["ports"][0]["port"] == int(uri[4])
    assert "psycopg2-binary==" in (INFRA / "Dockerfile").read_text()


def test_the_workers_ask_for_fewer_connections_than_the_database_has():
    workers = int(re.search(r"--workers=(\d+)", " ".join(container("mlflow")["args"]))[1])
    pool = sum(int(variables("mlflow")[f"MLFLOW_SQLALCHEMYSTORE_{part}"]) for part in ("POOL_SIZE", "MAX_OVERFLOW"))
    assert workers * 2 * pool < int(re.search(r"max_connections=(\d+)", " ".join(container("postgres")["args"]))[1])


def test_the_server_lets_itself_be_called_as_the_readme_calls_it():
    arguments = dict(argument.removeprefix("--").split("=") for argument in container("mlflow")["args"])
    address = f"mlflow.{KUSTOMIZATION['namespace']}:{arguments['port']}"
    assert address in arguments["allowed-hosts"].split(",")
    assert f'uri = "http://{address}"' in README
    assert int(arguments["port"]) == found("Service", "mlflow")["spec"]["ports"][0]["port"]


def test_image_namespace_account_and_queue_have_one_name_everywhere():
    image = presets.read("qwen3-0.6b-8gpu")["compute"]["image"]
    kubernetes, aws = CONFIGS["kubernetes"], CONFIGS["aws"]
    assert {container("mlflow")["image"], kubernetes["METAFLOW_KUBERNETES_CONTAINER_IMAGE"], aws["METAFLOW_BATCH_CONTAINER_IMAGE"]} == {
        image
    }
    assert f"-t {image} ." in README and f"-t {image} ." in (INFRA / "Dockerfile").read_text()
    assert kubernetes["METAFLOW_KUBERNETES_NAMESPACE"] == KUSTOMIZATION["namespace"]
    assert f"kubectl create namespace {KUSTOMIZATION['namespace']}\n" in README
    account = found("ServiceAccount", kubernetes["METAFLOW_KUBERNETES_SERVICE_ACCOUNT"])["metadata"]["name"]
    assert PODS["mlflow"]["serviceAccountName"] == account == found("RoleBinding", "a2d")["subjects"][0]["name"]
    queue = presets.read("qwen3-0.6b-batch")["compute"]["queue"]
    assert queue == aws["METAFLOW_BATCH_JOB_QUEUE"] == STACK["Resources"]["JobQueue"]["Properties"]["JobQueueName"]


def test_the_outputs_of_the_stack_are_the_settings_that_metaflow_asks_for():
    outputs = {output["Description"] for output in STACK["Outputs"].values()}
    assert outputs == CONFIGS["aws"].keys() - {"METAFLOW_DEFAULT_DATASTORE", "METAFLOW_BATCH_CONTAINER_IMAGE"}


# --- commands -------------------------------------------------------------------------------------


def test_the_paths_that_commands_name_exist():
    named = {word.split("=")[-1] for command in COMMANDS for word in shlex.split(command) if re.match(r"(.*=)?(infra|flows)/", word)}
    named |= set(re.findall(r"^\| `(infra/[\w.]+)`", README, re.MULTILINE))
    assert {"infra/Dockerfile", "infra/kubernetes", "infra/aws", "infra/metaflow", "infra/accelerate"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_what_a_launching_machine_installs_is_what_the_tests_use():
    installed = {word for command in COMMANDS if command.startswith("pip install ") for word in command.split() if "==" in word}
    assert installed and installed <= set((ROOT / "requirements-dev.txt").read_text().splitlines())


def test_a_build_argument_that_is_given_is_one_of_the_dockerfile():
    given = {name for command in COMMANDS for name in re.findall(r"--build-arg (\w+)=", command)}
    assert given == set(re.findall(r"^ARG (\w+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE))


def test_the_stack_is_deployed_with_the_parameters_that_it_has_no_default_for():
    (command,) = (command for command in COMMANDS if "cloudformation deploy" in command)
    given = {word.split("=")[0] for word in shlex.split(command.split("--parameter-overrides")[1])}
    assert given == {name for name, parameter in STACK["Parameters"].items() if "Default" not in parameter}


def test_the_stages_and_options_of_commands_exist():
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("python -m a2d_core")]
    for stage in {command[3] for command in commands}:
        options = {word for command in commands if command[3] == stage for word in command if word.startswith("--")}
        assert options <= set(re.findall(r"--[\w-]+", run(sys.executable, "-m", "a2d_core", stage, "--help", cwd=ROOT)))


@pytest.fixture(scope="module")
def aws():
    """A stand-in for AWS on this machine, with the bucket."""
    aws = Aws()
    aws.client("s3").create_bucket(Bucket="your-bucket")
    yield aws
    aws.server.stop()


@pytest.fixture(scope="module")
def stack(aws):
    """The outputs of the deployed template, by the names of Metaflow's settings."""
    subnets = aws.client("ec2").describe_subnets()["Subnets"][:2]
    given = {"Vpc": subnets[0]["VpcId"], "Subnets": ",".join(subnet["SubnetId"] for subnet in subnets)}
    given["InstanceTypes"] = STACK["Parameters"]["InstanceTypes"]["Default"]  # the stand-in does not split a default list
    # it also asks for the role of the service, which on AWS is there already
    body = (INFRA / "aws" / "batch.yaml").read_text().replace("Type: MANAGED", "Type: MANAGED\n      ServiceRole: !GetAtt InstanceRole.Arn")
    parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()]
    aws.client("cloudformation").create_stack(StackName="a2d", TemplateBody=body, Parameters=parameters, Capabilities=["CAPABILITY_IAM"])
    (made,) = aws.client("cloudformation").describe_stacks(StackName="a2d")["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    return {output["Description"]: output["OutputValue"] for output in made["Outputs"]}


@pytest.fixture(scope="module")
def place(aws, tmp_path_factory):
    """A folder with the README's presets, in which the flow finds the repository and a bucket."""
    folder = tmp_path_factory.mktemp("infra")
    (folder / "flows").symlink_to(ROOT / "flows")
    shutil.copytree(INFRA / "metaflow", folder / "home")  # a copy, because Metaflow keeps the tokens of deployed flows beside them
    for kind, block in BLOCKS:
        if kind == "toml":
            (folder / re.match(r"# (\S+)", block)[1]).write_text(block)
    where = {"METAFLOW_HOME": str(folder / "home"), "AWS_ENDPOINT_URL": aws.url, "METAFLOW_S3_ENDPOINT_URL": aws.url}
    return {"cwd": folder, "env": os.environ | CREDENTIALS | where | {"PATH": f"{BIN}:{os.environ['PATH']}"}}


@pytest.mark.parametrize("command", FLOWS)
def test_the_flow_of_a_command_can_be_built(command, place):
    head, action = re.fullmatch(r"(.* --config preset \S+) (.*)", command).groups()
    words = [word for word in action.split() if not word.startswith("-")][: 1 if action.startswith("run") else 2]
    options = run("bash", "-c", f"{head} {' '.join(words)} --help", **place)
    assert all(option in options for option in re.findall(r"--[\w-]+", action))


ABSENT = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] == "kubernetes" else find_spec(name, *rest))
"""


@pytest.mark.parametrize("command", ["--config preset mine.toml run", "--config-value preset smoke run --with kubernetes:image=a/b"])
def test_without_the_client_of_kubernetes_no_run_is_started(command, place, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    env = place["env"] | {"METAFLOW_PROFILE": "kubernetes", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "flows/a2d_flow.py", *command.split()]
    done = subprocess.run(command, cwd=place["cwd"], env=env, capture_output=True, text=True, timeout=120, check=False)
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "-m pip install kubernetes" in told, told
    assert "Workflow starting" not in told and "Traceback" not in told


def test_the_profile_for_kubernetes_makes_a_workflow_of_its_names(place):
    (command,) = (command for command in FLOWS if command.endswith("argo-workflows create"))
    made = json.loads(run("bash", "-c", f"{command} --only-json", **place))
    WorkflowTemplate.model_validate(made)
    config = CONFIGS["kubernetes"]
    assert made["metadata"]["namespace"] == config["METAFLOW_KUBERNETES_NAMESPACE"]
    steps = [template for template in made["spec"]["templates"] if template.get("container")]
    assert {step["serviceAccountName"] for step in steps} == {config["METAFLOW_KUBERNETES_SERVICE_ACCOUNT"]}
    assert {step["container"]["image"] for step in steps} == {config["METAFLOW_KUBERNETES_CONTAINER_IMAGE"]}


def test_the_stack_gives_what_the_profile_for_aws_needs_to_make_a_state_machine(place, stack, aws):
    (queue,) = aws.client("batch").describe_job_queues(jobQueues=[CONFIGS["aws"]["METAFLOW_BATCH_JOB_QUEUE"]])["jobQueues"]
    assert queue["jobQueueArn"] == stack["METAFLOW_BATCH_JOB_QUEUE"] and queue["state"] == "ENABLED"
    (command,) = (command for command in FLOWS if "METAFLOW_PROFILE=aws" in command)
    options = place | {"env": place["env"] | stack}
    made = json.loads(run("bash", "-c", command.split(" run ")[0] + " step-functions create --only-json", **options))
    jobs = {name: state["Parameters"] for name, state in made["States"].items() if "JobQueue" in state.get("Parameters", {})}
    assert {"convert", "pretrain", "sft", "register"} <= jobs.keys()
    assert {job["JobQueue"] for job in jobs.values()} == {CONFIGS["aws"]["METAFLOW_BATCH_JOB_QUEUE"]}
    datastore = {v["Value"] for v in jobs["sft"]["ContainerOverrides"]["Environment"] if v["Name"] == "METAFLOW_DATASTORE_SYSROOT_S3"}
    assert datastore == {stack["METAFLOW_DATASTORE_SYSROOT_S3"]}
    definitions = aws.client("batch").describe_job_definitions(status="ACTIVE")["jobDefinitions"]
    assert {d["containerProperties"]["jobRoleArn"] for d in definitions} == {stack["METAFLOW_ECS_S3_ACCESS_IAM_ROLE"]}
