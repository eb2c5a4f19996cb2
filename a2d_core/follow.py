"""Following a training stage from outside: what it logs goes to tracking and the card, its checkpoints to the store.

The stage knows nothing of all that: it appends rows to `metrics.jsonl` and writes `checkpoint-N`
directories, and a `Follower` watches both while it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from a2d_core import checkpoints

Row = dict[str, Any]
"""One line of `metrics.jsonl`: `step`, `max_steps`, and the numbers that belong to the step."""


class Log(Protocol):
    """Where rows are sent: `tracking.MetricLog`."""

    def add(self, rows: list[Row]) -> None:
        """Take rows, to be sent."""

    def send(self) -> int:
        """Send what waits; on an error, keep it."""


class Follower:
    """Watches a training stage while it runs.

        with Follower(output_dir, log=MetricLog(run_id), on_rows=card.update, on_checkpoint=keep):
            sft.run(config, model_dir, output_dir)

    A thread looks every `interval` seconds, and once more when the body has ended. `on_rows` gets all rows so far,
    `on_checkpoint` the newest checkpoint and the best, once each, if they were not there at the beginning: the step, and a
    directory of hard links, which the trainer's own clean-up does not touch. Training neither waits nor fails for any of
    this: while the log does not take rows, they wait, at the end for up to `patience` seconds; what
    raises is not done again, and its error is raised once the body has ended well. What the log has not
    taken by then is its owner's to send: `refused` is the log's last word, or None. Without a log, only checkpoints are followed.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        log: Log | None = None,
        on_rows: Callable[[list[Row]], None] | None = None,
        on_checkpoint: Callable[[int, Path], None] | None = None,
        interval: float = 1.0,
        patience: float = 20.0,
    ) -> None:
        self.rows: list[Row] = []
        self.errors: list[Exception] = []
        self.refused: Exception | None = None
        self._output_dir, self._log, self._interval, self._patience = Path(output_dir), log, interval, patience
        self._on_rows, self._on_checkpoint = on_rows, on_checkpoint
        self._offset, self._last, self._shown = 0, b"", 0
        self._kept = set(checkpoints.steps(self._output_dir).values())
        self._refusals, self._next_try = 0, 0.0
        self._jobs = [self._read, self._show, self._keep, self._send] if log else [self._keep]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="follower", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        deadline = time.monotonic() + (self._patience if kind is None else 0)
        self._ended.set()
        self._thread.join()
        self._look(final=True)
        while self.refused and time.monotonic() < deadline:
            time.sleep(self._interval)
            self._look(final=True)
        if kind is None and self.errors:
            raise self.errors[0]

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._look()

    def _look(self, final: bool = False) -> None:
        """Do each job once; one that raises is given up."""
        if final:
            self._next_try = 0.0
        for job in list(self._jobs):
            try:
                job()
            except Exception as error:
                self._jobs.remove(job)
                self.errors.append(error)
                _say(f"{type(error).__name__}: {error}; training goes on, and the step fails when it is done")

    def _read(self) -> None:
        """Take in the rows that are new and complete."""
        path = self._output_dir / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            text = file.read()
            if not text.startswith(self._last):  # a resumed training began the file anew
                self.rows, self._offset, self._last = [], 0, b""
                file.seek(0)
                text = file.read()
        whole = text[len(self._last) : text.rfind(b"\n") + 1]  # the last line may be half written
        if not whole:
            return
        lines = whole.splitlines(keepends=True)
        self._offset, self._last = self._offset + len(whole), lines[-1]
        new = [json.loads(line) for line in lines]
        self.rows += new
        if self._log:
            self._log.add(new)

    def _show(self) -> None:
        if self._on_rows and len(self.rows) != self._shown:
            self._shown = len(self.rows)
            self._on_rows(self.rows)

    def _keep(self) -> None:
        """Hand over the best complete checkpoint and the newest, where they are new."""
        if self._on_checkpoint:
            for found in (checkpoints.best(self._output_dir, self.rows), checkpoints.newest(self._output_dir, digests=False)):
                if found and found not in self._kept:
                    self._hand_over(found, self._on_checkpoint)

    def _hand_over(self, found: Path, on_checkpoint: Callable[[int, Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="keep-", dir=self._output_dir.parent) as room:
            copy = Path(room) / found.name
            try:
                shutil.copytree(found, copy, copy_function=_link)
            except (FileNotFoundError, shutil.Error):
                if checkpoints.damage(found, digests=False) is None:
                    raise
            if checkpoints.damage(copy, digests=False) is None:  # else the trainer was deleting it, so there is a newer or a better one
                on_checkpoint(int(found.name.removeprefix("checkpoint-")), copy)
                self._kept.add(found)

    def _send(self) -> None:
        if self._log is None or time.monotonic() < self._next_try:
            return
        try:
            sent = self._log.send()
        except Exception as error:  # whatever it is: it is tried again, and `refused` where it lasts
            if not self.refused:
                _say(f"MLflow does not take metrics ({cause(error)}); training goes on, and they are sent later")
            self.refused, self._refusals = error, self._refusals + 1
            self._next_try = time.monotonic() + min(30.0, self._interval * 2**self._refusals)
        else:
            if self.refused:
                _say(f"MLflow answers again: {sent} numbers were sent")
            self.refused, self._refusals = None, 0


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def cause(error: BaseException) -> str:
    """The innermost cause of an error, on one line: clients wrap what happened in what they were doing."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _say(message: str) -> None:
    print(f"[follower] {message}", file=sys.stderr, flush=True)
