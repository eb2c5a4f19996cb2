"""The sandbox: programs that a model has written, run one by one in a process of their own, with little time, memory and nothing else.

A program gets an empty directory in memory, a read-only view of the file system, no network, no other process, nothing of
this environment, and limits on time, memory and file size; what it prints is thrown away. `code_eval` stands in for the
metric of that name, from which the tasks of lm-eval (HumanEval, MBPP) take pass@k. A program's tests run in its own process, as
the tasks define it, so that one that is out to look right can.
"""

from __future__ import annotations

import math
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from a2d_core.config import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
NO_NAMESPACES = 97  # exit code of the child where the kernel refuses
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # numpy starts threads otherwise, which it may not


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 3
    """Processor time."""
    wall_seconds: float = 15.0
    """Time on the clock, the start of the interpreter included."""
    memory_mb: int = 512
    """Address space."""
    file_mb: int = 16
    """Files that it writes, in all."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """Whether it ran to its end."""
    why: str
    """`passed`, `out of time`, or the last line of what was raised."""


def run(program: str, isolation: str = "namespaces", limits: Limits = Limits()) -> Outcome:
    """Run a Python program. With `isolation="process"` nothing but limits and an audit hook stand around it.

    Raises `UserError` where the kernel does not give namespaces.
    """
    word = secrets.token_hex(16)  # which a program that ends before its end does not write
    with tempfile.TemporaryDirectory(prefix="a2d-sandbox-") as directory:
        numbers = (limits.cpu_seconds, limits.memory_mb, limits.file_mb)
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), isolation, directory, *map(str, numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=directory,
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = child.communicate(f"{word}\n{program}".encode("utf-8", "replace"), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            child.kill()  # what it started dies with it: see the child
            child.communicate()
            return Outcome(False, "out of time")
    text = said.decode("utf-8", "replace").strip()
    if child.returncode == NO_NAMESPACES:
        raise UserError(
            f"the kernel does not let this process shut a program in ({text}): allow user namespaces, as `unshare -rn true` needs them, "
            "or, in a container that has no network and nothing worth keeping, set evaluate.code_isolation=process"
        )
    if text == word:
        return Outcome(True, "passed")
    return Outcome(False, text or ("out of time" if child.returncode else "it left before its end"))


class CodeEval:
    """The metric `code_eval`: pass@k of candidate programs, each run with its test behind it."""

    def __init__(self, isolation: str, limits: Limits) -> None:
        self.isolation, self.limits = isolation, limits

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k, the mean over tasks of the unbiased estimate (arXiv 2107.03374, eq. 1), and how each candidate ended."""
        ends: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, (test, candidates) in enumerate(zip(references, predictions, strict=True)):
            found = [run(f"{candidate}\n{test}", self.isolation, self.limits) for candidate in candidates]
            ends[task] = [(i, {"task_id": task, "passed": o.passed, "result": o.why, "completion_id": i}) for i, o in enumerate(found)]
        counts = [(len(found), sum(end["passed"] for _, end in found)) for found in ends.values()]
        scores = {
            f"pass@{n}": sum(pass_at_k(total, right, n) for total, right in counts) / len(counts)
            for n in k
            if counts and all(total >= n for total, _ in counts)
        }
        return scores, ends


def pass_at_k(total: int, right: int, k: int) -> float:
    """The chance that one of k candidates passes, drawn from `total` of which `right` do."""
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


@contextmanager
def code_eval(isolation: str, limits: Limits = Limits()) -> Iterator[None]:
    """Let the tasks of lm-eval that are loaded meanwhile score programs with the sandbox, in place of a download that runs them here.

    Raises `UserError` at once where the sandbox does not work.
    """
    import evaluate

    run("", isolation, limits)
    load = evaluate.load

    def ours(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval(isolation, limits) if path == "code_eval" else load(path, *arguments, **options)

    with patch.object(evaluate, "load", ours):
        yield
