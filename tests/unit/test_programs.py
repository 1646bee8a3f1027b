"""Programs that a model wrote are run where they can do little: each attack here is a real one, and fails, without a trace."""

import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from heliostat.benchmark import suite
from heliostat.benchmark.programs import box, unit_tests
from heliostat.benchmark.programs.box import FAILED, PASSED, TIMED_OUT, TOO_MUCH, Limits
from heliostat.errors import ConfigError, HeliostatError

SHORT = Limits(seconds=1.5, cpu_s=1)


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        box.require()
    except ConfigError as e:
        pytest.skip(str(e))


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
    ],
)
def test_a_program_has_passed_if_it_comes_to_the_end_of_its_tests(program, tests, verdict):
    assert box.run(program, tests).verdict == verdict


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ATTACKS = {
    "opens a socket": ("import socket\nsocket.socket()", r"PermissionError"),
    "opens a socket of the machine's host": ("import socket\nsocket.socket(40, 1)", r"PermissionError"),
    "asks for an address": ("import socket\nsocket.create_connection(('192.0.2.1', 80), 1)", r"Error"),
    "forks": ("import os\nwhile True:\n    os.fork()", r"BlockingIOError"),
    "starts threads": ("import threading\nwhile True:\n    threading.Thread(target=input).start()", r"can't start new thread"),
    "starts a command": ("import subprocess\nsubprocess.run(['ls'])", r"Error"),
    "takes memory": ("held = bytearray(1 << 30)", r"MemoryError"),
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
    found = box.run(program, "", SHORT)
    assert found.verdict == FAILED and re.search(said, found.output), found


@pytest.mark.parametrize(
    ("program", "verdict", "seconds"),
    [
        ("while True:\n    pass", TIMED_OUT, 8),
        ("import time\ntime.sleep(10 ** 6)", TIMED_OUT, 8),
        ("import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
         "import os\nos.close(1); os.close(2); os.close(3)\ntime.sleep(10 ** 6)", TIMED_OUT, 8),
        ("import os\nwhile True:\n    os.write(1, b'x' * 65536)", TOO_MUCH, 8),
        ("import os\nwhile True:\n    os.write(3, b'x' * 65536)", TIMED_OUT, 8),
    ],
)  # fmt: skip
def test_what_never_ends_is_ended_and_what_writes_without_end_is_cut(program, verdict, seconds):
    began = time.monotonic()
    found = box.run(program, "", SHORT)
    assert found.verdict == verdict and len(found.output) <= SHORT.output and time.monotonic() - began < seconds


def test_it_sees_no_process_file_or_setting_of_the_machine():
    found = box.run("import os, socket\nprint(os.getpid(), os.getppid(), os.getuid(), dict(os.environ), os.listdir('.'))\n"
                    "print(sorted({'etc', 'home', 'proc', 'sys', 'dev', 'tmp', 'var'} & set(os.listdir('/'))))", "")  # fmt: skip
    assert (found.verdict, found.output) == (PASSED, "1 0 1000 {} []\n[]\n")


def test_texts_have_the_same_hashes_each_time():
    assert len({box.run("print(hash('abc'), list({'a', 'b', 'c'}))", "").output for _ in range(3)}) == 1


def test_nothing_is_left_of_it(tmp_path, monkeypatch):
    """No folder, no mount, no process: also of one that is ended while it sleeps."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mounts, before = Path("/proc/self/mounts").read_text(), set(psutil.Process().children(recursive=True))
    runner = threading.Thread(target=box.run, args=("import time\ntime.sleep(99)", "", Limits(seconds=2.5)))
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
    """By SIGKILL, in the middle of a program that sleeps."""
    code = "from heliostat.benchmark.programs import box; box.run('import time; time.sleep(99)', '', box.Limits(seconds=90))"
    starter = psutil.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    seen, end = list[psutil.Process](), time.monotonic() + 30
    while len(seen) < 2 and time.monotonic() < end:
        seen = starter.children(recursive=True)
        time.sleep(0.02)
    assert len(seen) == 2
    starter.kill()
    starter.wait(10)
    ended = lambda one: not one.is_running() or one.status() == psutil.STATUS_ZOMBIE  # noqa: E731
    while not all(map(ended, seen)) and time.monotonic() < end:
        time.sleep(0.02)
    assert all(map(ended, seen))


def test_a_machine_without_a_sandbox_is_refused(monkeypatch):
    box.require.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(box.platform, "machine", lambda: "riscv64")
        with pytest.raises(ConfigError, match="needs Linux on x86_64, aarch64, and this is linux on riscv64"):
            box.require()
    with monkeypatch.context() as patch:
        patch.setattr(box, "LIBRARIES", ("/proc/none",))
        patch.setattr(box, "_python", lambda: {"libraries": ["/nowhere"], "executable": "/nowhere/python"})
        with pytest.raises(HeliostatError, match="cannot be shut in on this machine"):
            box.run("", "")
        with pytest.raises(ConfigError, match=r"it needs Linux 5\.12, and user namespaces"):
            box.require()
    box.require.cache_clear()


# the task ------------------------------------------------------------------------------------------------------------

TASK = {"task": "functions", "unit_tests": "{{tests}}", "doc_to_text": "{{prompt}}"}


@pytest.mark.parametrize(
    ("changed", "allowed", "said"),
    [
        ({}, False, r"suite does not allow it; .* set run_code: true"),
        ({"unit_tests": " "}, True, "is no template of tests"),
        ({"unit_tests": ["x"]}, True, "is no template of tests"),
        ({"metric_list": [{"metric": "acc"}]}, True, "metric_list: does not go with unit_tests"),
        ({"output_type": "multiple_choice"}, True, "output_type: does not go with unit_tests"),
    ],
)
def test_a_task_that_runs_code_is_allowed_by_the_suite_alone(changed, allowed, said):
    with pytest.raises(ConfigError, match=f"^file: .*{said}"):
        unit_tests.arranged(TASK | changed, allowed, "file")
    assert suite.Suite(name="x", tasks=["functions"]).run_code is False


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
