"""Tests that programs written by a model run in isolation: each attack here is real, and fails without a trace."""

import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from heliostat.errors import ConfigError, HeliostatError
from heliostat.evaluation import suite, tasks, unit_tests
from heliostat.evaluation.unit_tests import FAILED, PASSED, TIMED_OUT, TOO_MUCH, ProgramLimits
from heliostat.storage.locations import Location
from heliostat.tasks.sandbox import over_time

from tests.waiting import until

SHORT = ProgramLimits(seconds=1.5, cpu_s=1, memory=128 << 20)


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        unit_tests.require_sandbox()
    except ConfigError as e:
        pytest.skip(str(e))


NODE = 'from dataclasses import dataclass\n@dataclass\nclass Node:\n    v: int\n    next: "Node" = None'


@pytest.mark.parametrize(
    ("program", "tests", "verdict"),
    [
        ("def double(x):\n    return 2 * x", "assert double(4) == 8", PASSED),
        ("def double(x):\n    return 2 + x", "assert double(4) == 8", FAILED),
        ("def double(x):\n  return (", "", FAILED),
        ("import math, json, re, collections, itertools, asyncio", "asyncio.run(asyncio.sleep(0))", PASSED),
        ("if __name__ == '__main__':\n    raise SystemExit(3)", "", PASSED),  # it is no script
        ("raise SystemExit(0)", "assert False", FAILED),  # an end before the tests is none behind them
        ("import os; os._exit(0)", "assert False", FAILED),
        ("import ctypes; ctypes.string_at(0)", "", FAILED),
        ("import ctypes\nf = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: x + 1)", "assert f(2) == 3", PASSED),
        ("import mmap\nheld = bytearray(64 << 20)\npages = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)", "", PASSED),
        ("import socket\na, b = socket.socketpair()", "a.send(b'x')\nassert b.recv(1) == b'x'", PASSED),
        (NODE, "assert Node(1, Node(2)).next == Node(2)", PASSED),
        ("from __future__ import annotations\n" + NODE, "assert Node(1).v == 1", PASSED),
        ("import pickle\n" + NODE, "assert pickle.loads(pickle.dumps(Node(1))) == Node(1)", PASSED),
    ],
)
def test_a_program_has_passed_if_it_comes_to_the_end_of_its_tests(program, tests, verdict):
    assert unit_tests.run_program(program, tests).verdict == verdict


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
# takes memory 20 times, by a way that keeps it held while a page of it, or none, is mapped: no more would count for the limit
HOLDS = f"""{LIBC}
for name in ("mmap", "shmat"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes, libc.shmdt.argtypes = [ctypes.c_void_p, ctypes.c_size_t], [ctypes.c_void_p]
size, page = 8 << 20, 4096
def well(result):
    assert result not in (-1, 2**64 - 1), os.strerror(ctypes.get_errno())
    return result
for _ in range(20):
    {{take}}
"""
FILE_IN_MEMORY = """fd = os.memfd_create("x")
    os.write(fd, bytes(size))
    well(libc.mmap(None, page, 3, 1, fd, 0))
    os.close(fd)"""
SYSTEM_V = """at = well(libc.shmat(well(libc.shmget(0, size, 0o1600)), None, 0))
    ctypes.memset(at, 1, size)
    libc.shmdt(at)"""
SHARED = """at = well(libc.mmap(None, size, 3, 0x21, -1, 0))
    ctypes.memset(at, 1, size)
    libc.munmap(at + page, size - page)"""
IN_A_PIPE = """ends, at = os.pipe(), well(libc.mmap(None, size, 3, 0x22, -1, 0))
    libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), 14)  # huge pages, each of which one small page of it holds
    ctypes.memset(at, 1, size)
    well(libc.vmsplice(ends[1], (ctypes.c_size_t * 2)(at, page), 1, 0))
    libc.munmap(at, size)
    os.close(ends[0])"""
ATTACKS = {
    "opens a socket": ("import socket\nsocket.socket()", r"PermissionError"),
    "opens a socket of the machine's host": ("import socket\nsocket.socket(40, 1)", r"PermissionError"),
    "opens a pair of sockets of a network": ("import socket\nsocket.socketpair(socket.AF_INET)", r"PermissionError"),
    "asks for an address": ("import socket\nsocket.create_connection(('192.0.2.1', 80), 1)", r"Error"),
    "forks": ("import os\nwhile True:\n    os.fork()", r"BlockingIOError"),
    "starts threads": ("import threading\nwhile True:\n    threading.Thread(target=input).start()", r"can't start new thread"),
    "starts a command": ("import subprocess\nsubprocess.run(['ls'])", r"Error"),
    "takes memory": ("held = bytearray(1 << 30)", r"MemoryError"),
    "holds files in memory": (HOLDS.format(take=FILE_IN_MEMORY), r"PermissionError"),
    "holds System V memory": (HOLDS.format(take=SYSTEM_V), r"not permitted"),
    "holds shared memory": (HOLDS.format(take=SHARED), r"not permitted"),
    "holds pages in pipes": (HOLDS.format(take=IN_A_PIPE), r"not permitted"),
    "writes a gigabyte": ("file = open('x', 'wb')\nwhile True:\n    file.write(bytes(1 << 20))", r"File too large|No space"),
    "writes many files": ("for i in range(10 ** 6):\n    open(str(i), 'w').write('x' * 4096)", r"No space"),
    "holds many files open": ("held = [open(str(i), 'w') for i in range(100)]", r"Too many open files"),
    "reads a file of the machine": ("print(open('/etc/passwd').read())", r"FileNotFoundError"),
    "reads what processes there are": ("import os\nos.listdir('/proc')", r"FileNotFoundError"),
    "writes to Python's library": ("import os\nopen(os.__file__, 'a')", r"Read-only file system|Permission denied"),
    "reads its tests' file": ("open('program.json')", r"FileNotFoundError"),
    "makes a namespace": (LIBC + "assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())", r"not permitted"),
    "mounts": (LIBC + "assert libc.mount(b'x', b'/box', b'tmpfs', 0, 0) == 0, os.strerror(ctypes.get_errno())", r"not permitted"),
    "traces": (LIBC + "assert libc.ptrace(0, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())", r"not permitted"),
    "leaves its root": ("import os\nos.chroot('/box')", r"PermissionError"),
    "becomes root": ("import os\nos.setuid(0)", r"PermissionError|Invalid argument"),
    "lifts its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", r"ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails(attack):
    program, said = ATTACKS[attack]
    found = unit_tests.run_program(program, "", SHORT)
    assert found.verdict == FAILED and re.search(said, found.output), found


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("while True:\n    pass", TIMED_OUT),
        ("import time\ntime.sleep(10 ** 6)", TIMED_OUT),
        ("import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
         "import os\nos.close(1); os.close(2); os.close(3)\ntime.sleep(10 ** 6)", TIMED_OUT),
        ("import os\nwhile True:\n    os.write(1, b'x' * 65536)", TOO_MUCH),
        ("import os\nwhile True:\n    os.write(3, b'x' * 65536)", TIMED_OUT),
    ],
)  # fmt: skip
def test_what_never_ends_is_ended_and_what_writes_without_end_is_cut(program, verdict):
    began = time.monotonic()
    found = unit_tests.run_program(program, "", SHORT)
    assert found.verdict == verdict and len(found.output) <= SHORT.output and time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("status", "used", "over"), [(9, 1.01, True), (9, 0.8, True), (9, 0.1, False), (0, 1.01, False), (256, 0.99, False)]
)
def test_the_kernels_limit_counts_ticks_and_not_the_seconds_that_it_tells(status, used, over):
    assert over_time(status, used, cpu_s=1) is over


def test_it_sees_no_process_file_or_setting_of_the_machine():
    facts = "os.getpid(), os.getppid(), os.getuid(), dict(os.environ), os.listdir('.')"
    found = unit_tests.run_program(f"import os, socket\nprint({facts})\n"
                    "print(sorted({'etc', 'home', 'proc', 'sys', 'dev', 'tmp', 'var'} & set(os.listdir('/'))))", "")  # fmt: skip
    assert (found.verdict, found.output) == (PASSED, "1 0 1000 {} []\n[]\n")


def test_texts_have_the_same_hashes_each_time():
    assert len({unit_tests.run_program("print(hash('abc'), list({'a', 'b', 'c'}))", "").output for _ in range(3)}) == 1


def test_nothing_is_left_of_it(tmp_path, monkeypatch):
    """No folder, no mount, and no process remain, also if the program is killed during a sleep."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mounts, before = Path("/proc/self/mounts").read_text(), set(psutil.Process().children(recursive=True))
    runner = threading.Thread(target=unit_tests.run_program, args=("import time\ntime.sleep(99)", "", ProgramLimits(seconds=2.5)))
    runner.start()
    seen = set[psutil.Process]()
    while len(seen) < 2 and runner.is_alive():
        seen = set(psutil.Process().children(recursive=True)) - before
        time.sleep(0.02)
    assert len(seen) == 2 and list(tmp_path.iterdir())
    runner.join()
    assert not any(process.is_running() for process in seen)
    assert not list(tmp_path.iterdir()) and Path("/proc/self/mounts").read_text() == mounts


def test_it_ends_with_who_has_started_it():
    """SIGKILL arrives in the middle of a program that has asked not to be killed with it, has renamed itself, and sleeps."""
    program = LIBC + "libc.prctl(1, 0, 0, 0, 0)\nlibc.prctl(15, b'unbound', 0, 0, 0)\nimport time\ntime.sleep(99)"
    code = f"from heliostat.evaluation import unit_tests as u; u.run_program({program!r}, '', u.ProgramLimits(seconds=90))"
    starter = psutil.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    below = lambda: starter.children(recursive=True)  # noqa: E731
    until(lambda: "unbound" in [one.name() for one in below()], "program", seconds=60)
    seen = below()
    assert len(seen) == 2
    starter.kill()
    starter.wait(60)
    ended = lambda one: not one.is_running() or one.status() == psutil.STATUS_ZOMBIE  # noqa: E731
    until(lambda: all(map(ended, seen)), "end of the program", seconds=60)


def test_a_machine_without_a_sandbox_is_refused(monkeypatch):
    unit_tests.require_sandbox.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(unit_tests.platform, "machine", lambda: "riscv64")
        with pytest.raises(ConfigError, match="needs Linux on x86_64, aarch64, and this is linux on riscv64"):
            unit_tests.require_sandbox()
    with monkeypatch.context() as patch:
        patch.setattr(unit_tests, "LIBRARIES", ("/proc/none",))
        patch.setattr(unit_tests, "_python", lambda: {"libraries": ["/nowhere"], "executable": "/nowhere/python"})
        with pytest.raises(HeliostatError, match="can't isolate a program on this machine"):
            unit_tests.run_program("", "")
        with pytest.raises(ConfigError, match=r"The sandbox needs Linux 5\.12 or later, and user namespaces"):
            unit_tests.require_sandbox()
    unit_tests.require_sandbox.cache_clear()


# the task ------------------------------------------------------------------------------------------------------------

TASK = {"task": "functions", "unit_tests": "{{tests}}", "doc_to_text": "{{prompt}}"}


@pytest.mark.parametrize(
    ("changed", "allowed", "said"),
    [
        ({}, False, r"suite doesn't allow it\. .* set run_code: true"),
        ({"unit_tests": " "}, True, "expected a template of tests"),
        ({"unit_tests": ["x"]}, True, "expected a template of tests"),
        ({"metric_list": [{"metric": "acc"}]}, True, "metric_list: not supported with unit_tests"),
        ({"output_type": "multiple_choice"}, True, "output_type: not supported with unit_tests"),
    ],
)
def test_a_task_that_runs_code_is_allowed_by_the_suite_alone(changed, allowed, said):
    with pytest.raises(ConfigError, match=f"^file: .*{said}"):
        unit_tests.arranged(TASK | changed, allowed, "file")
    assert suite.Suite(name="x", tasks=["functions"]).run_code is False


def test_filters_that_leave_a_list_of_answers_are_refused_before_the_model_writes(tmp_path):
    """They ended in a traceback when the answers were joined with their questions."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x = 1", "tests": "assert x"}\n')
    asked, bare, last = suite.Suite(name="x", tasks=["functions"], run_code=True), "remove_whitespace", "take_first"

    def build(*steps: str) -> tasks.EvalTask:
        told = {"test_split": "test", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
                "filter_list": [{"name": "bare", "filter": [{"function": step} for step in steps]}]}  # fmt: skip
        (tmp_path / "functions.yaml").write_text(yaml.safe_dump(TASK | told))
        return tasks.build(asked, Location(str(tmp_path)), tmp_path / "cache")[0]

    assert build(bare, last).filter == "bare"
    for steps in ((bare,), (last, bare)):
        with pytest.raises(ConfigError, match=r"filter_list: bare: returns several answers, .* Add take_first at the end$"):
            build(*steps)


def test_a_suite_that_was_written_down_before_there_was_the_key_is_the_same():
    asked = suite.Suite(name="x", tasks=["functions"])
    old = {key: value for key, value in asked.model_dump().items() if key != "run_code"}
    assert suite.same(old, asked) and not suite.same(old, asked.model_copy(update={"run_code": True}))
    assert not suite.same({**old, "unknown": 1}, asked)


def test_the_score_is_the_share_that_passes_with_wilsons_interval():
    ended = unit_tests.verdicts([("x = 1", "assert x == 1"), ("x = 2", "assert x == 1"), ("x = 1", "assert x < 2")])
    assert ended == [PASSED, FAILED, PASSED] and unit_tests.passed(ended) == [1, 0, 1]
    row = unit_tests.row({"task": "functions", "filter": "none"}, ended)
    assert (row["metric"], row["score"], row["chance"], row["programs"]["passed"]) == ("pass@1", pytest.approx(2 / 3), 0.0, 2)
    assert row["low"] == pytest.approx(0.2077, abs=1e-4) and row["high"] == pytest.approx(0.9385, abs=1e-4)
