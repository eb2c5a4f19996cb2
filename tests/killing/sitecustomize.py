"""Kills a task of the flow at named points, each once: test_resume puts this folder on PYTHONPATH.

A2D_KILL names a folder; a point is armed until a file of its name lies there. With A2D_KILL_ALL the scheduler dies
with the task, as on a machine that loses its power; without it the scheduler is left to try the step again.
"""

import os
import signal
import sys
import threading
from pathlib import Path

FOLDER = os.environ.get("A2D_KILL")
ROOT = Path(__file__).resolve().parents[2]


def die(point):
    """Die where this point is still armed."""
    try:
        (Path(FOLDER) / point).touch(exist_ok=False)
    except FileExistsError:
        return
    if os.environ.get("A2D_KILL_ALL"):
        os.killpg(0, signal.SIGKILL)
    for child in descendants(os.getpid()):
        os.kill(child, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def descendants(process):
    """The processes that this one has started, and theirs."""
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield from descendants(child)
            yield child


def around(owner, name, before=None, after=None):
    """Call `before` with the arguments of a function, and `after` once it is done."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def arm(step):
    """Arm the points of a step: module attributes that the flow calls are wrapped."""
    sys.path.insert(0, str(ROOT))  # the flow does so later
    from a2d_core import store

    if step == "start":
        from a2d_core import tracking

        around(tracking, "start_parent", after=lambda *_, **__: die("run begun, not recorded"))
    if step == "pretrain":
        import metaflow  # noqa: F401, first: its extensions import one another in a circle
        from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore import core

        from a2d_core import trainer

        stored, calls, walk = threading.Event(), [], core._extract_paths_inside_directory

        def in_training(*_):
            calls.append(1)
            if len(calls) == 3 and not (Path(FOLDER) / "in training").exists():
                stored.wait(60)  # checkpoint-2, by the follower
                die("in training")

        def half(directory):
            names, size, paths = walk(directory)
            is_model = Path(directory).name == "checkpoint-final" and not (Path(FOLDER) / "while saving").exists()
            return (names[::2], size, paths[::2]) if is_model else (names, size, paths)

        core._extract_paths_inside_directory = half
        around(trainer.DiffusionTrainer, "training_step", before=in_training)
        around(store, "put_dir", after=lambda *_, **__: stored.set())
        around(core.ObjectStorage, "_save_metadata", before=lambda _, __, found: found["name"] == "model" and die("while saving"))
    if step == "sft":
        around(store, "put_dir", before=lambda _, name, **__: name == "model" and die("between training and saving"))
    if step == "register":
        import mlflow

        around(store, "get_dir", before=lambda *_: die("before registration"))
        around(mlflow, "register_model", before=lambda *_, **__: die("logged, not registered"))
        around(mlflow, "register_model", after=lambda *_, **__: die("registered, without its alias"))


if FOLDER and "step" in sys.argv:
    arm(sys.argv[sys.argv.index("step") + 1])
