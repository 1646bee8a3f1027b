"""Drivers that die behind the last step, each at another moment: in front of a write to MLflow or to the run's folder.

    python -m tests.integration.late JOB.json

One process after another goes on with the run (`train --resume`), until one gets through. Each dies in front of the first write
that none before it has died of. Prints the writes, in order, as one JSON list. All are forked from one that has imported what
they need.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

MOMENTS = {
    "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore": (
        "create_run", "create_logged_model", "log_outputs", "finalize_logged_model", "set_logged_model_tags", "update_run_info"
    ),
    "mlflow.store.model_registry.sqlalchemy_store:SqlAlchemyStore": (
        "create_registered_model", "create_model_version", "update_model_version", "set_registered_model_alias"
    ),
    "mlflow.store.artifact.local_artifact_repo:LocalArtifactRepository": ("log_artifacts",),
    "heliostat.storage:Location": ("write",),  # of which only the result counts
}  # fmt: skip
LIMIT = 30


def deadly(writes: list[str], told: int) -> None:
    """From now on this process kills itself in front of the first write that is not among `writes`, and tells which."""

    def front(owner: Any, name: str) -> None:
        made = getattr(owner, name)

        @functools.wraps(made)
        def write(*args: Any, **options: Any) -> Any:
            what = name if name != "write" else args[0].name
            if what not in writes and (name != "write" or what == "result.json"):
                os.write(told, what.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return made(*args, **options)

        setattr(owner, name, write)

    for path, methods in MOMENTS.items():
        module, _, name = path.partition(":")
        owner = getattr(importlib.import_module(module), name)
        for method in methods:
            front(owner, method)


def main(path: Path) -> int:
    import mlflow.pyfunc  # noqa: F401
    from heliostat.checkpoint import saver  # noqa: F401
    from heliostat.train import run

    writes: list[str] = []
    for _ in range(LIMIT):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            os.close(told)
            deadly(writes, tell)
            run.train(path, resume=True)
            os._exit(0)
        os.close(tell)
        what = os.read(told, 1000).decode()
        os.close(told)
        _, status = os.waitpid(child, 0)
        if not what:
            sys.stdout.write(json.dumps(writes) + "\n")
            return os.waitstatus_to_exitcode(status)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        writes.append(what)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
