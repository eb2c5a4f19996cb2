"""The launcher: results, errors and signals of one process and of several."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from a2d_core import launch
from a2d_core.config import UserError

HERE = Path(__file__).resolve().parent


# The functions that the workers call: they find this file on PYTHONPATH.


def sum_of_ranks(start: int) -> dict:
    import torch

    rank = torch.tensor([torch.distributed.get_rank() + start])
    torch.distributed.all_reduce(rank)
    return {
        "sum": int(rank),
        "world": torch.distributed.get_world_size(),
        "threads": torch.get_num_threads(),
        "spin": os.environ["GOMP_SPINCOUNT"],
    }


def fail_in_rank_one(how: str) -> None:
    import torch

    if torch.distributed.get_rank() == 1:
        if how == "user":
            raise UserError("max_length=7 is not a multiple of 4: use 4")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("the loss has no tokens")
    torch.distributed.barrier()


def write_pids_and_sleep(folder: str) -> None:
    import torch

    (Path(folder) / f"{torch.distributed.get_rank()}.pid").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(120)


def fail_in_rank_zero(how: str) -> None:
    import torch

    if torch.distributed.get_rank() == 0:
        raise UserError(how)
    time.sleep(60)


def strategy_of_this_process() -> list:
    import torch

    return [torch.distributed.get_world_size(), os.environ.get("ACCELERATE_USE_FSDP")]


def echo(**kwargs) -> dict:
    return kwargs | {"pid": os.getpid()}


def refuse(message: str) -> None:
    raise UserError(message)


@pytest.fixture(autouse=True)
def workers_find_this_file(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def test_one_process_is_called_in_place():
    assert launch.run("test_launch:echo", {"a": [1, None]}, processes=1) == {"a": [1, None], "pid": os.getpid()}
    with pytest.raises(UserError, match="no such thing"):
        launch.run("test_launch:refuse", {"message": "no such thing"}, processes=1)


def test_arguments_arrive_the_same_whatever_the_number_of_processes():
    assert launch.run("test_launch:echo", {"a": (1, 2)}, processes=1)["a"] == [1, 2]
    with pytest.raises(TypeError):
        launch.run("test_launch:echo", {"a": Path("x")}, processes=1)
    with pytest.raises(UserError, match="at least 1, not 0"):
        launch.run("test_launch:echo", {}, processes=0)


def test_two_processes_meet_and_share_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert launch.run("test_launch:sum_of_ranks", {"start": 10}, processes=2) == {"sum": 21, "world": 2, "threads": 1, "spin": "0"}


def test_threads_are_divided_and_never_none(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert launch.environment(3)["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch.environment(10_000)["OMP_NUM_THREADS"] == "1"


def test_a_users_mistake_in_one_rank_comes_back_word_for_word(capfd):
    with pytest.raises(UserError) as caught:
        launch.run("test_launch:fail_in_rank_one", {"how": "user"}, processes=2)
    assert str(caught.value) == "max_length=7 is not a multiple of 4: use 4"
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_error_in_one_rank_comes_back_with_its_traceback():
    with pytest.raises(launch.WorkerError, match="rank 1 failed: ZeroDivisionError: the loss has no tokens") as caught:
        launch.run("test_launch:fail_in_rank_one", {"how": "error"}, processes=2)
    assert "fail_in_rank_one" in str(caught.value)
    assert (caught.value.rank, caught.value.kind) == (1, "ZeroDivisionError")


def test_a_killed_rank_is_named():
    with pytest.raises(launch.WorkerError, match=r"rank 1 ended without a message \(SIGKILL\)") as caught:
        launch.run("test_launch:fail_in_rank_one", {"how": "killed"}, processes=2)
    assert caught.value.kind == "SIGKILL"


def test_a_strategy_is_followed_by_one_process_too():
    assert launch.run("test_launch:strategy_of_this_process", {}, processes=1, strategy="fsdp2") == [1, "true"]


# --- several nodes ---------------------------------------------------------------------------------


@pytest.fixture
def nodes():
    """Two nodes that meet on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [launch.Nodes(2, rank, address, meeting_seconds=60) for rank in (0, 1)]


def on_nodes(nodes, target, kwargs):
    """What `launch.run` returns or raises on each node; `kwargs` of each."""

    def run(node, kwargs):
        try:
            return launch.run(target, kwargs, processes=1, nodes=node)
        except (UserError, launch.WorkerError) as error:
            return error

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(run, nodes, kwargs))


def test_two_nodes_meet_and_each_returns_the_result_of_rank_zero(nodes):
    first, second = on_nodes(nodes, "test_launch:sum_of_ranks", [{"start": 10}] * 2)
    assert first == second
    assert (first["sum"], first["world"]) == (21, 2)


def test_a_failure_on_one_node_is_told_on_both(nodes):
    for error in on_nodes(nodes, "test_launch:fail_in_rank_one", [{"how": "error"}] * 2):
        assert str(error).startswith("rank 1 failed: ZeroDivisionError: the loss has no tokens")
    for error in on_nodes(nodes, "test_launch:fail_in_rank_zero", [{"how": "word for word"}] * 2):
        assert isinstance(error, UserError)
        assert str(error) == "word for word"


def test_a_node_that_was_given_other_arguments_is_refused_on_both(nodes):
    for error in on_nodes(nodes, "test_launch:sum_of_ranks", [{"start": 10}, {"start": 11}]):
        assert isinstance(error, UserError)
        assert "node 1 was started with start=11, and node 0 has 10" in str(error)


@pytest.mark.parametrize("present", [0, 1])
def test_a_node_that_does_not_come_is_waited_for_until_the_time_limit(nodes, present):
    with pytest.raises(UserError, match=r"the 2 nodes did not meet at 127\.0\.0\.1:\d+ within 3 seconds"):
        launch.run("test_launch:sum_of_ranks", {"start": 10}, processes=1, nodes=replace(nodes[present], meeting_seconds=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0,), "at least 1, not 0"),
        ((2, 2, "a:1"), "none of 0 to 1"),
        ((2, 0), "as HOST:PORT, not None"),
        ((2, 0, "a"), "HOST:PORT, not 'a'"),
    ],
)
def test_nodes_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        launch.Nodes(*values)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_stopped_parent_leaves_no_orphan(tmp_path, signal_number):
    program = f"""
        from a2d_core import launch
        launch.run("test_launch:write_pids_and_sleep", {{"folder": {str(tmp_path)!r}}}, processes=2)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so would the child
    )
    try:
        _until(lambda: len(_pids(tmp_path)) == 3 or parent.poll() is not None, seconds=120)
        assert parent.poll() is None, f"the parent ended early with {parent.returncode}"
        parent.send_signal(signal_number)
        parent.wait(60)
        assert parent.returncode == -signal_number
        _until(lambda: not any(_alive(pid) for pid in _pids(tmp_path)), seconds=60)
    finally:
        _end(parent, tmp_path)


def _end(process: subprocess.Popen, folder: Path) -> None:
    """SIGKILL to a process and to the workers and agents that have written their ids."""
    for pid in {process.pid, *_pids(folder)}:
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)


def _pids(folder: Path) -> set[int]:
    """Process ids of the workers and of their agent, as far as written."""
    return {int(pid) for path in folder.glob("*.pid") for pid in path.read_text().split()}


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds} seconds"
        time.sleep(0.1)
