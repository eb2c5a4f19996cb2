"""The tracking room: all that a run tells MLflow, from a step of the flow or from the command line.

One parent run stands for one run of the pipeline, and each stage has a child run, which is found
again by its parent's id and its stage tag: a resumed run goes on in the runs that it began.
Functions that log act on the active run, which `stage_run` opens.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from a2d_core.config import Recipe, TrackingConfig, UserError, require
from a2d_core.follow import Row, cause
from a2d_core.settings import to_dict

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow looks for git, and warns at length where there is none
}
NOT_METRICS = {"step", "max_steps", "total_flos", "seconds_left"}
MEASURED = ("seconds", "per_second", "memory_mb")
"""How the names of numbers end that no two attempts measure alike."""
RUN_TAG = "metaflow.run"


def quiet() -> None:
    """Switch off the telemetry of every dependency, in this process and its children, unless the user has set it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def default_uri(config: TrackingConfig | None = None) -> str:
    """Where runs are tracked: the configuration's URI, MLFLOW_TRACKING_URI, or `mlflow.db` in the working directory.

    A sqlite URI comes back with an absolute path, so that it means the same file to every process of a run. Raises `UserError`
    for one with a password in it.
    """
    uri = (config.uri if config else None) or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    require(
        urlsplit(uri).password is None,
        f"the URI of MLflow at {urlsplit(uri).hostname} has a password in it, which logs and artifacts would show: give a server's in "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and a database's where its client looks for it, as in PGPASSWORD",
    )
    return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}" if uri.startswith("sqlite:///") else uri


def check_server(uri: str, patience: float = 0.0) -> None:
    """Make sure, within seconds, that tracking works (a new local database is set up); raise `UserError` with the remedy.

    A server that is being started again has `patience` seconds for it.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return _ask(uri)
        except UserError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def _ask(uri: str) -> None:
    try:
        with _no_collection(), impatience():
            import mlflow

            for name in ("alembic", "mlflow"):
                logging.getLogger(name).setLevel(logging.WARNING)  # the set-up of a database is no news
            mlflow.set_tracking_uri(uri)
            mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:  # every kind of store has its own: connection, database, permission
        raise UserError(
            f"MLflow does not answer at {uri} ({cause(error)}): start the server, or name another with MLFLOW_TRACKING_URI or "
            "tracking.uri; with neither of them set, runs are tracked in the local file mlflow.db"
        ) from error


def checkpoint_of(uri: str, config: TrackingConfig | None = None) -> str:
    """The checkpoint directory of a registered version, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched where it is not local.

    Raises `UserError` where there is none.
    """
    place = default_uri(config)
    there = not place.startswith("sqlite:///") or Path(place.removeprefix("sqlite:///")).is_file()
    require(there, f"{uri}: there is no MLflow database {place}: name the server or the database with MLFLOW_TRACKING_URI")
    check_server(place)
    import mlflow

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        artifacts = mlflow.models.get_model_info(uri).flavors["python_function"]["artifacts"]
        return str(mlflow.artifacts.download_artifacts(f"{uri}/{artifacts['checkpoint']['path']}"))
    except (KeyError, mlflow.exceptions.MlflowException) as error:
        raise UserError(f"{uri} is no checkpoint that was registered here, at {place} ({cause(error)})") from error


def start_parent(recipe: Recipe, *, name: str, run: str | None = None, begun: Iterable[str] = ()) -> str:
    """Make the MLflow run that stands for one run of the pipeline, with the resolved recipe as an artifact; return its id.

    `run` is the pipeline's own name of it. Where one of the runs in `begun`, an attempt at the same that was killed, has left
    an MLflow run, that one is taken up.
    """
    import mlflow

    client = mlflow.MlflowClient()
    experiment = _experiment(client, recipe.tracking.experiment)
    searches = (client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{one}'", max_results=1) for one in begun)
    found = next((found[0] for found in searches if found), None)
    run_id = (found or client.create_run(experiment, run_name=name, tags={RUN_TAG: run} if run else {})).info.run_id
    params = {"preset": recipe.name, "objective": recipe.objective, "seed": recipe.seed}
    _log_params(client, run_id, {**params, "model": recipe.convert.model, "block_size": recipe.convert.block_size})
    client.log_dict(run_id, to_dict(recipe), "recipe.json")
    return run_id


@contextmanager
def stage_run(parent_id: str, stage: str, *, params: dict[str, Any] | None = None, tags: dict[str, str] | None = None) -> Iterator[str]:
    """The child run of a stage, found or made, as the active MLflow run; yields its id.

    Where the body raises, the child and the parent are marked as failed, until a resumed run takes them up.
    """
    import mlflow

    client = mlflow.MlflowClient()
    with impatience():
        client.update_run(parent_id, status="RUNNING")
        run_id = mlflow.start_run(run_id=_child(client, parent_id, stage, params or {})).info.run_id
    try:
        with impatience():
            mlflow.set_tags(tags or {})
        yield run_id
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            with impatience():
                mlflow.end_run(status)
                client.update_run(parent_id, status=status)
        except Exception as second:
            error.add_note(f"(MLflow could not be told of it: {second})")
        raise
    try:
        with impatience():
            mlflow.end_run()
    except Exception as error:  # what the stage has made is worth more: `finish` closes its run
        print(f"MLflow could not be told that {stage} is done ({cause(error)}): it hears of it at the end of the run", flush=True)


def finish(parent_id: str) -> None:
    """Close the parent run, and those of its stages that are open still."""
    import mlflow

    client = mlflow.MlflowClient()
    with impatience():
        experiment = client.get_run(parent_id).info.experiment_id
        for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent_id}' and attributes.status = 'RUNNING'"):
            client.set_terminated(run.info.run_id)
        client.set_terminated(parent_id)


Owed = dict[str, Any]
"""What MLflow lacks of a training stage: its `rows` (of metrics.jsonl) and its final `numbers`."""


def refusal(stage: str, numbers: dict[str, Any], refused: Exception | None) -> str | None:
    """Log the final numbers of a training stage to its active run and its parent; return why MLflow does not take them, or None.

    `refused`: what it said to the rows of the training, which come first.
    """
    if refused is not None:
        return cause(refused)
    try:
        with impatience():
            log_numbers(numbers, summary={f"{stage}/{name}": value for name, value in numbers.items()})
    except Exception as error:  # whatever it is, the training is done: what is wrong with a number is raised by `settle`
        return cause(error)
    return None


def settle(parent_id: str, owed: dict[str, Owed]) -> None:
    """Send what MLflow lacks of earlier stages, which it did not take while it was away; what is there is not sent again."""
    for stage, debt in owed.items():
        with stage_run(parent_id, stage) as run_id:
            log = MetricLog(run_id)
            log.add(debt["rows"])
            sent = log.send()
            log_numbers(debt["numbers"], summary={f"{stage}/{name}": value for name, value in debt["numbers"].items()})
        print(f"MLflow is there again: {sent} numbers of {stage}, which it lacked, were sent", flush=True)


def log_numbers(numbers: dict[str, Any], *, summary: dict[str, Any] | None = None) -> None:
    """Log a stage's final numbers to its active run, and those of `summary` to the parent, where runs are compared.

    Left out are what is no finite number, what stands there already, and what the run has a curve of. A result that has changed,
    as where a stage is run again with other code, gets the next step; what an attempt measured of itself stays.
    """
    import mlflow

    client, active = mlflow.MlflowClient(), mlflow.active_run()
    assert active is not None, "log_numbers is called inside stage_run"
    for run_id, values in ((active.info.run_id, numbers), (active.data.tags["mlflow.parentRunId"], summary or {})):
        there, new = client.get_run(run_id).data.metrics, []
        for metric in _metrics({"step": 0, **values}):
            if metric.key not in there:
                new.append(metric)
            elif there[metric.key] != metric.value and not metric.key.endswith(MEASURED):
                steps = [row.step for row in client.get_metric_history(run_id, metric.key)]
                if 0 in steps:  # no curve
                    new += _metrics({"step": max(steps) + 1, metric.key: metric.value})
        client.log_batch(run_id, metrics=new)


def log_samples(samples: list[dict[str, Any]]) -> None:
    """Log samples as the table `samples.json` of the active run."""
    import mlflow

    columns = list(samples[0]) if samples else []
    mlflow.log_dict({"columns": columns, "data": [[sample[c] for c in columns] for sample in samples]}, "samples.json")
    # what mlflow.log_table does, which would append to the table of an earlier attempt
    mlflow.set_tag("mlflow.loggedArtifacts", json.dumps([{"path": "samples.json", "type": "table"}]))


EVALUATION_FILES = ("results.json", "evaluation.json", "samples.jsonl", "lm_eval*.json", "report.html", "frontier.png")


def log_evaluation(results: dict[str, Any], output_dir: str | Path) -> None:
    """Log an evaluation: its numbers as metrics, those without standard errors on the parent too, its samples as a table, its
    record as parameters (seed, weights, versions), and its files, from which `evaluate --repeat` runs it again."""
    import mlflow

    numbers = evaluation_numbers(results)
    record_file, samples_file = Path(output_dir) / "evaluation.json", Path(output_dir) / "samples.jsonl"
    if record_file.exists():
        record = json.loads(record_file.read_text(encoding="utf-8"))
        numbers |= {name: record[name] for name in ("seconds", "evaluations", "failed")}
        mlflow.set_tags({"a2d.weights": record["weights"]["model"], "a2d.code": record["code"], "a2d.device": record["device"]})
        mlflow.set_tags({f"version.{package}": version for package, version in record["versions"].items()})
    if samples_file.exists():
        log_samples([json.loads(line) for line in samples_file.read_text(encoding="utf-8").splitlines()])
    log_numbers(numbers, summary={name: value for name, value in numbers.items() if not name.endswith(("_stderr", "_chance"))})
    for path in (path for pattern in EVALUATION_FILES for path in sorted(Path(output_dir).glob(pattern))):
        mlflow.log_artifact(str(path))


def fetch_evaluation(run_id: str, directory: str | Path) -> Path:
    """Download the files of an evaluation that `log_evaluation` logged: of its run, or the evaluation of the pipeline's run `run_id`.

    Raises `UserError` where there is no such run, or it evaluated nothing.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(f"MLflow at {mlflow.get_tracking_uri()} has no run '{run_id}' ({cause(error)}): see its pages for the id") from None
    if run.data.tags.get("a2d.stage") != "evaluate":
        tags = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`a2d.stage` = 'evaluate'"
        found = client.search_runs([run.info.experiment_id], tags, max_results=1)
        require(bool(found), f"run '{run_id}' evaluated nothing: give the run of an evaluation, or of a pipeline with one")
        run_id = found[0].info.run_id
    names = {artifact.path for artifact in client.list_artifacts(run_id)}
    wanted = ("evaluation.json", "results.json", "samples.jsonl")
    missing = [name for name in wanted if name not in names]
    require(not missing, f"run '{run_id}' has no {', '.join(missing)}: it cannot be repeated")
    for name in wanted:
        mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(directory))
    return Path(directory)


def champion_numbers(name: str) -> dict[str, float]:
    """The metrics, as `evaluation_numbers` names them, of the version with the alias `champion` of a model; empty where there is none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        version = client.get_model_version_by_alias(name, "champion")
        logged = client.get_logged_model(version.model_id or version.source.removeprefix("models:/"))
    except MlflowException:  # no such model, no champion, or one that was registered by other means
        return {}
    return {metric.key: metric.value for metric in logged.metrics or []}


def evaluation_numbers(results: dict[str, Any] | None) -> dict[str, Any]:
    """An evaluation as flat names and numbers: TASK/METRIC, with _stderr, _chance and their like, and text/nelbo and its like."""
    numbers: dict[str, Any] = {}
    for task in results["tasks"] if results else []:
        name = f"{task['task']}/{task['metric']}"
        parts = ("stderr", "chance", "baseline", "published", "evaluations", "tokens")
        numbers |= {name: task["value"]} | {f"{name}_{part}": task.get(part) for part in parts}
    return numbers | {f"text/{name}": value for name, value in ((results or {}).get("text") or {}).items()}


class MetricLog:
    """Sends rows of numbers to an MLflow run: each number once a step, whatever was sent before a resume or a retry."""

    def __init__(self, run_id: str | None = None) -> None:
        """For the given run; for the active one where there is none given."""
        import mlflow

        self._client, self._run_id = mlflow.MlflowClient(), run_id or mlflow.active_run().info.run_id
        self._waiting: dict[tuple[str, int], Any] = {}
        self._logged: set[tuple[str, int]] | None = None

    def add(self, rows: list[Row]) -> None:
        """Let the numbers of these rows wait to be sent."""
        for metric in (metric for row in rows for metric in _metrics(row)):
            self._waiting.setdefault((metric.key, metric.step), metric)

    def send(self) -> int:
        """Send what waits, and return how much was new. After an error nothing is lost: call it again."""
        try:
            with impatience():
                self._logged = self._logged if self._logged is not None else self._there()
                new = [metric for key, metric in self._waiting.items() if key not in self._logged]
                for start in range(0, len(new), 1000):  # as many as one request may hold
                    self._client.log_batch(self._run_id, metrics=new[start : start + 1000])
        except Exception:
            self._logged = None  # part of it may have arrived: look before it is sent again
            raise
        self._logged |= self._waiting.keys()
        self._waiting.clear()
        return len(new)

    def _there(self) -> set[tuple[str, int]]:
        names = self._client.get_run(self._run_id).data.metrics
        return {(metric.key, metric.step) for name in names for metric in self._client.get_metric_history(self._run_id, name)}


def finite_numbers(row: Row) -> dict[str, float]:
    """The finite numbers of a row that are metrics, under names that MLflow takes."""
    numbers = {name: value for name, value in row.items() if name not in NOT_METRICS and isinstance(value, (int, float))}
    return {re.sub(r"[^\w\-./: ]", "_", name): float(value) for name, value in numbers.items() if math.isfinite(value)}


def _metrics(row: Row) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, value, now, row["step"]) for name, value in finite_numbers(row).items()]


def _child(client: Any, parent_id: str, stage: str, params: dict[str, Any]) -> str:
    """The id of the parent's run for a stage, which is made where it is missing."""
    experiment = client.get_run(parent_id).info.experiment_id
    tags = {"mlflow.parentRunId": parent_id, "a2d.stage": stage}
    found = client.search_runs([experiment], " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items()), max_results=1)
    run_id = (found[0] if found else client.create_run(experiment, run_name=stage, tags=tags)).info.run_id
    _log_params(client, run_id, params)
    return run_id


def _log_params(client: Any, run_id: str, params: dict[str, Any]) -> None:
    """Log the parameters that the run lacks: those of an attempt that was killed may have come in part."""
    from mlflow.entities import Param

    there = client.get_run(run_id).data.params
    client.log_batch(run_id, params=[Param(name, str(value)[:6000]) for name, value in params.items() if name not in there])


def _experiment(client: Any, name: str) -> str:
    """The id of the experiment, which is made where it is missing."""
    import mlflow
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        uri = mlflow.get_tracking_uri()
        local = Path(uri.removeprefix("sqlite:///")).parent / "mlruns" if uri.startswith("sqlite:///") else None
        try:
            return client.create_experiment(name, artifact_location=local.as_uri() if local else None)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # another run has made it meanwhile
    require(
        found.lifecycle_stage == "active",
        f"the MLflow experiment '{name}' was deleted: choose another with tracking.experiment=NAME, "
        f"or bring it back with `mlflow experiments restore --experiment-id {found.experiment_id}`",
    )
    return found.experiment_id


@contextmanager
def impatience() -> Iterator[None]:
    """Give up on a server that does not answer after seconds, where MLflow's own settings wait for minutes."""
    hasty = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    mine = {name: value for name, value in hasty.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Load modules that stay: the garbage collector neither looks at them meanwhile nor ever again, not even at the exit.

    Of the two and a half seconds that MLflow takes to come and go, that is more than one.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
