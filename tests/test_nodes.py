"""A node that dies ends the training on the others, which say which one it was, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from test_launch import HERE, _alive, _end, _pids, _until, nodes, on_nodes, workers_find_this_file  # noqa: F401

from a2d_core import launch
from a2d_core.config import UserError

SILENT_SECONDS = 4


@pytest.fixture
def running(nodes, tmp_path):  # noqa: F811
    """Two nodes that sleep, node 1 started by a process of its own: that process, and what comes of node 0."""
    first, second = (replace(node, silent_seconds=SILENT_SECONDS) for node in nodes)
    call = f'launch.run("test_launch:write_pids_and_sleep", {{"folder": {str(tmp_path)!r}}}, processes=1, nodes='
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    program = f"from a2d_core import launch; {call}launch.{second!r})"
    node_1 = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    with ThreadPoolExecutor(1) as pool:
        node_0 = pool.submit(launch.run, "test_launch:write_pids_and_sleep", {"folder": str(tmp_path)}, processes=1, nodes=first)
        try:
            _until(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in (0, 1)) or node_1.poll() is not None, seconds=120)
            time.sleep(2)  # the agents have begun to count
            yield node_0, node_1, *(int((tmp_path / f"{rank}.pid").read_text().split()[1]) for rank in (0, 1))
            _until(lambda: not any(_alive(pid) for pid in _pids(tmp_path)), seconds=60)
        finally:
            _end(node_1, tmp_path)


def check_lost(node: Future, words: str) -> None:
    with pytest.raises(launch.NodeLostError) as caught:
        node.result(timeout=60)
    assert str(caught.value) == f"node 1 of 2 (0 to 1) is lost: {words}"


def test_a_node_whose_process_is_killed_is_named_and_leaves_no_orphan(running):
    node_0, node_1, *_ = running
    node_1.kill()
    check_lost(node_0, "its process ended")


def test_a_machine_that_falls_silent_is_named(running):
    node_0, node_1, _, agent_of_1 = running
    os.kill(agent_of_1, signal.SIGKILL)  # nobody is left who could tell
    check_lost(node_0, f"nothing was heard of it for {SILENT_SECONDS} seconds")
    node_1.wait(30)


def test_node_0_is_missed_by_the_others(running):
    node_0, node_1, agent_of_0, _ = running
    os.kill(agent_of_0, signal.SIGSTOP)  # as when its machine is gone: the connections stay, and nobody answers
    assert f"node 0 of 2 (0 to 1) is lost: nothing was heard of it for {SILENT_SECONDS} seconds" in node_1.communicate(timeout=90)[1]
    os.kill(agent_of_0, signal.SIGKILL)
    with pytest.raises(launch.WorkerError):
        node_0.result(timeout=60)


def test_a_killed_rank_is_named_on_both_nodes(nodes):  # noqa: F811
    for error in on_nodes(nodes, "test_launch:fail_in_rank_one", [{"how": "killed"}] * 2):
        assert str(error).startswith("rank 1 ended without a message (SIGKILL)")


def test_nodes_that_share_no_files_have_paths_of_their_own(nodes):  # noqa: F811
    apart = [replace(node, share_files=False) for node in nodes]

    def outcomes(second: str) -> list:
        with ThreadPoolExecutor(2) as pool:
            calls = [{"paths_of": path} for path in ("/a/checkpoint-2", second)]
            how = {"processes": 1, "paths": ("paths_of",)}
            started = [
                pool.submit(launch.run, "test_launch:echo", call, nodes=node, **how) for call, node in zip(calls, apart, strict=True)
            ]
            return [future.exception() or future.result()["paths_of"] for future in started]

    assert outcomes("/b/checkpoint-2") == ["/a/checkpoint-2"] * 2
    for error in outcomes("/b/checkpoint-4"):
        assert isinstance(error, UserError)
        assert "node 1 was started with paths_of='checkpoint-4', and node 0 has 'checkpoint-2'" in str(error)
