"""The model registry: a checkpoint becomes a version of a registered MLflow model, once per run of the pipeline.

A version carries tags that lead back to its run, `review=pending`, and the alias `candidate`.
"""

from __future__ import annotations

import hashlib
import typing
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import a2d_core
from a2d_core.config import SampleConfig, to_dict
from a2d_core.tracking import finite_numbers

REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "jinja2", "numpy")
"""What a registered model needs to load and answer; installed versions are pinned in it."""
DIGEST_TAG = "checkpoint_sha256"


def register(model_dir: str | Path, *, name: str, tags: dict[str, str], metrics: dict[str, Any], sample: SampleConfig) -> dict[str, Any]:
    """Register a checkpoint directory as a new version of model `name`, and return its name, version and URI.

    Needs an active MLflow run. Where a version with the same tag `mlflow.parent_run` holds the same
    weights, as when a step is run again, that version is returned instead of a second one.
    """
    import mlflow

    client = mlflow.MlflowClient()
    tags = {**tags, "review": "pending", DIGEST_TAG: digest(model_dir)}
    found = _found(client, name, tags)
    if found is None:
        info = _log(model_dir, sample)
        mlflow.log_metrics(finite_numbers(metrics), model_id=info.model_id)
        found = mlflow.register_model(info.model_uri, name, tags=tags).version
    client.set_registered_model_alias(name, "candidate", found)
    return {"name": name, "version": int(found), "uri": f"models:/{name}/{found}"}


def digest(model_dir: str | Path) -> str:
    """The SHA-256 of a checkpoint's weights."""
    total = hashlib.sha256()
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _found(client: Any, name: str, tags: dict[str, str]) -> str | None:
    """The version of this run's model with the same weights, if there is one."""
    versions = client.search_model_versions(f"name = '{name}'")
    same = [v for v in versions if all(v.tags.get(tag) == tags.get(tag) for tag in ("mlflow.parent_run", DIGEST_TAG))]
    return max((v.version for v in same), key=int, default=None)


def _log(model_dir: str | Path, sample: SampleConfig) -> Any:
    """Log the checkpoint, and the code that runs it, as a model of the active run."""
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, Schema

    package = Path(a2d_core.__file__).parent
    params = [_parameter(name, value) for name, value in sample.parameters().items()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided")  # it would be run, on whatever machine this is
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "pyfunc_model.py"),
            artifacts={"checkpoint": str(model_dir)},
            code_paths=[str(package)],  # so that the version loads where there is no checkout
            model_config={"sample": to_dict(sample)},
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS],
            signature=ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]), ParamSchema(params)),
        )


def _parameter(name: str, default: Any) -> Any:
    """A parameter of a call as MLflow describes it: its type is that of the field of `SampleConfig`."""
    from mlflow.types.schema import ParamSpec

    hint = typing.get_type_hints(SampleConfig)[name]
    types = {int: "integer", float: "double", str: "string", bool: "boolean"}
    kind = next((types[t] for t in (hint, *typing.get_args(hint)) if t in types), "string")  # a Literal is one of its texts
    return ParamSpec(name, kind, list(default) if isinstance(default, tuple) else default, (-1,) if isinstance(default, tuple) else None)
