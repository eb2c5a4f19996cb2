"""Directories between the steps of the flow: put_dir, get_dir, latest, prune; and directories in parts, one of each node.

Artifacts hold only the small reference that `put_dir` returns; the files lie in Metaflow's
datastore, local or S3 alike, and are reached through metaflow-checkpoint's `Checkpoint`. The
`@checkpoint` decorator is not used: it would add an empty card (two more processes) to each step
and call for a metadata service in a pod. All that `Checkpoint` needs to know of the task is one
environment variable, which `_writer` sets.
"""

from __future__ import annotations

import math
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
    return max(_unfinished(name), key=lambda reference: reference["created_on"], default=None)


def part(name: str, node: int) -> str:
    """The name of a node's part of a directory: that of node 0 is the directory's own."""
    return f"{name}-{node}" if node else name


def latest_parts(name: str, nodes: int) -> list[Reference]:
    """The parts of all nodes of the newest directory that each of them has stored with the same `step`; none where there is none."""
    by_age = [sorted(_unfinished(part(name, node)), key=lambda reference: reference["created_on"]) for node in range(nodes)]
    stored = [{reference["metadata"]["step"]: reference for reference in references} for references in by_age]
    steps = set.intersection(*map(set, stored))
    return [references[max(steps)] for references in stored] if steps else []


def get_parts(references: list[Reference], destination: str | Path) -> Path:
    """Copy the parts of a directory to `destination`, all into one; of files with the same name, that of node 0 stays."""
    destination = get_dir(references[0], destination)
    for reference in references[1:]:
        arrived = get_dir(reference, destination.with_name("part"))
        for file in arrived.rglob("*"):
            target = destination / file.relative_to(arrived)
            if file.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)
        shutil.rmtree(arrived)
    return destination


def _unfinished(name: str) -> list[Reference]:
    """The directories of that name to which `latest` looks."""
    from metaflow import Checkpoint, Run, current

    found = _writer().list(name=name)
    origin = current.origin_run_id
    while not found and origin:
        run = Run(f"{current.flow_name}/{origin}", _namespace_check=False)
        origins = {task.metadata_dict.get("origin-run-id", "None") for step in run for task in step} - {"None"}
        origin = min(origins, default=None)
        tasks = [task for step in run if step.id == current.step_name for task in step]
        if tasks and all(task.successful for task in tasks):  # of several nodes one may have ended well before another failed
            break
        found = [r for task in tasks for r in Checkpoint()._search(pathspec=task.pathspec) if r["name"] == name]
    return found


def prune(name: str, keep: int, nodes: int = 1) -> int:
    """Delete all but the newest `keep` directories of that name which this task has stored; return how many went.

    Where they are in parts, those go that are older than the newest `keep` of which every node has stored its part.
    """
    writer = _writer()
    parts = [
        sorted(writer.list(name=part(name, node), as_dict=False), key=lambda stored: stored.created_on, reverse=True)
        for node in range(nodes)
    ]
    going = parts[0][keep:]
    if nodes > 1:
        whole = sorted(set.intersection(*({stored.metadata["step"] for stored in own} for own in parts)), reverse=True)[:keep]
        oldest = min(whole) if len(whole) == keep > 0 else -math.inf if keep else math.inf
        going = [stored for own in parts for stored in own if stored.metadata["step"] < oldest]
    for stored in going:
        writer._checkpointer._checkpoint_datastore.delete(stored)  # metaflow-checkpoint has no public way to delete
    return len(going)


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

    pathspec = current.pathspec
    if current.get("is_parallel"):  # the tasks of all nodes write in the name of node 0's, where each finds the others' parts
        pathspec = f"{pathspec.rpartition('/')[0]}/{current.parallel.control_task_id}"
    return _writer_of(pathspec, current.retry_count)


@lru_cache(maxsize=1)
def _writer_of(pathspec: str, attempt: int) -> Any:
    """The one `Checkpoint` of this attempt: it numbers what it saves, and a second one would begin again at 0."""
    from metaflow import Checkpoint

    run_id = pathspec.split("/")[1]
    os.environ["METAFLOW_CHECKPOINT_UID"] = f"{pathspec}/{run_id}/a2d/{attempt}"
    return Checkpoint()
