"""Run a function in this process, or in several that train together.

`run("package.module:function", kwargs, processes=N)` calls the function with JSON-serialisable
keyword arguments and returns its JSON-serialisable result. One process: here, in place, so that a
debugger works. Several: one agent (`torch.distributed.run`) starts N workers on this machine, which
meet on the loopback interface; each calls the function inside an initialised process group, and
the result of rank 0 comes back through a file. Several nodes: each calls `run` with the same arguments
and its own rank, their workers meet at node 0's address, and the result of rank 0 comes back on all.

`strategy` is how the processes share a training: an accelerate configuration, which accelerate's own
code turns into the environment of the workers.

What comes back from a failure is the failing rank's own message, on every node: a `UserError` or
`StoppedError` as itself, a node that died as a `NodeLostError`, anything else as a `WorkerError` with the traceback.
SIGTERM and Ctrl-C reach the workers, and nothing survives its parent, however that one ends. Nothing heavy is
imported in the caller.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from a2d_core import strategies
from a2d_core.config import StoppedError, UserError, require

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.5  # how often a child looks whether its parent is still there
STOP_SECONDS = 45  # an agent that was told to stop gives its workers 30 seconds
FAILURE = "a2d-failure"  # the first failure's key in the store that the nodes share
ALIVE = "a2d-alive"  # and the beginning of the keys at which each node counts up while it lives
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Nodes:
    """The machines that train together, as one of them sees them."""

    count: int = 1
    """Machines."""
    rank: int = 0
    """Number of this one, from 0."""
    main_address: str | None = None
    """host:port of node 0, as the others reach it; the port must be free there."""
    meeting_seconds: int = 600
    """How long a node waits for the others."""
    silent_seconds: int = 60
    """After how long a node of which nothing is heard is taken for dead."""
    share_files: bool = True
    """Whether all see the same directories; if not, each has its own, at a path of its own, and `run` is told which those are."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"nodes must be at least 1, not {self.count}")
        require(0 <= self.rank < self.count, f"node_rank={self.rank} is none of 0 to {self.count - 1}, the ranks of {self.count} nodes")
        host, _, port = (self.main_address or "").rpartition(":")
        require(
            self.count == 1 or bool(host and port.isdecimal()),
            f"{self.count} nodes need the address of node 0 as HOST:PORT, not {self.main_address!r}: --main-address 10.0.0.1:29500",
        )

    @property
    def main(self) -> tuple[str, str]:
        """Host and port of node 0."""
        host, _, port = (self.main_address or "127.0.0.1:0").rpartition(":")
        return host.strip("[]"), port


ONE_NODE = Nodes()


class NodeLostError(RuntimeError):
    """A node has ended, or is not heard of any more: the message names it."""


AS_THEMSELVES = {"UserError": UserError, "StoppedError": StoppedError, "NodeLostError": NodeLostError}
"""Exceptions that come back from a worker as they were raised."""


class WorkerError(RuntimeError):
    """A worker failed: `rank` is its rank, `kind` the name of its exception (or of the signal that ended it)."""

    def __init__(self, message: str, *, rank: int, kind: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind


@dataclass(frozen=True)
class _Failure:
    """What the processes tell each other of a failure, as JSON."""

    rank: int
    kind: str
    """Name of the exception, or of the signal that ended the process."""
    message: str
    traceback: str = ""
    time: float = field(default_factory=time.time)
    """When it happened: the first one is the cause of the others."""

    @staticmethod
    def of(error: Exception, rank: int) -> _Failure:
        """The exception that is being handled."""
        kind = "UserError" if isinstance(error, UserError) else type(error).__name__
        return _Failure(rank, kind, str(error), traceback.format_exc())

    @staticmethod
    def of_node(nodes: Nodes, rank: int, how: str) -> _Failure:
        """A node that is not there any more."""
        return _Failure(0, NodeLostError.__name__, f"node {rank} of {nodes.count} (0 to {nodes.count - 1}) is lost: {how}")

    def write(self, folder: Path, rank: int) -> None:
        """Leave it for the caller, as what rank `rank` knows: it may have heard it from another."""
        _write(folder / f"error-{rank}.json", asdict(self))


# --- the caller -----------------------------------------------------------------------------------


def run(
    target: str,
    kwargs: dict[str, Any],
    *,
    processes: int,
    strategy: str = "ddp",
    nodes: Nodes = ONE_NODE,
    paths: tuple[str, ...] = (),
) -> Any:
    """Call `target` ("package.module:function") with `kwargs` in `processes` processes of each node; return the result of rank 0.

    `paths` names the arguments that are directories: of nodes that do not share their files, only the last part must be the same.
    Raises what the function raises (one process, which shares nothing: ddp), or `UserError` and `WorkerError` as told
    at the top of this file; `UserError` too where fewer GPUs than processes are visible, where a node does not come
    within `nodes.meeting_seconds`, and where it comes with other arguments than node 0.
    """
    require(processes >= 1, f"processes must be at least 1, not {processes}")
    file = strategies.file(strategy)
    kwargs = json.loads(json.dumps(kwargs))  # the same values arrive, whatever the number of processes
    if processes == nodes.count == 1 and strategy == "ddp":
        return _find(target)(**kwargs)
    with tempfile.TemporaryDirectory(prefix="a2d-launch-") as name:
        folder = Path(name)
        group = {"processes": processes, "strategy": strategy, "nodes": asdict(nodes), "paths": paths}
        _write(folder / "call.json", {"target": target, "kwargs": kwargs, "file": str(file), **group})
        command = [sys.executable, "-m", "a2d_core.launch", "agent", name, str(os.getpid())]
        code, terminated = _wait(lambda: subprocess.Popen(command, env=environment(processes, nodes)))
        if not terminated:
            return _outcome(folder, code)
        _first_failure(folder)  # what a worker had the time to say
    os.kill(os.getpid(), signal.SIGTERM)  # the workers are gone; now this process answers the signal in its own way
    raise WorkerError(f"training was stopped by SIGTERM on {processes} processes", rank=0, kind="SIGTERM")


def divide(items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """`work(items)`, a result for each, shared out among the processes of the group: all of them get all of it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    rank, processes = PartialState().process_index, PartialState().num_processes
    if processes == 1:
        return work(list(items))
    results: list[Any] = [None] * len(items)
    for first, part in enumerate(gather_object([work(list(items[rank::processes]))])):
        results[first::processes] = part
    return results


def calm_threads() -> None:
    """Keep OpenMP's threads from spinning, in this process, if torch is not loaded yet, and in its children.

    Alone on two cores a training step takes a third longer so; beside one busy process it is three to ten times faster.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def environment(processes: int, nodes: Nodes = ONE_NODE) -> dict[str, str]:
    """This process's environment for `processes` children: shared-out threads that do not spin, loopback, and this package."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    budget = int(threads) if threads.isdecimal() else _cores()
    package = str(Path(__file__).resolve().parents[1])
    made = os.environ | {
        "OMP_NUM_THREADS": str(max(1, budget // processes)),
        "GOMP_SPINCOUNT": "0",  # libgomp's spinning threads slow their neighbours twenty-fold
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback and nodes.main[0] in LOOPBACK:
        made.setdefault("GLOO_SOCKET_IFNAME", loopback)  # else gloo wants a host name that resolves
    return made


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _find(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _wait(start: Callable[[], subprocess.Popen[bytes]]) -> tuple[int, bool]:
    """Start a child and wait for it, passing SIGTERM on; returns its exit code and whether SIGTERM came."""
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for child in children:
            child.terminate()

    handles = threading.current_thread() is threading.main_thread()  # Python takes signals there alone
    previous = signal.signal(signal.SIGTERM, pass_on) if handles else None
    try:
        children.append(start())
        if received:  # it came while the child was being started
            children[0].terminate()
        return children[0].wait(), bool(received)
    finally:
        if children and children[0].poll() is None:  # an exception passes through, such as KeyboardInterrupt
            _stop(children[0])
        if handles:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _outcome(folder: Path, code: int) -> Any:
    """The result that rank 0 wrote, or the exception for what failed first."""
    first = _first_failure(folder)
    if first:
        message = f"rank {first.rank} failed: {first.kind}: {first.message}\n{first.traceback}"
        raise WorkerError(message if first.traceback else first.message, rank=first.rank, kind=first.kind)
    if code != 0:
        raise WorkerError(
            f"the processes did not start, or were stopped from outside (exit code {code}): see the output above", rank=0, kind="Exit"
        )
    return _read(folder / "result.json")


def _first_failure(folder: Path) -> _Failure | None:
    """The first failure that was written; raised as it was, where its message is all that there is to tell."""
    failures = [_Failure(**_read(path)) for path in folder.glob("error-*.json")]
    first = min(failures, key=lambda failure: failure.time, default=None)
    if first and first.kind in AS_THEMSELVES:
        raise AS_THEMSELVES[first.kind](first.message)
    return first


# --- what all processes use -----------------------------------------------------------------------


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    """Write JSON so that the file is either absent or whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def die_with(parent: int, end: Callable[[], None]) -> None:
    """Call `end` as soon as process `parent`, which started this one, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        end()

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def _leave(code: int, nodes: Nodes) -> NoReturn:
    """End this process with that code; among several nodes at once: a thread that is inside a store's call aborts a normal exit."""
    if nodes.count > 1:
        _leave_at_once(code)
    sys.exit(code)


def _leave_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def terminate() -> None:
    """End this process by SIGTERM, which its children hear of."""
    os.kill(os.getpid(), signal.SIGTERM)


# --- the agent of a node --------------------------------------------------------------------------


def _agent(folder: Path, parent: int) -> None:
    """Start and watch over the workers: torch.distributed.run, quiet, in a process that ends with its parent."""
    call = _read(folder / "call.json")
    nodes = Nodes(**call["nodes"])
    pulse = Pulse(nodes, folder)
    die_with(parent, pulse.end_with_parent)
    logging.disable(logging.CRITICAL)  # in the agent, not in its workers: a failure is told by the caller, once
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        os.environ.update(strategies.environment(Path(call["file"]), call["processes"] * nodes.count, nodes.count))
        pulse.start()
        torchrun(
            [*_where(nodes), f"--nproc-per-node={call['processes']}", "-m", "a2d_core.launch", "worker", str(folder), str(os.getpid())]
        )
    except ChildFailedError as error:
        for failure in _ends_without_message(folder, error.failures):
            failure.write(folder, failure.rank)
            pulse.tell(failure)
        _leave(1, nodes)
    except SignalException as error:
        if os.getppid() != parent:  # nobody is left to do it
            shutil.rmtree(folder, ignore_errors=True)
        _leave(128 + error.sigval, nodes)
    except (UserError, DistError) as error:
        if nodes.count == 1 and isinstance(error, DistError):
            raise
        what = (
            f"the {nodes.count} nodes did not meet at {nodes.main_address} within {nodes.meeting_seconds} seconds ({error}): start node "
            f"0 to {nodes.count - 1} with the same --nodes and --main-address, a free port of node 0 that the others reach"
        )
        _Failure(0, "UserError", str(error) if isinstance(error, UserError) else what).write(folder, 0)
        _leave(1, nodes)
    _leave(0, nodes)


def _ends_without_message(folder: Path, ends: dict[int, Any]) -> list[_Failure]:
    """The failures of the workers that ended first, and left no message themselves."""
    own = min(end.timestamp for end in ends.values()) + STOP_SECONDS / 2
    failures = []
    for rank, end in ends.items():
        # from `own` on the ends are the agent's own doing: SIGTERM to the others, SIGKILL 30 seconds later
        if end.exitcode == -signal.SIGTERM or end.timestamp >= own or (folder / f"error-{rank}.json").exists():
            continue
        how = signal.Signals(-end.exitcode).name if end.exitcode < 0 else f"exit code {end.exitcode}"
        advice = "; SIGKILL often means that the machine ran out of memory" if how == "SIGKILL" else ""
        failures.append(_Failure(rank, how, f"rank {rank} ended without a message ({how}){advice}", time=0.0))  # its peers complain of it
    return failures


class Pulse:
    """Says to the other nodes that this one lives, and what has ended it; node 0 says whom it does not hear of any more.

    The agents do it, which have nothing else to do, through the store that node 0's agent keeps. Without it the
    others would wait for a machine that is gone until the time limit of a collective operation, if there is one.
    """

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self._nodes, self._folder = nodes, folder
        self._store: Any = None
        self._beats = 0
        self._most_silent = nodes.silent_seconds / POLL_SECONDS  # in looks, not seconds: while this process is suspended it does not look

    def start(self) -> None:
        """Begin, where there are other nodes."""
        if self._nodes.count > 1:
            threading.Thread(target=self._beat, name="pulse", daemon=True).start()
        if self._nodes.rank:
            threading.Thread(target=self._miss_node_0, name="miss-node-0", daemon=True).start()

    def tell(self, failure: _Failure) -> None:
        """End the workers of all nodes with this message, unless another was first."""
        if self._store is None:
            return
        from torch.distributed import DistError

        with suppress(DistError):
            self._store.compare_set(FAILURE, "", json.dumps(asdict(failure)))
            time.sleep(2 * POLL_SECONDS)  # node 0's store ends with its agent: until then all have heard

    def end_with_parent(self) -> None:
        """End this agent, whose parent is gone."""
        self.tell(_Failure.of_node(self._nodes, self._nodes.rank, "its process ended"))
        terminate()

    def _beat(self) -> None:
        from torch.distributed import DistError, TCPStore

        host, port = self._nodes.main
        others = range(1, self._nodes.count) if self._nodes.rank == 0 else range(0)
        heard = dict.fromkeys(others, (0, 0))  # a node's count, and for how many looks it has been the same
        with suppress(DistError):  # the nodes did not meet, or node 0's agent has ended
            self._store = store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=self._nodes.meeting_seconds))
            while True:
                store.add(f"{ALIVE}-{self._nodes.rank}", 1)
                self._beats += 1
                for rank, (before, looks) in heard.items():
                    count = store.add(f"{ALIVE}-{rank}", 0)
                    heard[rank] = count, looks + 1 if count == before > 0 else 0  # those that have not come yet have `meeting_seconds`
                    if heard[rank][1] > self._most_silent:
                        self.tell(self._silent(rank))
                time.sleep(POLL_SECONDS)

    def _miss_node_0(self) -> None:
        """End this node when node 0 does not answer: a store whose machine is gone leaves its clients waiting."""
        before = looks = 0
        while looks <= self._most_silent:
            time.sleep(POLL_SECONDS)
            looks = looks + 1 if self._beats == before > 0 else 0
            before = self._beats
        self._silent(0).write(self._folder, 0)
        terminate()

    def _silent(self, rank: int) -> _Failure:
        return _Failure.of_node(self._nodes, rank, f"nothing was heard of it for {self._nodes.silent_seconds} seconds")


def _where(nodes: Nodes) -> list[str]:
    """Where the agents meet, in the words of torch.distributed.run."""
    if nodes.count == 1:
        return ["--standalone", "--nnodes=1", "--local-addr=127.0.0.1"]
    host, port = nodes.main
    meeting = [f"--master-addr={host}", f"--master-port={port}", f"--rdzv-conf=timeout={nodes.meeting_seconds}"]
    return [f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}", *meeting]


# --- a worker -------------------------------------------------------------------------------------


def _worker(folder: Path, parent: int) -> None:
    """One of the processes: join the group, call the function, and leave the result or the error in a file."""
    die_with(parent, lambda: os._exit(1))
    rank = int(os.environ["RANK"])
    call = _read(folder / "call.json")
    nodes = Nodes(**call["nodes"])
    fail = _share_failures(folder, rank, nodes) if nodes.count > 1 else lambda error: _fail(folder, rank, _Failure.of(error, rank))
    try:
        _call(folder, call)
    except Exception as error:
        fail(error)
    _leave(0, nodes)


def _fail(folder: Path, rank: int, failure: _Failure) -> None:
    failure.write(folder, rank)
    _leave_at_once(1)  # a normal exit would wait for peers that wait for this one


def _share_failures(folder: Path, rank: int, nodes: Nodes) -> Callable[[Exception], None]:
    """End this worker with the message of the first one that fails on any node; returns what ends it with its own, or that one's.

    Without it a node would wait for another that has failed until the time limit of a collective operation.
    """
    from torch.distributed import DistError, TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # the agents', which node 0 keeps

    def end(failure: _Failure) -> None:
        time.sleep(2 * POLL_SECONDS)  # node 0's agent, and the store with it, ends with its workers: until then all have heard
        _fail(folder, rank, failure)

    def lost(failure: _Failure) -> _Failure:
        message = f"node 0 of {nodes.count} is lost, and its own output says why ({failure.message})"
        return replace(failure, kind=NodeLostError.__name__, message=message)

    def listen() -> None:
        try:
            while not store.check([FAILURE]):
                time.sleep(POLL_SECONDS)
            failure = _Failure(**json.loads(store.get(FAILURE)))
        except DistError as error:
            failure = lost(_Failure.of(error, rank))
        end(failure)

    def fail(error: Exception) -> None:
        failure = _Failure.of(error, rank)
        if isinstance(error, DistError) or "gloo" in str(error):  # a peer is gone: `listen` hears from an agent which, and why
            time.sleep(nodes.silent_seconds + STOP_SECONDS)
        try:
            failure = _Failure(**json.loads(store.compare_set(FAILURE, "", json.dumps(asdict(failure)))))  # the first failure stays
        except DistError:
            failure = lost(failure)
        end(failure)

    threading.Thread(target=listen, name="listen-to-nodes", daemon=True).start()
    return fail


def _call(folder: Path, call: dict[str, Any]) -> None:
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    gpus, processes = torch.cuda.device_count(), call["processes"]
    require(gpus == 0 or gpus >= processes, f"{processes} processes need a GPU each, and {gpus} are visible: ask for {gpus} processes")
    by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if gpus == 0:  # without a word from us accelerate, and so the Trainer, makes N lone processes on a CPU
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if by_deepspeed else {"ACCELERATE_USE_CPU": "true"}
    PartialState(cpu=gpus == 0 and not by_deepspeed, backend="gloo" if gpus == 0 else None)
    _compare_with_node_0(call)
    result = _find(call["target"])(**call["kwargs"])
    state, world = PartialState(), processes * call["nodes"]["count"]  # what the function's own accelerate objects made of it
    assert state.num_processes == world, f"{world} processes were asked for, and the function ran in groups of {state.num_processes}"
    result = broadcast_object_list([result])[0]
    if state.is_local_main_process:
        _write(folder / "result.json", result)
    state.destroy_process_group()


def _compare_with_node_0(call: dict[str, Any]) -> None:
    """Raise `UserError` where another node was given other arguments than node 0."""
    from accelerate.utils import broadcast_object_list

    def values(call: dict[str, Any]) -> dict[str, Any]:
        shared = {name: call[name] for name in ("target", "processes", "strategy")} | {"nodes": call["nodes"]["count"]}
        own = {name: value and Path(value).name for name, value in call["kwargs"].items() if name in call["paths"]}
        return shared | call["kwargs"] | ({} if call["nodes"]["share_files"] else own)

    mine, theirs = values(call), broadcast_object_list([values(call)])[0]
    differing = [
        f"{name}={mine.get(name)!r}, and node 0 has {theirs.get(name)!r}" for name in mine | theirs if mine.get(name) != theirs.get(name)
    ]
    require(
        not differing,
        f"node {call['nodes']['rank']} was started with {'; '.join(differing)}: give every node the same command, all but --node-rank, "
        "and the same directories, on a file system that all of them see",
    )


if __name__ == "__main__":
    {"agent": _agent, "worker": _worker}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
