"""The sandbox: what a program may do, and what it may not."""

import os
import socket
import time
from itertools import combinations

import pytest

from a2d_core import sandbox, sandbox_child
from a2d_core.config import UserError
from a2d_core.sandbox import CodeEval, Limits, code_eval, pass_at_k

QUICK = Limits(cpu_seconds=1, wall_seconds=10, memory_mb=256, file_mb=4)


def namespaces() -> bool:
    try:
        sandbox.run("", "namespaces", QUICK)
    except UserError:
        return False
    return True


ISOLATIONS = [
    pytest.param("namespaces", marks=pytest.mark.skipif(not namespaces(), reason="the kernel refuses user namespaces")),
    "process",
]


@pytest.fixture(params=ISOLATIONS)
def run(request):
    return lambda program, limits=QUICK: sandbox.run(program, request.param, limits)


def test_a_right_program_passes_and_a_wrong_one_says_why(run):
    assert run("def add(a, b):\n    return a + b\nassert add(2, 3) == 5").passed
    assert run("assert 2 + 3 == 6, 'six'") == sandbox.Outcome(False, "AssertionError: six")
    assert run("def broken(:").why.startswith("SyntaxError")


def test_a_program_gets_the_standard_library_and_a_directory_of_its_own(run):
    program = (
        "import collections, heapq, json, math, re, os\nassert os.listdir() == []\n"
        "open('a', 'w').write('b')\nassert open('a').read() == 'b'"
    )
    assert run(program) == sandbox.Outcome(True, "passed")


@pytest.mark.parametrize("leave", ["raise SystemExit(0)", "import os\nos._exit(0)", "print('passed')\nimport os\nos._exit(0)"])
def test_a_program_that_leaves_before_its_tests_has_not_passed(run, leave):
    assert not run(f"{leave}\nassert False").passed


def test_an_endless_loop_and_an_endless_sleep_end(run):
    start = time.monotonic()
    assert run("while True: pass").why == "out of time"
    assert run("import time\ntime.sleep(1000)", Limits(wall_seconds=2)).why == "out of time"
    assert time.monotonic() - start < 60  # neither ends by itself


def test_memory_and_files_are_limited(run):
    assert run("x = bytearray(1 << 30)").why.startswith("MemoryError")
    assert not run("open('big', 'wb').write(bytes(8 << 20))").passed


def test_no_socket_reaches_anything(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert not run(connect).passed
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_outside_is_written_or_removed(run, tmp_path):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('!')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename('x', {str(kept)!r})",
        f"import pathlib\npathlib.Path({str(tmp_path / 'directory')!r}).mkdir()",
    ):
        assert not run(program).passed, program
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


def test_no_process_is_started(run):
    assert not run("import subprocess\nsubprocess.run(['true'])").passed
    assert not run("import os\nos.fork()").passed


def test_the_environment_is_empty(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os\nassert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ").passed


@pytest.mark.skipif(not namespaces(), reason="the kernel refuses user namespaces")
def test_the_namespaces_hold_without_the_audit_hook():
    """What gets around Python meets the kernel."""
    outside = f"assert libc.open({str(__file__).encode()!r}, 1) == -1"
    write = f"import ctypes\nlibc = ctypes.CDLL(None)\n{outside}\nassert libc.open(b'in', 65, 0o600) >= 0"
    assert sandbox.run(write, "namespaces", QUICK) == sandbox.Outcome(True, "passed")
    undo = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(None, b'/', None, 32 | 4096, None) == -1"
    assert sandbox.run(undo, "namespaces", QUICK).passed
    assert sandbox.run("import os\nassert os.getpid() == 1", "namespaces", QUICK).passed
    device = "import ctypes\nassert ctypes.CDLL(None).open(b'/dev/full', 1) == -1"
    assert sandbox.run(device, "namespaces", QUICK).passed


@pytest.mark.skipif(not namespaces(), reason="the kernel refuses user namespaces")
@pytest.mark.skipif(os.uname().machine not in sandbox_child.SYSTEM_CALLS, reason="no filter of system calls for this machine")
@pytest.mark.parametrize(
    "start", ["fork()", "vfork()", "syscall(435, 0, 0)", "socket(2, 1, 0)", "socket(1, 1, 0)", "shmget(0, 4096, 0o1600)"]
)
def test_no_process_and_no_socket_comes_about_even_for_root_and_without_the_audit_hook(start):
    assert sandbox.run(f"import ctypes\nassert ctypes.CDLL(None).{start} == -1", "namespaces", QUICK) == sandbox.Outcome(True, "passed")


@pytest.mark.skipif(not namespaces(), reason="the kernel refuses user namespaces")
def test_no_thread_is_started_and_numpy_does_without():
    assert not sandbox.run("import threading\nthreading.Thread(target=print).start()", "namespaces", QUICK).passed
    assert sandbox.run("import numpy\nassert numpy.ones(3) @ numpy.ones(3) == 3").passed


def test_a_kernel_that_refuses_is_told_with_the_remedy(monkeypatch, tmp_path):
    child = sandbox.CHILD.read_text().replace('call("unshare", ', 'call("setns", -1, ')
    (tmp_path / "child.py").write_text(child)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    with pytest.raises(UserError, match=r"does not let this process shut a program in .*code_isolation=process"):
        sandbox.run("", "namespaces", QUICK)
    assert sandbox.run("", "process", QUICK).passed


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for total, right, k in ((5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 2)):
        chosen = [any(i < right for i in some) for some in combinations(range(total), k)]
        assert pass_at_k(total, right, k) == pytest.approx(sum(chosen) / len(chosen))


def test_it_stands_in_for_code_eval_while_tasks_are_loaded():
    import evaluate

    before = evaluate.load
    with code_eval("process", QUICK):
        metric = evaluate.load("code_eval")
    assert evaluate.load is before
    assert isinstance(metric, CodeEval)
    scores, ends = metric.compute(references=["assert f() == 1"], predictions=[["def f(): return 1", "def f(): return 2"]], k=[1, 2, 3])
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}
    assert [end["result"] for _, end in ends[0]] == ["passed", "AssertionError"]
    assert os.environ.get("HF_ALLOW_CODE_EVAL") is None
