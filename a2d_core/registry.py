"""The model registry: a checkpoint becomes a version of a registered MLflow model, once per run; reviewers then decide on it.

A version carries tags that lead back to its run, `review=pending`, the alias `candidate`, and review.json among its
artifacts. Every decision is written as tags, with who and when: on the version (`review.*`, `promoted.*`, `rolled_back.*`),
and as a line `event.TIME` on the model, where `champions` lists the versions that the alias `champion` has stood on.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import typing
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import a2d_core
from a2d_core import checkpoints, gate
from a2d_core.config import SampleConfig, UserError, require
from a2d_core.review import Version
from a2d_core.settings import parameters, to_dict
from a2d_core.tracking import finite_numbers

REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "jinja2", "numpy")
"""What a registered model needs to load and answer; installed versions are pinned in it."""
DIGEST_TAG = "checkpoint_sha256"
CODE_TAG = "code"
RECORD = "review.json"


def register(
    model_dir: str | Path,
    *,
    name: str,
    tags: dict[str, str],
    metrics: dict[str, Any],
    sample: SampleConfig,
    record: dict[str, Any] | None = None,
    written: str | None = None,
) -> dict[str, Any]:
    """Register a checkpoint directory as a new version of model `name`, and return its name, version and URI.

    Needs an active MLflow run. `record` is what reviewers need of it, JSON-serialisable. Where a version with the same tag
    `mlflow.parent_run` holds the same weights, as when a step is run again, that version is returned instead of a second one.
    Raises `UserError` where the weights have another digest than `written`, that of what training wrote.
    """
    import mlflow

    weights = checkpoints.digest(model_dir)
    require(
        written in (None, weights),
        f"the weights in '{model_dir}' are not those that training wrote (sha256 {weights[:12]}, not {[written]}): nothing is registered",
    )
    client = mlflow.MlflowClient()
    tags = {**tags, "review": "pending", DIGEST_TAG: weights, CODE_TAG: code_version()}
    found = _found(client, name, tags)
    if found is None:
        model_id = _logged(client, weights) or _log(model_dir, sample, record or {}, weights)
        there = {metric.key for metric in client.get_logged_model(model_id).metrics or []}
        mlflow.log_metrics({key: value for key, value in finite_numbers(metrics).items() if key not in there}, model_id=model_id)
        found = mlflow.register_model(f"models:/{model_id}", name, tags=tags).version
    if client.get_model_version(name, found).tags["review"] == "pending":
        _point_candidate(client, name)
    return {"name": name, "version": int(found), "uri": f"models:/{name}/{found}"}


def source_digest() -> str:
    """The SHA-256 of the package's source."""
    package, source = Path(a2d_core.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return source.hexdigest()


def code_version() -> str:
    """What code this is: a digest of the package's source, and the git commit where it lies in a checkout."""
    package = Path(a2d_core.__file__).parent
    words = f"source {source_digest()[:12]}"
    if not (package.parent / ".git").exists() or shutil.which("git") is None:
        return words

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    is_changed = bool(git("status", "--porcelain", "--", "."))
    return f"{words}, commit {git('rev-parse', '--short=12', 'HEAD') or 'unknown'}{' with changes' if is_changed else ''}"


# --- what is there --------------------------------------------------------------------------------


def read(name: str, number: int | str) -> Version:
    """A version by its number or an alias of its model; raises `UserError` where there is none."""
    import mlflow

    aliases = _aliases(name)
    there = ", ".join(f"{alias} = {of}" for alias, of in sorted(aliases.items())) or "none"
    require(
        str(number).isdecimal() or number in aliases,
        f"no version of '{name}' has the alias '{number}': name one with --version N (aliases: {there})",
    )
    number = int(aliases.get(str(number), number))
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}' and version_number = {number}")
    require(bool(found), f"model '{name}' has no version {number}")
    tags = dict(found[0].tags)
    if CODE_TAG not in tags:  # it was not registered here
        return Version(name, number, tags)
    return Version(name, number, tags, mlflow.artifacts.load_dict(f"models:/{name}/{number}/artifacts/{RECORD}"))


def champion(name: str) -> Version | None:
    """The version with the alias `champion`, if there is one."""
    import mlflow

    found = mlflow.MlflowClient().search_registered_models(f"name = '{name}'")
    return read(name, "champion") if found and "champion" in found[0].aliases else None


def describe(version: Version, text: str) -> None:
    """Let `text` (Markdown) stand on the version's page in MLflow."""
    import mlflow

    mlflow.MlflowClient().update_model_version(version.name, str(version.number), text)


# --- decisions ------------------------------------------------------------------------------------


def approve(name: str, number: int | str, why: str | None = None) -> str:
    """Mark a version as approved; what each decision returns is its line in the model's history."""
    found = read(name, number)
    return _decide(found, "review", f"approved version {found.number}", why, review="approved")


def reject(name: str, number: int | str, why: str) -> str:
    """Mark a version as rejected; it is a candidate no more. Raises `UserError` where it is the champion."""
    found = read(name, number)
    require(
        _aliases(name).get("champion") != found.number,
        f"version {found.number} of '{name}' is the champion: "
        + (f"take it back first, with registry rollback {name}" if len(_champions(name)) > 1 else "promote another version first"),
    )
    line = _decide(found, "review", f"rejected version {found.number}", why, review="rejected")
    _release_candidate(found)
    return line


def promote(name: str, number: int | str, *, force: bool = False, why: str | None = None) -> str:
    """Make a version the champion.

    Raises `UserError` where it is not approved, where it failed its gate when it was registered, or fails it against the
    champion of now; `force` with `why` overrules that, and is recorded.
    """
    found, current = read(name, number), champion(name)
    require(current is None or current.number != found.number, f"version {found.number} of '{name}' is the champion already")
    against = refusals(found, current)
    require(not force or bool(why), "--force overrules the review: say with --why TEXT why")
    require(
        force or not against,
        f"version {found.number} of '{name}' is not promoted: {'; '.join(against)}. Overrule with --force --why TEXT",
    )
    was = f" in the place of version {current.number}" if current else ""
    forced = f", though {' and '.join(against)}" if against else ""
    line = _decide(found, "promoted", f"promoted version {found.number}{was}{forced}", why)
    _crown([*_champions(name), found.number], name)
    _release_candidate(found)
    return line


def refusals(found: Version, current: Version | None) -> list[str]:
    """What speaks against promoting a version, in words."""
    words = []
    if found.tags.get("review") != "approved":
        words.append(f"its review is {found.tags.get('review', 'missing')}")
    if found.tags.get("gate") == "failed":
        words.append(f"it failed its gate ({found.tags.get('gate.why')})")
    else:
        verdict = gate.judge(found.results, current.results if current else None)
        words += [f"it fails the gate against version {current.number} ({verdict.why})"] if current and verdict.word == "failed" else []
    return words


def rollback(name: str, why: str | None = None) -> str:
    """Give the alias `champion` back to the version that had it before; raises `UserError` where there is none."""
    champions = _champions(name)
    require(
        len(champions) > 1,
        f"'{name}' has no earlier champion to go back to: {'promote another version' if champions else 'no version has been promoted yet'}",
    )
    left, back = champions[-1], champions[-2]
    line = _decide(read(name, left), "rolled_back", f"rolled back from version {left} to version {back}", why)
    _crown(champions[:-1], name)
    return line


def _decide(found: Version, kind: str, what: str, why: str | None, **tags: str) -> str:
    """Write a decision on the version and into its model's history."""
    import mlflow

    client, at, by = mlflow.MlflowClient(), datetime.now(UTC), _who()
    when = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    for key, value in {**tags, f"{kind}.by": by, f"{kind}.at": when, f"{kind}.why": why or "-"}.items():
        client.set_model_version_tag(found.name, str(found.number), key, value)
    line = f"{by} {what}{f': {why}' if why else ''}"
    client.set_registered_model_tag(found.name, f"event.{at.isoformat(timespec='microseconds')[:26]}Z", line[:5000])
    return f"{when} {line}"


def _crown(champions: list[int], name: str) -> None:
    """Let the last of these versions be the champion."""
    import mlflow

    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, "champion", str(champions[-1]))
    client.set_registered_model_tag(name, "champions", " ".join(map(str, champions)))


def _champions(name: str) -> list[int]:
    """The champions of a model, oldest first, those that were deleted left out; the last is the one of now, whoever set it."""
    import mlflow

    aliases = _aliases(name)
    there = {int(found.version) for found in mlflow.MlflowClient().search_model_versions(f"name = '{name}'")}
    champions = [number for number in map(int, _model(name).tags.get("champions", "").split()) if number in there]
    current = [aliases["champion"]] if "champion" in aliases else []
    return champions if champions[-1:] == current else champions + current


def _release_candidate(found: Version) -> None:
    import mlflow

    if _aliases(found.name).get("candidate") == found.number:
        mlflow.MlflowClient().delete_registered_model_alias(found.name, "candidate")


def _model(name: str) -> Any:
    """A registered model; raises `UserError` where there is none of that name."""
    import mlflow

    client = mlflow.MlflowClient()
    found = "'" not in name and client.search_registered_models(f"name = '{name}'")
    if not found:
        names = ", ".join(model.name for model in client.search_registered_models(max_results=20)) or "no model yet"
        raise UserError(f"there is no registered model '{name}' at {mlflow.get_tracking_uri()}, which has {names}")
    return found[0]


def _aliases(name: str) -> dict[str, int]:
    """Alias -> version; stores differ in whether a version is a number or a text."""
    return {alias: int(number) for alias, number in _model(name).aliases.items()}


def _who() -> str:
    """Who decides: the user of the MLflow server, or else of this machine."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"


# --- packaging ------------------------------------------------------------------------------------


def _point_candidate(client: Any, name: str) -> None:
    """Let the alias `candidate` stand on the newest version that waits for its review, also where others register at the same time."""
    at = 0
    while True:
        found = client.search_model_versions(f"name = '{name}'")
        newest = max((int(version.version) for version in found if version.tags.get("review") == "pending"), default=at)
        if newest == at:
            return
        client.set_registered_model_alias(name, "candidate", str(newest))
        at = newest


def _found(client: Any, name: str, tags: dict[str, str]) -> str | None:
    """The version of this run's model with the same weights, if there is one."""
    versions = client.search_model_versions(f"name = '{name}'")
    same = [v for v in versions if all(v.tags.get(tag) == tags.get(tag) for tag in ("mlflow.parent_run", DIGEST_TAG))]
    return max((v.version for v in same), key=int, default=None)


def _logged(client: Any, weights: str) -> str | None:
    """The id of the model with these weights that an attempt which ended before the registration has logged to the active run."""
    import mlflow

    info = mlflow.active_run().info
    texts = f"source_run_id = '{info.run_id}'", f"tags.`{DIGEST_TAG}` = '{weights}'"
    found = client.search_logged_models([info.experiment_id], " AND ".join(texts))
    return next((model.model_id for model in found if model.status == "READY"), None)


def _log(model_dir: str | Path, sample: SampleConfig, record: dict[str, Any], weights: str) -> str:
    """Log the checkpoint, the code that runs it and its record as a model of the active run; return its id."""
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, ParamSchema, Schema

    package = Path(a2d_core.__file__).parent
    params = [_parameter(name, value) for name, value in parameters(sample).items()]
    prompt = ColSpec(AnyType(), "prompt")  # of a "string" the server makes text of whatever comes; the model itself wants text
    with tempfile.TemporaryDirectory(prefix="a2d-register-") as room, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided")  # it would be run, on whatever machine this is
        written = Path(room, RECORD)
        written.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "pyfunc_model.py"),
            artifacts={"checkpoint": str(model_dir), "review": str(written)},
            code_paths=[str(package)],  # so that the version loads where there is no checkout
            model_config={"sample": to_dict(sample)},
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS],
            signature=ModelSignature(Schema([prompt]), Schema([ColSpec("string")]), ParamSchema(params)),
            tags={DIGEST_TAG: weights},
        )
    return str(info.model_id)


def _parameter(name: str, default: Any) -> Any:
    """A parameter of a call as MLflow describes it: its type is that of the field of `SampleConfig`."""
    from mlflow.types.schema import ParamSpec

    hint = typing.get_type_hints(SampleConfig)[name]
    types = {int: "integer", float: "double", str: "string", bool: "boolean"}
    kind = next((types[t] for t in (hint, *typing.get_args(hint)) if t in types), "string")  # a Literal is one of its texts
    return ParamSpec(name, kind, list(default) if isinstance(default, tuple) else default, (-1,) if isinstance(default, tuple) else None)
