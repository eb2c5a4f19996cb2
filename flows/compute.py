"""What the flow asks of the machine, read from the preset: resources, retries, time limits, and where the steps run.

Decorators are made when the graph is built, before any parameter is known. So the compute profile
comes from the preset, a Metaflow `Config`, and one `FlowMutator` turns it into decorators. It also
ships a2d_core with the flow's code, and gives each step a plain form for the user's own mistakes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metaflow import FlowMutator, current, user_step_decorator
from metaflow.exception import MetaflowException
from nodes import install

import a2d_core
from a2d_core import presets, tracking
from a2d_core.config import ComputeConfig, Recipe, StepCompute, StoppedError, TrackingConfig, UserError, require
from a2d_core.launch import NodeLostError
from a2d_core.settings import build
from a2d_core.stages.checks import MemoryFullError

PROFILES = {
    "convert": "convert",
    "pretrain": "train",
    "pretrain_on_nodes": "train",
    "sft": "train",
    "sft_on_nodes": "train",
    "sample": "generate",
    "evaluate": "generate",
}
"""Step -> its part of the compute profile; the steps that only keep books (start, register, end and their like) take `register`."""

FOREIGN = {"batch": ("namespace", "service_account", "node_selector", "tolerations"), "kubernetes": ("queue",)}
"""Platform -> the settings that mean nothing to it."""


class Refusal(MetaflowException):
    """A user's own mistake, in the form that Metaflow prints without a traceback."""

    headline = "A2D cannot go on"


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn a `UserError` of the body, or its word that the memory is full, or that it or a node was stopped, into a `Refusal`."""
    try:
        yield
    except (UserError, MemoryFullError, StoppedError, NodeLostError) as error:
        raise Refusal(str(error)) from None


@user_step_decorator
def plain_refusals(step_name: str, flow: Any, inputs: Any = None, attributes: Any = None) -> Iterator[None]:
    """Around each step: what the user can mend is told plainly, and how to go on."""
    try:
        with told_plainly():
            yield
    except Exception:
        if step_name != "start":  # before it, nothing was done; and a resumed run has the same parameters
            import cards

            print(f"when that is mended: {cards.flow_command('resume', '--origin-run-id', current.run_id)}", flush=True)
        raise


def read_preset(text: str) -> dict[str, Any]:
    """The parser of the flow's `preset`: a name, a path to TOML or JSON, or the text of such a file (`--config preset FILE`)."""
    with told_plainly():
        values = _read(text)
        tracking.default_uri(build(TrackingConfig, values.get("tracking", {}), "tracking"))  # before Metaflow stores what is in it
        return values


def _read(text: str) -> dict[str, Any]:
    if not any(sign in text for sign in "\n={"):
        return presets.read(text.strip())
    try:
        values = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
        if str(values.get("base", "")).endswith(presets.SUFFIXES):
            values["base"] = str(Path(values["base"]).absolute())  # the text does not say where its file lies
        content = json.dumps(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"the text of the preset is neither a TOML nor a JSON recipe: {error}") from None
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "custom.json"
        file.write_text(content)
        return presets.read(str(file))


def read_compute(preset: dict[str, Any]) -> ComputeConfig:
    """The checked compute profile of a preset, as `presets.read` returns it."""
    compute = build(ComputeConfig, preset.get("compute", {}), "compute")
    parts = {"compute": compute} | {f"compute.{name}": getattr(compute, name) for name in sorted(set(PROFILES.values()) | {"register"})}
    for platform, names in FOREIGN.items():
        foreign = [f"{path}.{name}" for path, part in parts.items() for name in names if getattr(part, name, None)]
        require(
            compute.platform != platform or not foreign,
            f"compute.platform is {platform}, which knows no {', '.join(foreign)}: leave them out",
        )
    return compute


def need_of(step: str, compute: ComputeConfig) -> StepCompute:
    """What a step asks of the machine; where training takes several nodes, `pretrain` and `sft` only call them together."""
    calls_nodes = compute.train.nodes > 1 and f"{step}_on_nodes" in PROFILES
    need: StepCompute = getattr(compute, "register" if calls_nodes else PROFILES.get(step, "register"))
    return need


def platform_here(compute: ComputeConfig) -> str:
    """Where this step runs: on the profile's platform, or on that of `--with kubernetes` or a deployment where the profile is local."""
    return compute.platform if compute.platform != "local" else os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT", "local")


def check_compute(recipe: Recipe, preset: dict[str, Any]) -> None:
    """Raise `UserError` where an override, or an objective's table, asks for a compute profile that the graph was not built with."""

    def fixed(compute: ComputeConfig) -> ComputeConfig:
        parts = {
            name: replace(getattr(compute, name), processes=1, strategy="ddp") for name in ("convert", "train", "generate", "register")
        }
        return replace(compute, **parts)  # what processes a stage starts is its own affair

    wanted, built = fixed(recipe.compute), fixed(read_compute(preset))
    changed = [f"compute.{field.name}" for field in fields(ComputeConfig) if getattr(wanted, field.name) != getattr(built, field.name)]
    require(
        not changed,
        f"{', '.join(changed)} cannot be changed by an override or for one objective, because it is read before them: put it into "
        'a preset of your own, a TOML file with base = "NAME" and a table [compute], and give that with --config-value preset FILE',
    )


def check_client(compute: ComputeConfig) -> None:
    """Raise `UserError` where this process is to start steps on Kubernetes and lacks the client: Metaflow would see it too late."""
    words = sys.argv[1:]
    is_wanted = compute.platform == "kubernetes" or any(word.removeprefix("--with=").split(":")[0] == "kubernetes" for word in words)
    if is_wanted and {"run", "resume"} & set(words):
        require(
            find_spec("kubernetes") is not None,
            f"this machine has no client of Kubernetes to start steps there: {sys.executable} -m pip install kubernetes "
            "(infra/README.md has the version)",
        )


class Compute(FlowMutator):
    """Gives each step the resources, retries, time limit and platform of the preset's compute profile, and training its nodes."""

    def pre_mutate(self, mutable_flow: Any) -> None:
        """Change the graph, before it is read, where training takes several nodes."""
        preset = dict(mutable_flow.configs)["preset"]
        if preset is None:
            return
        with told_plainly():
            if read_compute(preset.to_dict()).train.nodes > 1:
                install(mutable_flow._flow_cls)  # Metaflow reads the graph anew from the class, and has no public way to add a step

    def mutate(self, mutable_flow: Any) -> None:
        """Add the decorators, once the preset is read."""
        preset = dict(mutable_flow.configs)["preset"]
        if preset is None:
            return
        with told_plainly():
            compute = read_compute(preset.to_dict())
            check_client(compute)
        for name, step in mutable_flow.steps:
            step.add_decorator(plain_refusals)
            for decorator, attributes in decorators(compute, need_of(name, compute)).items():
                step.add_decorator(decorator, deco_kwargs=attributes)

    def add_to_package(self) -> Iterator[tuple[str, str]]:
        """Ship a2d_core beside the flow's own files."""
        root = Path(a2d_core.__file__).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".toml", ".yaml", ".yml", ".json"):
                yield str(path), f"{root.name}/{path.relative_to(root)}"


def decorators(compute: ComputeConfig, need: StepCompute) -> dict[str, dict[str, Any]]:
    """Metaflow decorator -> its attributes, for a step with this need on this platform."""
    resources = {
        "cpu": need.cpu,
        "gpu": need.gpu or None,
        "memory": need.memory_mb,
        "shared_memory": need.shared_memory_mb,
        "disk": need.disk_mb,
    }
    made = {"resources": _given(resources), "timeout": {"minutes": need.timeout_minutes}}
    if need.retries:
        made["retry"] = {"times": need.retries, "minutes_between_retries": need.minutes_between_retries}
    own = {name: placed(compute, need, name) for name in ("image", "queue", "node_selector", "tolerations", "secrets")}
    if compute.platform == "kubernetes":
        tolerations = [_given(asdict(toleration)) for toleration in own["tolerations"]]
        place = {"namespace": compute.namespace, "service_account": compute.service_account, "node_selector": own["node_selector"]}
        size = {"memory": need.memory_mb, "disk": need.disk_mb}  # else Metaflow asks for its defaults at least: 4 GB, and 10 GB
        patience = 60 * need.meeting_minutes if need.nodes > 1 else None
        secrets = {"secrets": list(own["secrets"]), "hostname_resolution_timeout": patience}
        made["kubernetes"] = _given({"image": own["image"], **place, **size, "tolerations": tolerations, **secrets})
    if compute.platform == "batch":
        made["batch"] = _given({"image": own["image"], "queue": own["queue"]})
        if own["secrets"]:
            made["secrets"] = {"sources": [{"type": "aws-secrets-manager", "id": name} for name in own["secrets"]]}
    return made


def placed(compute: ComputeConfig, need: StepCompute, name: str) -> Any:
    """A step's own setting, or else the profile's; what picks GPU nodes in the profile is for steps with a GPU."""
    own, profile = getattr(need, name), getattr(compute, name)
    is_for_gpus = name in ("node_selector", "tolerations")
    return own if own is not None else type(profile)() if is_for_gpus and not need.gpu else profile


def _given(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value}
