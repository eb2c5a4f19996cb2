"""Directories between the steps of the flow: put_dir, get_dir, get_latest, delete, prune.

Artifacts hold only the small reference that `put_dir` returns; the files lie in Metaflow's
datastore, local or S3 alike, and are reached through metaflow-checkpoint's `Checkpoint`. The
`@checkpoint` decorator is not used: it would add an empty card (two more processes) to each step
and call for a metadata service in a pod. All that `Checkpoint` needs to know of the task is one
environment variable, which `_writer` sets. A reference carries the digest of each file, and no
directory is handed out whose files are others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from a2d_core import checkpoints
from a2d_core.config import UserError, require

Reference = dict[str, Any]
"""What an artifact holds of a stored directory: its key, name, time of creation and metadata, with a digest of each file."""


class DamagedError(UserError):
    """A stored directory is not what was put there; the message names the file."""


def put_dir(path: str | Path, name: str, **metadata: Any) -> Reference:
    """Store a directory under a name (letters, digits, `_`, `-`) and return the reference to it.

    Raises `UserError` where the datastore does not take it.
    """
    assert "." not in name and "/" not in name, f"'.' and '/' separate the parts of a stored key: {name!r}"
    files = checkpoints.survey(Path(path))
    with _refusals(f"store '{path}' as '{name}'"):
        return cast(Reference, _writer().save(path=str(path), name=name, metadata={**metadata, "files": files}))


def get_dir(reference: Reference, destination: str | Path) -> Path:
    """Copy a stored directory to `destination`, replacing what is there.

    A copy, because the local datastore hands out symbolic links, and writing through one would
    change the stored file. Raises `UserError` where the datastore does not give it, `DamagedError`
    where a file is not what was stored; `destination` does not exist then.
    """
    from metaflow import Checkpoint

    destination = Path(destination)
    arriving = destination.with_name(destination.name + ".arriving")
    for leftover in (destination, arriving):
        shutil.rmtree(leftover, ignore_errors=True)
    arriving.mkdir(parents=True)
    with _refusals(f"fetch '{reference['url']}'"):
        Checkpoint().load(reference, path=str(arriving))
        for file in arriving.rglob("*"):
            if file.is_symlink():
                stored = file.resolve(strict=True)
                file.unlink()
                shutil.copy(stored, file)
    wrong = checkpoints.difference(arriving, reference["metadata"]["files"])
    if wrong:
        shutil.rmtree(arriving)
        raise DamagedError(f"the stored directory '{reference['url']}' is damaged: {wrong}")
    arriving.rename(destination)
    return destination


def get_latest(name: str, destination: str | Path, **metadata: Any) -> Reference | None:
    """Copy the newest whole directory of `stored(name, **metadata)` to `destination`; None where nothing was stored.

    A damaged one is named and passed over. Raises `UserError` where all are damaged: what is there is not begun anew in silence.
    """
    found, damaged = stored(name, **metadata), []
    for reference in found:
        try:
            get_dir(reference, destination)
        except DamagedError as error:
            damaged.append(str(error))
            print(f"passed over: {error}")
        else:
            return reference
    require(not found, f"{'; '.join(damaged)}. There is no whole one to go on from: start a new run, or bring the files back")
    return None


def stored(name: str, **metadata: Any) -> list[Reference]:
    """The directories of that name with that metadata which unfinished attempts at this step have left, the newest first.

    They are looked for in this task (a retry) and, in a resumed run, in the same step of the run that
    it resumes, and of the run which that one resumed. A step that had succeeded left nothing to go
    on from: `resume STEP` after a success starts the step afresh.
    """
    from metaflow import Checkpoint, Run, current

    with _refusals(f"look for '{name}'"):
        found = _writer().list(name=name)
        origins = unfinished(current.origin_run_id)
        while not found and (run := next(origins, None)):
            tasks = [task for step in Run(run, _namespace_check=False) if step.id == current.step_name for task in step]
            found = [r for task in tasks for r in Checkpoint()._search(pathspec=task.pathspec) if r["name"] == name]
    found = [reference for reference in found if metadata.items() <= reference["metadata"].items()]
    return sorted(found, key=lambda reference: reference["created_on"], reverse=True)


def unfinished(origin: str | None) -> Iterator[str]:
    """The runs (FLOW/ID) that this one resumes, the latest first, as far as this step did not succeed in them; `origin` is the latest."""
    from metaflow import Run, current

    while origin:
        run = Run(f"{current.flow_name}/{origin}", _namespace_check=False)
        if any(task.successful for step in run if step.id == current.step_name for task in step):
            return
        yield run.pathspec
        before = {task.metadata_dict.get("origin-run-id", "None") for step in run for task in step} - {"None"}
        origin = min(before, default=None)


def prune(name: str, keep: int) -> None:
    """Delete all but the newest `keep` directories of that name which this task has stored."""
    newest_first = sorted(_writer().list(name=name), key=lambda reference: reference["created_on"], reverse=True)
    delete(newest_first[keep:])


def delete(references: list[Reference]) -> None:
    """Delete stored directories, whichever task has stored them; those that are gone already stay so."""
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.checkpoints.checkpoint_storage import CheckpointDatastore
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore.task_utils import init_datastorage_object
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastructures import CheckpointArtifact

    for reference in references:  # metaflow-checkpoint has no public way to delete
        artifact = CheckpointArtifact.hydrate(reference)
        with _refusals(f"delete '{reference['url']}'"):
            CheckpointDatastore.init_delete_store(init_datastorage_object(), artifact).delete(artifact)


def check_datastore(kind: str) -> None:
    """Raise `UserError` where the flow keeps its artifacts in another kind of datastore than its directories."""
    from metaflow.metaflow_config import DEFAULT_DATASTORE

    require(
        kind == DEFAULT_DATASTORE,
        f"--datastore {kind} would leave the checkpoints in the {DEFAULT_DATASTORE} datastore: "
        f"set METAFLOW_DEFAULT_DATASTORE={kind} in place of the option",
    )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn the body's failure into a `UserError`: each kind of datastore has its own exceptions, and the user may mend them all."""
    try:
        yield
    except Exception as error:
        from metaflow.metaflow_config import DEFAULT_DATASTORE

        raise UserError(
            f"the {DEFAULT_DATASTORE} datastore refuses to {what} ({type(error).__name__}: {error}): mend its permissions, make room "
            "on it or wait until it answers, then resume the run"
        ) from error


def _writer() -> Any:
    from metaflow import current

    return _writer_of(current.pathspec, current.retry_count)


@lru_cache(maxsize=1)
def _writer_of(pathspec: str, attempt: int) -> Any:
    """The one `Checkpoint` of this attempt: it numbers what it saves, and a second one would begin again at 0."""
    from metaflow import Checkpoint

    run_id = pathspec.split("/")[1]
    os.environ["METAFLOW_CHECKPOINT_UID"] = f"{pathspec}/{run_id}/a2d/{attempt}"
    return Checkpoint()
