"""Directories between the steps of the flow, put_dir and get_dir; checkpoints of a training that is not done, restore and prune.

Artifacts hold only the small reference that `put_dir` returns; the files lie in Metaflow's
datastore, local or S3 alike, and are reached through metaflow-checkpoint's `Checkpoint`. The
`@checkpoint` decorator is not used: it would add an empty card (two more processes) to each step
and call for a metadata service in a pod. All that `Checkpoint` needs to know of the task is one
environment variable, which `_writer` sets. A reference carries the digest of each file, and no
directory is handed out whose files are others.

Of several nodes each stores its part of a checkpoint, under a name of its own. A stored checkpoint has in its metadata its
`step` and its `score` (the lower, the better; None where it was not evaluated).
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from a2d_core import checkpoints
from a2d_core.config import UserError, require

ROOM = "a2d-step-"
"""How the names of the directories begin that steps work in."""
Reference = dict[str, Any]
"""What an artifact holds of a stored directory: its key, name, time of creation and metadata, with a digest of each file."""


class DamagedError(UserError):
    """A stored directory is not what was put there; the message names the file."""


def put_dir(path: str | Path, name: str, **metadata: Any) -> Reference:
    """Store a directory under a name (letters, digits, `_`, `-`) and return the reference to it.

    Raises `UserError` where the datastore does not take it.
    """
    assert "." not in name and "/" not in name, f"'.' and '/' separate the parts of a stored key: {name!r}"
    files = checkpoints.contents(Path(path))
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


def restore(name: str, output_dir: Path, nodes: int = 1, **metadata: Any) -> Path | None:
    """Put what `stored(name, **metadata)` has of a training into `output_dir`: the newest whole checkpoint, and the best before it.

    Returns the newest, `output_dir/checkpoint-STEP`, to go on from; None where nothing was stored. Of several nodes the parts are
    put together; of files with the same name, that of node 0 stays. What is damaged is named and passed over. Raises `UserError`
    where all is damaged: what is there is not begun anew in silence.
    """
    found = _whole([stored(part(name, node), **metadata) for node in range(nodes)])
    damaged: list[str] = []
    newest = next((one for one in found if _arrives(one, output_dir, damaged)), None)
    if newest is None:
        require(not found, f"{'; '.join(damaged)}. There is no whole one to go on from: start a new run, or bring the files back")
        return None
    better = [one for one in found[found.index(newest) :] if _step(one) < _step(newest) and _score(one) < _score(newest)]
    for one in sorted(better, key=_score):  # of equals the newest, which comes first
        if _arrives(one, output_dir, damaged):
            break
    for what in damaged:
        print(f"passed over: {what}")
    return _place(newest, output_dir)


def _writing(reference: Reference) -> tuple[str, int, int]:
    """By what the parts of one checkpoint are known: its task, the attempt and the step. In one task the latest is the greatest."""
    return reference["pathspec"], reference["attempt"], reference["metadata"]["step"]


def _whole(stored_parts: list[list[Reference]]) -> list[list[Reference]]:
    """The checkpoints, each in its parts and in the order of node 0's, of which all nodes have stored theirs."""
    by_writing = [{_writing(reference): reference for reference in references} for references in stored_parts]
    return [[own[key] for own in by_writing] for key in by_writing[0] if all(key in own for own in by_writing)]


def _step(parts: list[Reference]) -> int:
    return int(parts[0]["metadata"]["step"])


def _score(parts: list[Reference]) -> float:
    score = parts[0]["metadata"].get("score")
    return math.inf if score is None else score


def _place(parts: list[Reference], output_dir: Path) -> Path:
    return output_dir / f"checkpoint-{_step(parts)}"


def _arrives(parts: list[Reference], output_dir: Path, damaged: list[str]) -> bool:
    """Copy a checkpoint to its place; where a part is damaged, say so in `damaged`."""
    whole = _place(parts, output_dir)
    try:
        get_dir(parts[0], whole)
        for reference in parts[1:]:
            _join(get_dir(reference, output_dir / "part"), whole)
    except DamagedError as error:
        damaged.append(str(error))
        shutil.rmtree(whole, ignore_errors=True)
        return False
    return True


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

    They are those of this task (of its earlier attempts) and, in a resumed run, of the same step of the run that
    it resumes, and of the run which that one resumed. A step that had succeeded left nothing to go
    on from: `resume STEP` after a success starts the step afresh.
    """
    from metaflow import Checkpoint, Run, current

    found, origins = own(name), list(unfinished(current.origin_run_id))
    with _refusals(f"look for '{name}'"):
        for run in origins:
            tasks = [task for step in Run(run, _namespace_check=False) if step.id == current.step_name for task in step]
            found += [r for task in tasks for r in Checkpoint()._search(pathspec=task.pathspec) if r["name"] == name]
    found = [reference for reference in found if metadata.items() <= reference["metadata"].items()]
    return sorted(found, key=lambda reference: reference["created_on"], reverse=True)


def own(name: str, nodes: int = 1) -> list[Reference]:
    """The directories of that name, in all their parts, which this task has stored; of a node's, the newest first."""
    with _refusals(f"look for '{name}'"):
        parts = [_writer().list(name=part(name, node)) for node in range(nodes)]
    return [one for found in parts for one in sorted(found, key=lambda reference: reference["created_on"], reverse=True)]


def unfinished(origin: str | None) -> Iterator[str]:
    """The runs (FLOW/ID) that this one resumes, the latest first, as far as this step did not succeed in them; `origin` is the latest.

    Raises `UserError` where this machine knows nothing of one.
    """
    from metaflow import Run, current
    from metaflow.exception import MetaflowNotFound

    while origin:
        try:
            run = Run(f"{current.flow_name}/{origin}", _namespace_check=False)
        except MetaflowNotFound:
            raise UserError(
                f"nothing is known here of run {origin}, which this one resumes: a resumed run whose steps run on other machines "
                "than the one that started it needs Metaflow's metadata service (infra/README.md)"
            ) from None
        tasks = [task for step in run if step.id == current.step_name for task in step]
        if tasks and all(task.successful for task in tasks):  # of several nodes one may have ended well before another failed
            return
        yield run.pathspec
        before = {task.metadata_dict.get("origin-run-id", "None") for step in run for task in step} - {"None"}
        origin = min(before, default=None)


def prune(name: str, keep: int, nodes: int = 1) -> None:
    """Delete the checkpoints of that name which this task has stored, but for the newest `keep` whole ones and the best of the whole."""
    parts = [own(part(name, node)) for node in range(nodes)]
    whole = sorted(_whole(parts), key=lambda one: _writing(one[0]), reverse=True)
    if len(whole) > keep:
        oldest, best = (_writing(one[0]) for one in (whole[keep - 1], min(whole, key=_score)))  # of equals the newest
        delete([one for found in parts for one in found if _writing(one) < oldest and _writing(one) != best])


def delete(references: list[Reference]) -> None:
    """Delete stored directories, whichever task has stored them; those that are gone already stay so."""
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.checkpoints.checkpoint_storage import CheckpointDatastore
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore.task_utils import init_datastorage_object
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastructures import CheckpointArtifact

    for reference in references:  # metaflow-checkpoint has no public way to delete
        artifact = CheckpointArtifact.hydrate(reference)
        with _refusals(f"delete '{reference['url']}'"):
            CheckpointDatastore.init_delete_store(init_datastorage_object(), artifact).delete(artifact)


@contextmanager
def workroom(name: str) -> Iterator[Path]:
    """A directory to work in, which is deleted at the end; and so are those that steps which were killed have left on this machine.

    Who works in one holds a lock on it, which the system takes back when the process ends, however it does.
    """
    for leftover in Path(tempfile.gettempdir()).glob(f"{ROOM}*"):
        with suppress(OSError):  # locked by who works there, gone meanwhile, or another user's
            _delete_unlocked(leftover)
    with tempfile.TemporaryDirectory(prefix=f"{ROOM}{name}-") as room:
        handle = os.open(room, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks, where nothing is deleted either
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield Path(room)
        finally:
            os.close(handle)


def _delete_unlocked(room: Path) -> None:
    handle = os.open(room, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(handle)
        if status.st_uid == os.getuid() and time.time() - status.st_mtime > 60:  # a new one may not have its lock yet
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(room)
    finally:
        os.close(handle)


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
