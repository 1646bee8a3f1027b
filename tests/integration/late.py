"""Drivers that die behind the last step, each at another moment: in front of a write to MLflow or to the run's folder.

One process after another goes on with the run (`train --resume`), until one gets through. Each dies in front of the first write
that none before it has died of.
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
    """From now on this process kills itself in front of the first write that is not among `writes`, and tells which."""

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
    """Goes on with the run of a job's file, and dies in front of the first write that is not given; `told` then names it."""
    path, told, *writes = given
    from heliostat.training import run

    deadly(writes, Path(told))
    run.train(Path(path), resume=True)
    return 0


def writes(path: Path, folder: Path) -> list[str]:
    """The writes, in order, of which a driver died each, until one got through."""
    found: list[str] = []
    told = folder / "told"
    while len(found) < LIMIT:
        driver = commands.call(f"{__name__}:resume", str(path), str(told), *found, log=folder / f"late-{len(found)}.log")
        if not (code := driver.wait(DEADLINE_S)):
            return found
        assert code == -signal.SIGKILL, driver.err[-3000:]
        found.append(told.read_text())
    raise AssertionError(f"no driver got through: {found}")
