"""Directories that are whole or absent: how a checkpoint is written, known to be whole, and replaced by the next.

A checkpoint is written below `partial/`, sealed with the size and digest of each file, and then
renamed to `checkpoint-N`. So a training that is killed, or whose disk is full, leaves the one before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from a2d_core.config import UserError, require

Files = dict[str, dict[str, Any]]
"""Name of a file, relative to its directory -> its `bytes` and `sha256`."""
MANIFEST = "manifest.json"
MODEL_FILES = (".safetensors", ".json", ".jinja")
"""Endings of what makes a model: weights, configuration, tokenizer."""
PARTIAL = "partial"
"""Where a directory is written, beside its final place."""


@contextmanager
def whole(target: Path, *, is_main: bool = True, meet: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give the body an empty directory to fill; when it and all processes are done, the directory gets the name `target`.

    `meet` waits for all processes. Raises `UserError` where the disk does not take the files; nothing is left of them then.
    """
    room = target.parent / PARTIAL
    with told(target):
        if is_main:
            shutil.rmtree(room, ignore_errors=True)
            (room / target.name).mkdir(parents=True)
        meet()
        try:
            yield room / target.name
            meet()
            if is_main:
                _seal(room / target.name)
                _move(room / target.name, target)
        finally:
            if is_main:  # of the others none may delete what its peers are writing: the next one to write does
                shutil.rmtree(room, ignore_errors=True)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn the body's failure to write `path` into a `UserError` that names the room on the disk and the last good checkpoint."""
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint raises one that is no Exception
        reason = _failed_write(error)
        if reason is None:
            raise
        there = next(folder for folder in path.absolute().parents if folder.exists())
        room = f"{_mib(shutil.disk_usage(there).free)} are free at '{there}' now"
        last = newest(path.parent, digests=False)
        if last:
            size = sum(entry["bytes"] for entry in _sealed(last).values())
            room += f", and a checkpoint takes {_mib(size)}"
        raise UserError(
            f"cannot write '{path}' ({reason}): {room}. Free some space or lower keep_checkpoints; {go_on(path.parent)}"
        ) from error


def _failed_write(error: BaseException) -> str | None:
    """Why the operating system took no more, or None where the error is another one; libraries have many words for it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    source = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, RuntimeError) and source.parts[-2:] == ("torch", "serialization.py"):
        return "torch.save could not write to the end of a file"
    lines = [line for line in str(error).splitlines() if "(os error " in line or os.strerror(errno.ENOSPC) in line]
    return lines[0].strip() if lines else None  # the first sign is that of Rust: safetensors, tokenizers


def damage(checkpoint: Path, *, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None; without `digests` the files' sizes are compared, and not what they hold."""
    try:
        files = _sealed(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return difference(checkpoint, files, digests=digests)


def survey(folder: Path) -> Files:
    """The size and digest of each file below a directory."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _entry(path) for path in found}


def contents(folder: Path) -> Files:
    """`survey`, and of a checkpoint what was written: its files are not read again, and what a disk has made of them since shows."""
    if not (folder / MANIFEST).exists():
        return survey(folder)
    return _sealed(folder) | {MANIFEST: _entry(folder / MANIFEST)}


def difference(folder: Path, files: Files, *, digests: bool = True) -> str | None:
    """In what a directory differs from what `survey` found, or None."""
    for name, expected in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != expected["bytes"]:
            return f"{name} has {found:,} bytes instead of {expected['bytes']:,}"
        if digests and _digest_of(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def digest(model_dir: str | Path, *, as_sealed: bool = False) -> str:
    """The SHA-256 of a model directory's weights, configuration and tokenizer.

    `as_sealed`: of what was written there, as the manifest has it, without reading the files again.
    """
    folder = Path(model_dir)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in MODEL_FILES and path.name != MANIFEST)
    sealed = _sealed(folder) if as_sealed else {}
    digests = {name: sealed[name]["sha256"] if as_sealed else _digest_of(folder / name) for name in names}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def steps(output_dir: Path) -> dict[int, Path]:
    """Step -> `checkpoint-N` directory, whole or not, the newest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in output_dir.glob("checkpoint-*")}
    return {step: found[str(step)] for step in sorted(map(int, filter(str.isdecimal, found)), reverse=True)}


def newest(output_dir: Path, *, digests: bool = True, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint; `say` is told of each one that is damaged and passed over."""
    for path in steps(output_dir).values():
        wrong = damage(path, digests=digests)
        if wrong is None:
            return path
        say(f"'{path}' is damaged and passed over: {wrong}")
    return None


def check(checkpoint: Path) -> None:
    """Raise `UserError` where a checkpoint to resume from is missing or damaged."""
    require(checkpoint.is_dir(), f"there is no checkpoint '{checkpoint}' to resume from")
    wrong = damage(checkpoint)
    require(wrong is None, f"checkpoint '{checkpoint}' is damaged: {wrong}; {go_on(checkpoint.parent)}")


def best(output_dir: Path, history: Iterable[dict[str, Any]]) -> Path | None:
    """The whole checkpoint that was evaluated, by the rows of `history`, with the least held-out NELBO; the newest of equals."""
    scores = _scores(history)
    whole = (step for step, path in steps(output_dir).items() if step in scores and damage(path, digests=False) is None)
    step = min(whole, key=lambda step: (scores[step], -step), default=None)
    return None if step is None else output_dir / f"checkpoint-{step}"


def score(checkpoint: Path) -> float | None:
    """The held-out NELBO of a `checkpoint-N`, where it was evaluated at its step: by this the best is told from the others."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return _scores(history).get(int(checkpoint.name.removeprefix("checkpoint-")))


def _scores(history: Iterable[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["eval_nelbo"] for row in history if math.isfinite(row.get("eval_nelbo", math.nan))}


def prune(output_dir: Path, count: int, step: int, history: Iterable[dict[str, Any]] = ()) -> None:
    """Delete all checkpoints up to `step` but the newest `count` whole ones and the best; later ones are what an earlier run left."""
    past = [path for number, path in steps(output_dir).items() if number <= step]
    kept = [*[path for path in past if damage(path, digests=False) is None][:count], best(output_dir, history)]
    for path in past:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def go_on(output_dir: Path) -> str:
    """How to go on from the newest whole checkpoint, for the end of a message."""
    last = newest(output_dir, digests=False)
    if last is None:
        return f"there is no good checkpoint in '{output_dir}': start again"
    return f"the last good checkpoint is '{last}': resume from it (--resume; in the flow a retry, or resume)"


def _seal(folder: Path) -> None:
    """Bring every file to the disk, and write down its size and digest."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps({"files": survey(folder)}, indent=1))
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def _sealed(folder: Path) -> Files:
    """What `_seal` wrote down."""
    return {name: {"bytes": e["bytes"], "sha256": e["sha256"]} for name, e in json.loads((folder / MANIFEST).read_text())["files"].items()}


def _move(source: Path, target: Path) -> None:
    """Give `source` the name `target`; what had that name goes."""
    if target.exists():
        target.rename(source.with_name("replaced"))
    source.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _digest_of(path)}


def _digest_of(path: Path) -> str:
    """SHA-256 of a file, which is read again only where it has changed."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, _size: int, _modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
