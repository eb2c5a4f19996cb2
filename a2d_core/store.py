"""Directories between the steps of the flow: put_dir, get_dir, latest, prune.

Artifacts hold only the small reference that `put_dir` returns; the files lie in Metaflow's
datastore, local or S3 alike, and are reached through metaflow-checkpoint's `Checkpoint`. The
`@checkpoint` decorator is not used: it would add an empty card (two more processes) to each step
and call for a metadata service in a pod. All that `Checkpoint` needs to know of the task is one
environment variable, which `_writer` sets.
"""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from a2d_core.config import require

Reference = dict[str, Any]
"""What an artifact holds of a stored directory: its key, name, time of creation and metadata."""


def put_dir(path: str | Path, name: str, **metadata: Any) -> Reference:
    """Store a directory under a name (letters, digits, `_`, `-`) and return the reference to it."""
    assert "." not in name and "/" not in name, f"'.' and '/' separate the parts of a stored key: {name!r}"
    return cast(Reference, _writer().save(path=str(path), name=name, metadata=metadata))


def get_dir(reference: Reference, destination: str | Path) -> Path:
    """Copy a stored directory to `destination`, replacing what is there.

    A copy, because the local datastore hands out symbolic links, and writing through one would
    change the stored file.
    """
    from metaflow import Checkpoint

    destination = Path(destination)
    arriving = destination.with_name(destination.name + ".arriving")
    for leftover in (destination, arriving):
        shutil.rmtree(leftover, ignore_errors=True)
    arriving.mkdir(parents=True)
    Checkpoint().load(reference, path=str(arriving))
    for file in arriving.rglob("*"):
        if file.is_symlink():
            stored = file.resolve(strict=True)
            file.unlink()
            shutil.copy2(stored, file)
    arriving.rename(destination)
    return destination


def latest(name: str) -> Reference | None:
    """The newest directory of that name which an unfinished attempt at this step has left, if any.

    It is looked for in this task (a retry) and, in a resumed run, in the same step of the run that
    it resumes, and of the run which that one resumed. A step that had succeeded left nothing to go
    on from: `resume STEP` after a success starts the step afresh.
    """
    from metaflow import Checkpoint, Run, current

    found = _writer().list(name=name)
    origin = current.origin_run_id
    while not found and origin:
        run = Run(f"{current.flow_name}/{origin}", _namespace_check=False)
        origins = {task.metadata_dict.get("origin-run-id", "None") for step in run for task in step} - {"None"}
        origin = min(origins, default=None)
        tasks = [task for step in run if step.id == current.step_name for task in step]
        if any(task.successful for task in tasks):
            break
        found = [r for task in tasks for r in Checkpoint()._search(pathspec=task.pathspec) if r["name"] == name]
    return max(found, key=lambda reference: reference["created_on"], default=None)


def prune(name: str, keep: int) -> int:
    """Delete all but the newest `keep` directories of that name which this task has stored; return how many went."""
    writer = _writer()
    newest_first = sorted(writer.list(name=name, as_dict=False), key=lambda stored: stored.created_on, reverse=True)
    for stored in newest_first[keep:]:
        writer._checkpointer._checkpoint_datastore.delete(stored)  # metaflow-checkpoint has no public way to delete
    return len(newest_first[keep:])


def check_datastore(kind: str) -> None:
    """Raise `UserError` where the flow keeps its artifacts in another kind of datastore than its directories."""
    from metaflow.metaflow_config import DEFAULT_DATASTORE

    require(
        kind == DEFAULT_DATASTORE,
        f"--datastore {kind} would leave the checkpoints in the {DEFAULT_DATASTORE} datastore: "
        f"set METAFLOW_DEFAULT_DATASTORE={kind} in place of the option",
    )


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
