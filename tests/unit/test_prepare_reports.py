"""Tests prepare's messages after an interruption or a failure, and the list of dropped documents."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from heliostat import schema
from heliostat.curation import prepare as preparing
from heliostat.curation.prepare import InputFile, Pipeline
from heliostat.data import versions
from heliostat.errors import ConfigError, StorageError, unwrapped
from heliostat.storage.locations import Location
from ray.exceptions import RayTaskError

from tests.unit.test_prepare_versions import files

SLOW = """
import time
from pathlib import Path
from heliostat.curation import prepare
from heliostat.data import versions
prepare.connect = prepare._keep_to = lambda *_, **__: None  # it asks nothing of Ray

class Slow(prepare.Pipeline):
    def check(self):
        pass
    def inputs(self):
        self.wait("inputs")
        return [prepare.InputFile("x", 1, 0)]
    def write(self, output, inputs):
        versions.store(output, "shards/00000/", b"x", ".parquet")
        self.wait("write")
    def wait(self, where):
        if where == self.name:
            Path(self.output).with_name("here").touch()
            time.sleep(300)
"""


@pytest.mark.parametrize("where", ["inputs", "write"])
def test_ctrl_c_says_that_it_was_heard_and_what_there_is(tmp_path, where):
    """The command exits with code 130 and a line, and the line says that the written files were removed."""
    (tmp_path / "slow_pipeline.py").write_text(SLOW)
    keys = {"name": where, "pipeline": "slow_pipeline:Slow", "output": str(tmp_path / "out")}
    (tmp_path / "p.yaml").write_text(json.dumps(keys))
    command = [sys.executable, "-m", "heliostat", "data", "prepare", str(tmp_path / "p.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "here").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=100)
    assert running.returncode == 130 and told.splitlines()[-1] == "interrupted" and "Traceback" not in told
    assert ("removing the files of this run" in told) == (where == "write")
    assert set(files(tmp_path / "out")) <= {versions.RECORD}


def test_what_a_task_says_to_the_person_is_its_own_line_without_rays_traceback():
    """Ray's error of a task also has the cause's class. heliostat's own errors pass unchanged."""
    cause = StorageError("/d/x: storage failed for 60 s: No space left on device")
    with pytest.raises(StorageError) as told, unwrapped():
        raise RayTaskError("read", "Traceback:\n  lines", cause).as_instanceof_cause()
    assert str(told.value) == str(cause) and type(told.value) is StorageError
    with pytest.raises(StorageError, match=r"^output: x$"), unwrapped():
        try:
            raise StorageError("x")
        except StorageError as e:
            raise StorageError(f"output: {e}") from e


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("now", [0, 1, 2])
def test_the_list_of_what_was_left_out_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch, before, now):
    output = Location(str(tmp_path))

    def made(count: int, data: bytes) -> list[str]:
        names = [f"files/listed-{data.decode()}{i}.parquet" for i in range(count)]
        for name in names:
            output.join(name).write(data)
        return names

    def there() -> set[bytes]:
        place = tmp_path / preparing.LISTED
        return {p.read_bytes() for p in ([place] if place.is_file() else place.glob("*"))}

    preparing._list(output, made(before, b"old"))
    assert there() == ({b"old"} if before else set())
    listed = made(now, b"new")
    with monkeypatch.context() as failing:
        failing.setattr(Location, "write", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        if now:
            with pytest.raises(StorageError):
                preparing._list(output, listed)
            assert there() == ({b"old"} if before else set()), "the older list stays"
    preparing._list(output, listed)
    assert there() == ({b"new"} if now else set())
    assert sorted(p.name for p in tmp_path.iterdir()) == ([preparing.LISTED] if now else [])


def test_a_pipeline_of_a_users_own_that_lacks_a_method_is_found_when_it_is_loaded():
    """It was found with a traceback at the call of the method: for `write`, after the input was listed."""

    class Half(Pipeline):
        def inputs(self) -> list[InputFile]:
            return []

    with pytest.raises(ConfigError, match=r"^p\.yaml: .*:.*Half lacks check, write\. Implement"):
        schema.validate(Half, {"name": "a", "output": "out"}, "p.yaml")
