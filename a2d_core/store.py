"""Directories between the steps of the flow: put_dir, get_dir, get_latest, delete, prune; also in parts, one of each node.

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


def part(name: str, node: int) -> str:
    """The name of a node's part of a directory: that of node 0 is the directory's own."""
    return f"{name}-{node}" if node else name


def get_latest(name: str, destination: str | Path, nodes: int = 1, **metadata: Any) -> Reference | None:
    """Copy the newest whole directory of `stored(name, **metadata)` to `destination`; None where nothing was stored.

    Of several nodes the parts are put together, those with the same `step`; of files with the same name, that of node 0 stays.
    What is damaged is named and passed over. Raises `UserError` where all is damaged: what is there is not begun anew in silence.
    """
    found, damaged = _whole(name, nodes, metadata), []
    for first, *others in found:
        try:
            arrived = get_dir(first, destination)
            for reference in others:
                _join(get_dir(reference, arrived.with_name("part")), arrived)
        except DamagedError as error:
            damaged.append(str(error))
            print(f"passed over: {error}")
        else:
            return first
    require(not found, f"{'; '.join(damaged)}. There is no whole one to go on from: start a new run, or bring the files back")
    return None


def _whole(name: str, nodes: int, metadata: dict[str, Any]) -> list[list[Reference]]:
    """The references of each stored directory, one for each node, the newest first."""
    parts = [stored(part(name, node), **metadata) for node in range(nodes)]
    if nodes == 1:
        return [[reference] for reference in parts[0]]
    by_step = [{reference["metadata"]["step"]: reference for reference in reversed(references)} for references in parts]
    return [[own[step] for own in by_step] for step in sorted(set.intersection(*map(set, by_step)), reverse=True)]


def _join(part_dir: Path, whole: Path) -> None:
    """Move the files of a part to the directory that lacks them."""
    for file in part_dir.rglob("*"):
        target = whole / file.relative_to(part_dir)
        if file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
    shutil.rmtree(part_dir)


def stored(name: str, **metadata: Any) -> list[Reference]:
    """The directories of that name with that metadata which unfinished attempts at this step have left, the newest first.

    They are looked for in this task (a retry) and, in a resumed run, in the same step of the run that
    it resumes, and of the run which that one resumed. A step that had succeeded left nothing to go
    on from: `resume STEP` after a success starts the step afresh.
    """
    from metaflow import Checkpoint, Run, current

    found, origins = own(name), unfinished(current.origin_run_id)
    with _refusals(f"look for '{name}'"):
        while not found and (run := next(origins, None)):
            tasks = [task for step in Run(run, _namespace_check=False) if step.id == current.step_name for task in step]
            found = [r for task in tasks for r in Checkpoint()._search(pathspec=task.pathspec) if r["name"] == name]
    found = [reference for reference in found if metadata.items() <= reference["metadata"].items()]
    return sorted(found, key=lambda reference: reference["created_on"], reverse=True)


def own(name: str, nodes: int = 1) -> list[Reference]:
    """The directories of that name, in all their parts, which this task has stored; of a node's, the newest first."""
    with _refusals(f"look for '{name}'"):
        parts = [_writer().list(name=part(name, node)) for node in range(nodes)]
    return [one for found in parts for one in sorted(found, key=lambda reference: reference["created_on"], reverse=True)]


def unfinished(origin: str | None) -> Iterator[str]:
    """The runs (FLOW/ID) that this one resumes, the latest first, as far as this step did not succeed in them; `origin` is the latest."""
    from metaflow import Run, current

    while origin:
        run = Run(f"{current.flow_name}/{origin}", _namespace_check=False)
        tasks = [task for step in run if step.id == current.step_name for task in step]
        if tasks and all(task.successful for task in tasks):  # of several nodes one may have ended well before another failed
            return
        yield run.pathspec
        before = {task.metadata_dict.get("origin-run-id", "None") for step in run for task in step} - {"None"}
        origin = min(before, default=None)


def prune(name: str, keep: int, nodes: int = 1) -> None:
    """Delete all but the newest `keep` directories of that name which this task has stored.

    Where they are in parts, those go that are older than the newest `keep` of which every node has stored its part.
    """
    if nodes == 1:
        delete(own(name)[keep:])
        return
    parts = [own(part(name, node)) for node in range(nodes)]
    whole = sorted(set.intersection(*({reference["metadata"]["step"] for reference in found} for found in parts)), reverse=True)
    if len(whole) >= keep:
        delete([reference for found in parts for reference in found if reference["metadata"]["step"] < whole[keep - 1]])


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
