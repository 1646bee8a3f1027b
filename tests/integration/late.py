"""Kills drivers after the last step, each at another moment: just before a write to MLflow or to the run's folder.

One process after another resumes the run (`train --resume`), until one finishes. Each dies before the first write at which no
earlier one died.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
from pathlib import Path
from typing import Any

from tests.integration import commands

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
LIMIT, DEADLINE_S = 30, 200


def deadly(writes: list[str], told: Path) -> None:
    """Makes this process kill itself before the first write that isn't in `writes`, after it has reported the write."""

    def front(owner: Any, name: str) -> None:
        made = getattr(owner, name)

        @functools.wraps(made)
        def write(*args: Any, **options: Any) -> Any:
            what = name if name != "write" else args[0].name
            if what not in writes and (name != "write" or what == "result.json"):
                told.write_text(what)
                os.kill(os.getpid(), signal.SIGKILL)
            return made(*args, **options)

        setattr(owner, name, write)

    for path, methods in MOMENTS.items():
        module, _, name = path.partition(":")
        owner = getattr(importlib.import_module(module), name)
        for method in methods:
            front(owner, method)


def resume(given: list[str]) -> int:
    """Resumes the run of a job's file, and dies before the first write that isn't given; `told` then names it."""
    path, told, *writes = given
    from heliostat.training import run

    deadly(writes, Path(told))
    run.train(Path(path), resume=True)
    return 0


def writes(path: Path, folder: Path) -> list[str]:
    """Returns, in order, the writes at which a driver died, until one finished."""
    found: list[str] = []
    told = folder / "told"
    while len(found) < LIMIT:
        driver = commands.call(f"{__name__}:resume", str(path), str(told), *found, log=folder / f"late-{len(found)}.log")
        if not (code := driver.wait(DEADLINE_S)):
            return found
        assert code == -signal.SIGKILL, driver.err[-3000:]
        found.append(told.read_text())
    raise AssertionError(f"no driver got through: {found}")
