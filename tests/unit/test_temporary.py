"""Tests that the next process removes the temporary folders of killed ones. Folders in use, and links of others, stay."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from heliostat.storage import local_files

HOLDS = """
import sys, time
from heliostat.storage import local_files
with local_files.temporary_folder("heliostat-export-") as name:
    (name / "model").write_bytes(b"x" * 1000)
    print(name, flush=True)
    time.sleep(600)
"""


def aged(place: Path) -> Path:
    os.utime(place, (1, 1))
    return place


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [sys.executable, "-c", HOLDS]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        held = aged(Path(process.stdout.readline().strip()))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        prefix = f"heliostat-export-{socket.gethostname()}-"
        (tmp_path / f"{prefix}link").symlink_to(aged(elsewhere))
        (new := tmp_path / f"{prefix}new").mkdir()  # of a process that has not locked it yet
        (there := tmp_path / "heliostat-export-another.host-1").mkdir()  # whose locks are not seen here
        aged(there)
        with local_files.temporary_folder("heliostat-export-") as mine:
            assert mine.is_dir() and (held / "model").exists()  # it is in use
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert held.exists() and not mine.exists()
    with local_files.temporary_folder("heliostat-export-"), pytest.raises(FileNotFoundError):
        held.stat()
    assert elsewhere.exists() and new.exists() and there.exists()


def test_where_nothing_can_be_locked_a_folder_is_made_and_none_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    (old := tmp_path / f"heliostat-export-{socket.gethostname()}-old").mkdir()
    aged(old)
    with local_files.temporary_folder("heliostat-export-") as mine:
        assert mine.is_dir() and old.exists()
