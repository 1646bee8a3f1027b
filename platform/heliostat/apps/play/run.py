"""Opens a page on a model, an index, or both, until it is stopped: `heliostat play`.

One process: the endpoint's front, with a replica beside it instead of replicas on Ray.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from heliostat.apps.play.app import Local, abilities, app
from heliostat.apps.serve.asks import EMBEDDINGS
from heliostat.apps.serve.front import Front
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.run import require_free
from heliostat.apps.serve.served import Options, ServedModels
from heliostat.cluster.private_ray import LOOPBACK
from heliostat.errors import ConfigError
from heliostat.training.driver.signals import Signals
from heliostat.web import deadlines

log = logging.getLogger(__name__)

END_S = 3  # for answers that are under way when it is stopped


class Server(uvicorn.Server):
    """Calls `ready` once it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready
        deadlines.apply()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def play(served: ServedModels, keys: Callable[[], dict[str, str] | None], options: Options, ready: Callable[[str], None]) -> None:
    """Answers until a signal says stop, and calls `ready` with the page's URL; ConfigError before that, and before `keys` is
    asked for the keys, if it cannot."""
    if served.kind() == EMBEDDINGS:
        raise ConfigError(f"MODEL: {served.name!r} embeds texts, and has no page; use `heliostat serve`")
    require_free(options.port)
    made = application(served, keys, options)
    config = uvicorn.Config(
        made, host=LOOPBACK, port=options.port, log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=END_S,
    )  # fmt: skip
    with Signals():  # uvicorn raises the signal that it has taken once more behind its end
        Server(config, lambda: ready(f"http://{LOOPBACK}:{options.port}/")).run()


def application(served: ServedModels, keys: Callable[[], dict[str, str] | None], options: Options) -> Any:
    """Loads what is served, asks for the keys, and makes the application that answers with it."""
    version = served.source.wanted()
    replica = Replica(served.holds(served.source.folder(version), options.batch))
    front = Front(served.settings(served.kind(), keys(), options), Local(replica), ())
    front.backend.use(version)
    return app(front, abilities(served, replica, version, options))
