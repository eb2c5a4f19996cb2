"""Tasks of lm-evaluation-harness: the word tasks whose files are here, and how names become tasks, checked before any work."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_OFFLINE
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from a2d_core.config import EvaluateConfig, UserError, require
from a2d_core.data import readers

HERE = Path(__file__).parent
BUILDERS = {suffix: builder for suffix, builder in readers.BUILDERS.items() if suffix != ".txt"}
"""Ending of a file with data -> what `datasets` reads it with."""
ANSWERED = ("generate_until", "loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""What a task may ask of the model."""


def load(config: EvaluateConfig) -> list[Task | Group]:
    """The tasks and groups that `config.tasks` names: of this directory, of `config.task_dirs`, or of lm-eval itself.

    Data come from where the task file says, or from `config.datasets`. Raises `UserError` for an unknown name, for a task
    that runs model-written code without `config.code_execution`, for one whose data or packages are not to be had, and for
    one that asks the model for what it does not do.
    """
    for directory in config.task_dirs:
        require(Path(directory).is_dir(), f"evaluate.task_dirs: '{directory}' is not a directory")
    with quiet(config.code_execution):
        manager = _manager(config)
        for name in (*config.tasks, *config.datasets):
            _check_name(name, manager)
        for name in config.tasks:
            unsafe = [task for task, file in _leaves(name, manager) if file.get("unsafe_code")]
            require(
                config.code_execution or not unsafe,
                f"task '{name}' runs code that the model writes ({', '.join(unsafe)}): allow it with evaluate.code_execution=true, "
                "in a container without secrets or network",
            )
        for name, directory in config.datasets.items():
            _use_local_data(name, Path(directory), config, manager)
        local = {leaf for name in config.datasets for leaf, _ in _leaves(name, manager)}
        loaded = [part for name in config.tasks for part in _load(name, manager, any(leaf in local for leaf, _ in _leaves(name, manager)))]
    _require_once(loaded)
    return loaded


def leaves(loaded: Iterable[Task | Group]) -> list[Task]:
    """The single tasks in them."""
    return [task for part in loaded for task in (part.get_all_tasks() if isinstance(part, Group) else [part])]


def reads_is_greedy(task: Task) -> bool:
    """Whether a task's metrics may read that the greedy sampler reproduces a continuation."""
    metrics = getattr(task, "_metric_fn_list", {})
    known = {"multiple_choice": "exact_match", "loglikelihood": "acc"}
    return callable(task.config.process_results) or known.get(str(task.OUTPUT_TYPE), "acc") in metrics


@contextmanager
def recorded_failures(tasks: Iterable[Task]) -> Iterator[dict[str, list[str]]]:
    """Let a document whose likelihood is not finite, or whose metrics raise an error, have none; task -> why, in order."""
    failures: dict[str, list[str]] = {}

    def attempt(process_results: Callable[..., dict[str, Any]], found: list[str], document: Any, answers: list[Any]) -> dict[str, Any]:
        values = (answer[0] if isinstance(answer, (tuple, list)) and answer else answer for answer in answers)
        if not all(math.isfinite(value) for value in values if isinstance(value, float)):
            found.append("the likelihood is not finite")
            return {}
        try:
            return process_results(document, answers)
        except Exception as error:  # a task's own code, and perhaps the model's: whatever it raises is told
            found.append(f"{type(error).__name__}: {error}")
            return {}

    with ExitStack() as stack:
        for task in tasks:
            found = failures.setdefault(task.task_name, [])
            stack.enter_context(patch.object(task, "process_results", functools.partial(attempt, task.process_results, found)))
        yield failures


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
    manager = TaskManager(include_path=[HERE, *map(Path, config.task_dirs)], include_defaults=False)
    names = (*config.tasks, *config.datasets)
    if not all(name in manager.task_index for asked in names for name in (asked, *(leaf for leaf, _ in _leaves(asked, manager)))):
        own = dict(manager.task_index)
        manager.task_index.update({**_index_of_lm_eval(), **own})
        for name, entry in own.items():
            if entry.kind is Kind.TAG and name in _index_of_lm_eval():
                manager.task_index[name] = replace(entry, tags=entry.tags | _index_of_lm_eval()[name].tags)
    return manager


@functools.lru_cache(maxsize=1)
def _index_of_lm_eval() -> dict[str, Entry]:
    return TaskIndex().build([Path(lm_eval.tasks.__file__).parent])


def _check_name(name: str, manager: TaskManager) -> None:
    if name in manager.task_index or (name.endswith(".yaml") and Path(name).is_file()):
        return
    near = get_close_matches(name, list(manager.task_index), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those of lm-eval; evaluate.task_dirs adds others"
    raise UserError(f"unknown task '{name}': {hint}")


def _leaves(name: str, manager: TaskManager) -> Iterator[tuple[str, dict[str, Any]]]:
    """The single tasks that a name stands for, and their files' content, without loading any; an unknown name is one."""
    entry = manager.task_index.get(name)
    members = (entry.cfg or {}).get("task") if entry else None
    if entry and entry.kind is Kind.TAG:
        members = sorted(entry.tags)
    if not isinstance(members, list):
        yield name, (entry.cfg if entry else None) or {}
        return
    for member in members:
        yield from _leaves(member if isinstance(member, str) else member.get("group") or member["task"], manager)


def _use_local_data(name: str, directory: Path, config: EvaluateConfig, manager: TaskManager) -> None:
    """Let the tasks that `name` stands for read the files of a directory: a split each, named SPLIT.json, .jsonl, .parquet or .csv.

    A task that reads one configuration of a data set (MMLU's subjects, say) finds it in the folder of that name, if there is one.
    """
    require(directory.is_dir(), f"evaluate.datasets: '{directory}', the data of '{name}', is not a directory")
    asked = {task for part in config.tasks for task, _ in _leaves(part, manager)}
    leaves = [task for task, _ in _leaves(name, manager) if task in asked]
    require(bool(leaves), f"evaluate.datasets names '{name}', and none of evaluate.tasks={', '.join(config.tasks)} is or belongs to it")
    for task in leaves:
        entry = manager.task_index[task]
        file = dict(entry.cfg or {}) if entry.yaml_path is None else load_yaml(entry.yaml_path)
        folder = directory / str(file.get("dataset_name"))
        folder = folder if folder.is_dir() else directory
        found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS}
        builders = {BUILDERS[path.suffix] for path in found.values()}
        splits = {file.get(split) for split in ("test_split", "fewshot_split") if file.get(split)} or {file.get("validation_split")}
        require(
            len(builders) == 1 and splits <= set(found),
            f"task '{task}' needs {' and '.join(sorted(map(str, splits)))} in '{folder}', as .jsonl, .json, .parquet or .csv of one kind: "
            f"there are {', '.join(path.name for path in found.values()) or 'none'}",
        )
        files = {"data_files": {split: str(path) for split, path in found.items()}}
        data: dict[str, Any] = {"dataset_path": builders.pop(), "dataset_name": None, "dataset_kwargs": files, "custom_dataset": None}
        for split in ("training_split", "validation_split"):
            data[split] = file.get(split) if file.get(split) in found else None  # else lm-eval looks for examples in it
        manager.task_index[task] = replace(entry, yaml_path=None, cfg={**file, **data})


def _load(name: str, manager: TaskManager, has_local_data: bool) -> list[Task | Group]:
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TemplateError, DatasetsError, StopIteration) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split()) or "its data have no rows"
        remedy = "check the connection to the Hub, set HF_TOKEN where the data are gated, and install the packages it names"
        if has_local_data:
            remedy = "see that the files of evaluate.datasets are whole, and have the columns of the original"
        elif HF_HUB_OFFLINE:
            remedy = "the Hub is off (HF_HUB_OFFLINE is set), and the data are not in its cache: unset it once, or leave the task out"
        raise UserError(f"task '{name}' cannot be loaded ({reason}): {remedy}") from error
    inner = {child for children in loaded["group_map"].values() for child in children}
    found = {**loaded["tasks"], **loaded["groups"]}
    for task in loaded["tasks"].values():
        require(
            task.OUTPUT_TYPE in ANSWERED,
            f"task '{task.task_name}' asks for '{task.OUTPUT_TYPE}', and the model does {', '.join(ANSWERED)}: leave it out",
        )
        require(not getattr(task, "MULTIMODAL", False), f"task '{name}' asks about images or sound, not text alone: leave it out")
    return [part for key, part in found.items() if key not in inner]


def _require_once(loaded: list[Task | Group]) -> None:
    names = [task.task_name for task in leaves(loaded)]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"evaluate.tasks names {', '.join(twice)} twice, by itself or through its group: name it once")
