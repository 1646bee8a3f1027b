"""Hooks into Ray Train's controller around the start of the workers, on the driver's side."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from heliostat.events import Phase


class PlacementCallback(WorkerGroupCallback):
    """Posts when Ray Train requests resources for the workers, and prepares each worker's process once they have started."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._mailbox.post.remote(Phase(phase="placing"))

    def after_worker_group_start(self, worker_group: Any) -> None:
        from heliostat.train.worker.heartbeat import heed_sigterm

        worker_group.execute(heed_sigterm)
