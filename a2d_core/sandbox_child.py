"""What runs inside the sandbox, as a script by itself: it shuts itself in, and then runs the program that it reads.

    python -I sandbox_child.py ISOLATION DIRECTORY CPU_SECONDS MEMORY_MB FILE_MB

The first line of its input is a word, and the rest the program. It prints the word where the program ran to its end, or the last
line of what was raised. It imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

NO_NAMESPACES = 97
NEW_USER, NEW_NET, NEW_MOUNTS, NEW_PIDS, NEW_IPC = 0x10000000, 0x40000000, 0x20000, 0x20000000, 0x8000000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXECUTION = 1, 2, 4, 8  # flags of a mount
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, {"shmget": 29, "socket": 41, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58}),
    "aarch64": (0xC00000B7, {"shmget": 194, "socket": 198, "socketpair": 199, "clone": 220}),
}
"""Machine -> its number in seccomp, and the calls that start processes and threads, reach others by sockets, or take memory that
`RLIMIT_AS` does not count. The limits do not keep root from the first, nor a network namespace from a socket that is a file."""
SYSTEM_CALLS_EVERYWHERE = {"io_uring_setup": 425, "clone3": 435}
FORBIDDEN = (
    "socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.system", "os.kill", "pty.spawn",
)  # fmt: skip
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown")


def call(name: str, *arguments: Any) -> None:
    """Call a function of libc; raise `OSError` where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare() -> None:
    """Leave the machine's network, mounts, processes and users; the process that is forked next is the first of the new ones."""
    user, group = os.getuid(), os.getgid()
    call("unshare", NEW_USER | NEW_NET | NEW_MOUNTS | NEW_PIDS | NEW_IPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(text)


def shut_in(directory: str, file_mb: int) -> None:
    """Make every mount read-only and without devices, put a small one in memory at `directory`, and give up the right to undo it."""
    private, here, and_below, mount_setattr = 1 << 18, -100, 0x8000, 442
    flags = READ_ONLY | NO_SETUID | NO_DEVICES
    call("syscall", mount_setattr, here, b"/", and_below, struct.pack("QQQQ", flags, 0, private, 0), 32)
    flags = NO_SETUID | NO_DEVICES | NO_EXECUTION
    call("mount", b"tmpfs", directory.encode(), b"tmpfs", flags, f"size={file_mb}m".encode())
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header, no_capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", header, no_capabilities)
    forbid_system_calls()


def forbid_system_calls() -> None:
    """Let those of `SYSTEM_CALLS` fail from now on, by a filter of the kernel's; on other machines the limits stand alone."""
    if os.uname().machine not in SYSTEM_CALLS:
        return
    machine, calls = SYSTEM_CALLS[os.uname().machine]
    numbers = [*calls.values(), *SYSTEM_CALLS_EVERYWHERE.values()]
    load, jump_if_equal, jump_if_above, leave = 0x20, 0x15, 0x35, 0x06
    allow, refuse, foreign = 0x7FFF0000, 0x50001, 0x40000000  # foreign: calls in the way of another architecture (x32)
    steps = [(load, 0, 0, 4), (jump_if_equal, 0, len(numbers) + 3, machine), (load, 0, 0, 0)]
    steps += [(jump_if_above, len(numbers) + 1, 0, foreign)]
    steps += [(jump_if_equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(leave, 0, 0, allow), (leave, 0, 0, refuse)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program)), 0, 0)  # PR_SET_SECCOMP


def limit(cpu_seconds: int, memory_mb: int, file_mb: int) -> None:
    """Limit what this process may use; the limits cannot be raised again."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (most, most))


def watch(directory: str, is_alone: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: `PermissionError` for sockets, processes, and writing outside of `directory`. The second wall, or the only one."""
    inside = os.path.realpath(directory)

    def is_inside(path: Any) -> bool:
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return os.path.realpath(path).startswith(inside + os.sep) or path == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN) or (is_alone and event == "ctypes.dlopen"):
            raise PermissionError(f"the sandbox does not allow {event}")
        if event == "open" and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not isinstance(arguments[0], int) and not is_inside(arguments[0]):
                raise PermissionError(f"the sandbox does not allow writing to {arguments[0]!r}")
        elif event.startswith(WRITES) and not all(is_inside(path) for path in arguments if isinstance(path, (str, bytes, os.PathLike))):
            raise PermissionError(f"the sandbox does not allow {event} outside of its directory")

    return hook


def execute(program: str, hook: Callable[[str, tuple[Any, ...]], None], word: str, out: int) -> None:
    """Run the program as a module of its own, and write how it ended."""
    namespace = {"__name__": "__program__", "__builtins__": __builtins__}
    sys.addaudithook(hook)
    try:
        exec(compile(program, "program", "exec"), namespace)
    except BaseException as error:  # SystemExit too: a program that leaves before its tests has not passed them
        word = f"{type(error).__name__}: {error}".strip(": ").splitlines()[-1][:200]
    os.write(out, word.encode("utf-8", "replace"))
    os._exit(0)


def main() -> None:
    """See the file's head."""
    isolation, directory, *numbers = sys.argv[1:]
    cpu_seconds, memory_mb, file_mb = map(int, numbers)
    word, _, program = sys.stdin.buffer.read().decode("utf-8").partition("\n")
    out = os.dup(1)
    os.set_inheritable(out, False)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        if isolation == "namespaces":
            unshare()
        if child := os.fork():
            os.close(out)
            sys.exit(max(1, code) if (code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) else 0)
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the parent, and all of the new processes with this one
        os.chdir("/")
        if isolation == "namespaces":
            shut_in(directory, file_mb)
    except OSError as error:
        os.write(out, str(error).encode())
        os._exit(NO_NAMESPACES)
    os.chdir(directory)
    limit(cpu_seconds, memory_mb, file_mb)
    execute(program, watch(directory, is_alone=isolation != "namespaces"), word, out)


if __name__ == "__main__":
    main()
