"""Tasks of lm-evaluation-harness: the word tasks whose files are here, and how names become tasks, checked before any work."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from a2d_core.config import EvaluateConfig, UserError, require

HERE = Path(__file__).parent


def load(config: EvaluateConfig) -> list[Task | Group]:
    """The tasks and groups that `config.tasks` names: of this directory, of `config.task_dirs`, or of lm-eval itself.

    Raises `UserError` for an unknown name, for a task that runs model-written code without `config.code_execution`, and
    for one whose data or packages are not to be had.
    """
    for directory in config.task_dirs:
        require(Path(directory).is_dir(), f"evaluate.task_dirs: '{directory}' is not a directory")
    with quiet(config.code_execution):
        manager = _manager(config)
        for name in config.tasks:
            _check_name(name, manager)
        for name in config.tasks:
            unsafe = [task for task, file in _leaves(name, manager) if file.get("unsafe_code")]
            require(
                config.code_execution or not unsafe,
                f"task '{name}' runs code that the model writes ({', '.join(unsafe)}): allow it with evaluate.code_execution=true, "
                "in a container without secrets or network",
            )
        loaded = [part for name in config.tasks for part in _load(name, manager)]
    _require_once(loaded)
    return loaded


def leaves(loaded: Iterable[Task | Group]) -> list[Task]:
    """The single tasks in them."""
    return [task for part in loaded for task in (part.get_all_tasks() if isinstance(part, Group) else [part])]


@contextmanager
def quiet(code_execution: bool = False) -> Iterator[None]:
    """lm-eval without its log, its progress bar per task, its question to git (which complains outside a repository), and its
    worker processes; with leave to run code where that is given. All of it is put back at the end."""
    environment = {"DISABLE_MULTIPROC": "1"} | ({"HF_ALLOW_CODE_EXECUTION": "1"} if code_execution else {})
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            patch.dict(os.environ, environment),
            patch.object(lm_eval.api.task, "tqdm", functools.partial(lm_eval.api.task.tqdm, disable=True)),
            patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None),
        ):
            yield
    finally:
        log.setLevel(level)


def _manager(config: EvaluateConfig) -> TaskManager:
    """The index of our task files, and of lm-eval's 14,000 only where they are needed: reading those takes seconds."""
    directories = [HERE, *(Path(directory) for directory in config.task_dirs)]
    manager = TaskManager(include_path=directories, include_defaults=False)
    if set(config.tasks) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=directories)


def _check_name(name: str, manager: TaskManager) -> None:
    if name in manager.task_index or (name.endswith(".yaml") and Path(name).is_file()):
        return
    near = get_close_matches(name, manager.all_tasks, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those of lm-eval; evaluate.task_dirs adds others"
    raise UserError(f"unknown task '{name}': {hint}")


def _leaves(name: str, manager: TaskManager) -> Iterator[tuple[str, dict[str, Any]]]:
    """The single tasks that a name of the index stands for, and their files' content, without loading any."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    members = (entry.cfg or {}).get("task")
    members = entry.tags if entry.yaml_path is None else members if isinstance(members, list) else None
    if members is None:
        yield name, entry.cfg or {}
    for member in members or ():
        yield from _leaves(member if isinstance(member, str) else member.get("group") or member["task"], manager)


def _load(name: str, manager: TaskManager) -> list[Task | Group]:
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        is_off = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        remedy = (
            "the Hub is off (HF_HUB_OFFLINE is set), and the data are not in its cache: unset it once, or leave the task out"
            if is_off
            else "check the connection to the Hub, set HF_TOKEN where the data are gated, and install the packages it names"
        )
        raise UserError(f"task '{name}' cannot be loaded ({' '.join(str(error).split())}): {remedy}") from error
    inner = {child for children in loaded["group_map"].values() for child in children}
    found = {**loaded["tasks"], **loaded["groups"]}
    for task in loaded["tasks"].values():
        require(not getattr(task, "MULTIMODAL", False), f"task '{name}' asks about images or sound, not text alone: leave it out")
    return [part for key, part in found.items() if key not in inner]


def _require_once(loaded: list[Task | Group]) -> None:
    names = [task.task_name for task in leaves(loaded)]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"evaluate.tasks names {', '.join(twice)} twice, by itself or through its group: name it once")
