"""Puts the front and its replicas on Ray Serve, where handles reach the replicas and every port is kept on the node's address."""

from __future__ import annotations

from heliostat.apps.serve.asks import Holds
from heliostat.apps.serve.confined import confine
from heliostat.apps.serve.front import Front, Settings
from heliostat.apps.serve.handles import LOST, Handles
from heliostat.apps.serve.replica import Replica


class DeployedFront(Front):
    """Answers HTTP behind Serve's proxy."""

    def __init__(self, settings: Settings) -> None:
        confine()
        super().__init__(settings, Handles(), LOST)


class DeployedReplica(Replica):
    """Answers what the front asks through Serve's handles."""

    def __init__(self, holds: Holds) -> None:
        confine()
        super().__init__(holds)
