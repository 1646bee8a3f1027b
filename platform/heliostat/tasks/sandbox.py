"""Isolates processes that handle untrusted data or code.

`shut_in`, `forbid`, and `limit` isolate the process that calls them, such as a parser of curation. If it is run as a script, this
file runs a Python program in isolation. `heliostat.evaluation.unit_tests` starts this script by its path. The script needs only
Python's standard library. The script reads its request as JSON from standard input. The program that the script runs has

- its own namespaces: user, mounts, network (without a device), processes, System V objects, host name;
- a root folder in memory, with Python's libraries, read-only, and an empty folder of bounded size that it may write to;
- no capability, no way to get one, no sockets except its own socket pairs, no other process or thread, and limits of time,
  memory, files, and open files;
- file descriptors 0 (empty), 1 and 2 (the output), and 3, on which it reports that it has reached its end.

If the machine doesn't allow this isolation, nothing runs: the exit code is 125, with a reason on descriptor 3. Exit code 124
means that the CPU time is used up.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

RESULT = 3
REFUSED, OVER_TIME = 125, 124  # exit codes
NOBODY = 65534
INNER = 1000  # the user's id inside the namespace

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
APART = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4  # flags of mount_setattr
AT_FDCWD, RECURSIVE, MOUNT_SETATTR = -100, 0x8000, 442
DEATH_SIGNAL, DUMPABLE, NO_NEW_PRIVILEGES, SECCOMP, FILTER = 1, 4, 38, 22, 2

# Forbidden system calls by architecture: (the kernel's number of the architecture, the calls, the calls that depend on an
# argument, in the order of `BY_ARGUMENT`). No small function needs them. The first calls reach much of the kernel: sockets (some
# kinds belong to no network namespace), tracing, keys, namespaces, mounts, io_uring, BPF, performance counters, user-space page
# faults, another process's memory, and files by handle. The last calls hold memory that is mapped nowhere, so that no limit
# counts it: files in memory, System V objects, asynchronous input and output, and pages given to a pipe.
CALLS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        (41, 101, 250, 248, 249, 272, 308, 165, 155, 429, 430, 425, 321, 298, 323, 310, 311, 304, 319, 447, 29, 68, 64, 206, 278),
        (9, 157, 53),
    ),
    "aarch64": (
        0xC00000B7,
        (198, 117, 219, 217, 218, 97, 268, 40, 41, 429, 430, 425, 280, 241, 282, 270, 271, 265, 279, 447, 194, 186, 190, 0, 75),
        (222, 167, 199),
    ),
}
# More forbidden calls, for a process that must not start, become, or reach another process: fork, exec, signals, descriptors
ALONE = {
    "x86_64": (56, 57, 58, 435, 59, 322, 62, 200, 129, 297, 434, 424, 438, 440),
    "aarch64": (220, 435, 221, 281, 129, 130, 138, 240, 434, 424, 438, 440),
}
SIGNAL_A_THREAD = {"x86_64": 234, "aarch64": 131}  # tgkill, with which a process also ends itself
SHARED_OF_NO_FILE, ALL_BITS, AF_UNIX = 0x21, 0xFFFFFFFF, 1
# (index of the argument, mask of its bits, their value, True: only this value is forbidden, False: only this value is allowed)
BY_ARGUMENT = (
    (3, SHARED_OF_NO_FILE, SHARED_OF_NO_FILE, True),  # mmap: all its pages stay in memory while one of them is mapped
    (0, ALL_BITS, DEATH_SIGNAL, True),  # prctl: without its death signal, the process would outlive its parent
    (0, ALL_BITS, AF_UNIX, False),  # socketpair: asyncio needs one
)
X32 = 0x40000000  # numbers from here on are calls of x86-64's other table (x32)
HARNESS = """
import json, os, sys, types
with open("program.json", "rb") as file:
    request = json.load(file)
os.remove("program.json")
os.environ.clear()
module = sys.modules["program"] = types.ModuleType("program")  # where dataclasses and pickle look for its classes
for part in ("program", "tests"):
    exec(compile(request[part], part, "exec"), vars(module))
os.write(3, request["token"].encode())
"""

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t]


def call(function: Any, *arguments: object) -> None:
    """Calls a function of libc. Raises OSError if the function fails."""
    if function(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{getattr(function, '__name__', 'a system call')}: {os.strerror(code)}")


def shut_in(root: Path, places: list[str], files: int, files_given: dict[str, bytes], same_user: bool = False) -> None:
    """Moves this process and its children into new namespaces and a new root folder.

    Only the children are in the new process namespace.

    Creates the root folder at `root`, with at most `files` bytes. It contains `places` (read-only) and a folder `box` with
    `files_given`. A process of root changes to the user `nobody`, unless `same_user` is set. The user `nobody` has no rights
    outside `box` either. Raises OSError if a step fails.
    """
    user, group = os.geteuid(), os.getegid()
    if user or same_user:
        call(libc.unshare, NEWUSER | APART)
        _map_user(user, group)
    else:  # mounts first: a user without rights may not reach the folders to mount
        call(libc.unshare, APART)
    _mount(root, places, files)
    box = root / "box"
    for name, data in files_given.items():
        (box / name).write_bytes(data)
    os.chdir(root)
    if not user and not same_user:
        for path in (box, *(box / name for name in files_given)):
            os.chown(path, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call(libc.prctl, DUMPABLE, 1, 0, 0, 0)  # otherwise root owns the files of /proc that map its user
        call(libc.unshare, NEWUSER)
        _map_user(NOBODY, NOBODY)
    os.chroot(".")
    os.chdir("/box")


def _map_user(user: int, group: int) -> None:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{INNER} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{INNER} {group} 1")


def _mount(root: Path, places: list[str], files: int) -> None:
    """Creates the root folder in memory, with at most `files` bytes. It contains this machine's `places`, read-only, and the
    folder `box`."""
    call(libc.mount, None, b"/", None, REC | PRIVATE, None)
    options = f"size={files},nr_inodes=1024,mode=755".encode()
    call(libc.mount, b"tmpfs", bytes(root), b"tmpfs", NOSUID | NODEV, options)
    for place in places:
        target = root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(place).is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        call(libc.mount, place.encode(), bytes(target), None, BIND | REC, None)
        wanted = struct.pack("QQQQ", READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
        call(libc.syscall, MOUNT_SETATTR, AT_FDCWD, bytes(target), RECURSIVE, wanted, len(wanted))
    (root / "box").mkdir()


def rules(machine: str, alone: bool = False) -> list[bytes]:
    """Returns the filter of system calls, as instructions of classic BPF. The calls in `CALLS` fail with EPERM.

    With `alone`, the calls in `ALONE` fail too, and so do signals to threads of other processes.
    """
    numbers: tuple[int, ...]
    by_argument: tuple[int, ...]
    architecture, numbers, by_argument = CALLS[machine]
    arguments: tuple[tuple[int, int, int, bool], ...] = BY_ARGUMENT
    if alone:
        numbers, by_argument = numbers + ALONE[machine], (*by_argument, SIGNAL_A_THREAD[machine])
        arguments = (*arguments, (0, ALL_BITS, os.getpid(), False))

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, least, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06
    refuse, allow, kill = 0x00050000 | 1, 0x7FFF0000, 0x80000000
    steps = [step(load, 4), step(equal, architecture, 1, 0), step(give, kill), step(load, 0)]
    steps += [step(least, X32, 0, 1), step(give, kill)]
    for number in numbers:
        steps += [step(equal, number, 0, 1), step(give, refuse)]
    for number, (argument, bits, value, refused) in zip(by_argument, arguments, strict=True):
        low = 16 + 8 * argument  # the lower half: the kernel reads only 32 bits of these arguments
        steps += [step(equal, number, 0, 5), step(load, low), step(mask, bits), step(equal, value, 0, 1)]
        steps += [step(give, refuse if refused else allow), step(give, allow if refused else refuse)]
    return [*steps, step(give, allow)]


def forbid(alone: bool = False) -> None:
    """Forbids this process permanently to get new rights, and to make the system calls that `rules` forbids."""
    steps = rules(platform.machine(), alone)
    filter_bytes = ctypes.create_string_buffer(b"".join(steps))
    program = ctypes.create_string_buffer(struct.pack("HQ", len(steps), ctypes.addressof(filter_bytes)))
    call(libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call(libc.prctl, SECCOMP, FILTER, ctypes.addressof(program), 0, 0)


def limit(cpu_s: int, memory: int, files: int) -> None:
    """Limits this process permanently: CPU seconds, bytes of memory, and bytes per file.

    Further limits are: one process, 32 open files, no core dumps, no locked memory, and no message queues.
    """
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, files), (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_MSGQUEUE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def begin(limits: dict[str, Any]) -> None:
    """Sets the limits, and replaces this process with the Python program to isolate (exec).

    The program is the first process of its namespace, so all other processes in the namespace end with it.
    """
    call(libc.prctl, DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    limit(limits["cpu_s"], limits["memory"], limits["files"])
    forbid()
    python, settings = limits["executable"], {"PYTHONHASHSEED": "0"}  # the order of sets is always the same
    os.execve(python, [python, "-s", "-S", "-P", "-B", "-c", HARNESS], settings)


def over_time(status: int, used_s: float, cpu_s: int) -> bool:
    """Returns whether the kernel killed a program because of its limit of `cpu_s` CPU seconds.

    The kernel applies the limit by clock ticks but reports exact seconds, which are fewer if other processes used the CPU. So for
    this function, it is enough that the program used half of the limit. The program can't kill itself, because it is the first
    process of its namespace. The only other cause of SIGKILL is a lack of memory on the machine.
    """
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and used_s >= cpu_s / 2


def main() -> int:
    """Runs the program that standard input describes, and waits for its end; returns the exit code."""
    limits = json.loads(sys.stdin.buffer.read())
    os.umask(0o022)
    program = json.dumps({name: limits[name] for name in ("program", "tests", "token")}).encode()
    shut_in(Path(limits["root"]), [*limits["libraries"], limits["executable"]], limits["files"], {"program.json": program})
    call(libc.prctl, DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # after the last change of user, which would reset it
    if os.getppid() != limits["parent"]:
        raise OSError("the process that started this sandbox has ended, so the program doesn't run")
    reading, writing = os.pipe()  # exec closes both
    if (child := os.fork()) == 0:
        try:
            begin(limits)
        except BaseException as e:  # noqa: BLE001 (the parent process reports it)
            os.write(writing, f"{type(e).__name__}: {e}".encode())
        finally:
            os._exit(REFUSED)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))  # the wait below leaves no zombie
    os.close(writing)
    if fault := os.read(reading, 4096):
        raise OSError(fault.decode())
    status, used = os.wait4(child, 0)[1:]
    return OVER_TIME if over_time(status, used.ru_utime + used.ru_stime, limits["cpu_s"]) else 0


if __name__ == "__main__":
    result_descriptor = int(sys.argv[1])
    if result_descriptor != RESULT:
        os.dup2(result_descriptor, RESULT)
        os.close(result_descriptor)
    os.set_inheritable(RESULT, True)
    try:
        code = main()
    except Exception as e:  # noqa: BLE001 (the process that started this one reports it)
        os.write(RESULT, f"{type(e).__name__}: {e}".encode()[:2000])
        code = REFUSED
    os._exit(code)
