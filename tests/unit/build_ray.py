"""Replaces Ray: runs each task in a forked process, so that a task may end its process."""

import os
import signal
import tempfile
import time
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayTaskError, WorkerCrashedError

PATIENCE_S = 120.0


@dataclass(eq=False)
class Reference:
    pid: int
    answer: Path
    code: int | None = None

    def ready(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None


@dataclass
class ForkedRay:
    """Provides the functions of `ray` that `curation` uses. `started` counts tasks by their keys."""

    cpus: list[int] = field(default_factory=lambda: [2])
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))
    started: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": cpus}, "Labels": {}} for cpus in self.cpus]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Any) -> "Remote":
        return Remote(self, function)

    def wait(self, references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Reference], list[Reference]]:
        end = time.monotonic() + timeout
        while sum(r.ready() for r in references) < num_returns and time.monotonic() < end:
            time.sleep(0.005)
        ready = [r for r in references if r.ready()][:num_returns]
        return ready, [r for r in references if r not in ready]

    def get(self, reference: Reference) -> Any:
        assert reference.ready()
        if reference.code:
            raise WorkerCrashedError
        good, value, trace = cloudpickle.loads(reference.answer.read_bytes())
        if good:
            return value
        raise RayTaskError("task", trace, value).as_instanceof_cause()

    def cancel(self, reference: Reference) -> None:
        os.kill(reference.pid, signal.SIGKILL)


@dataclass
class Remote:
    ray: ForkedRay
    function: Any

    def options(self, **asked: Any) -> "Remote":
        self.ray.asked.append(asked)
        return self

    def remote(self, *arguments: Any, **shared: Any) -> Reference:
        self.ray.started += [key for key, _ in arguments[4]]
        answer = self.ray.folder / uuid.uuid4().hex
        pid = os.fork()
        if pid:
            return Reference(pid, answer)
        try:
            signal.alarm(int(PATIENCE_S))
            try:
                told = True, self.function(*arguments, **shared), ""
            except Exception as e:  # noqa: BLE001 - raised where the answer is asked for
                told = False, e, traceback.format_exc()
            answer.write_bytes(cloudpickle.dumps(told))
            os._exit(0)
        finally:
            os._exit(1)
