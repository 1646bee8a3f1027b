"""Serves a model, an index of documents, or both, over HTTP on Ray Serve until you stop the command: `heliostat model serve
MODEL`.

    client -> Serve's proxy (127.0.0.1) -> HTTP server (one process: keys, limits, retries) -> replicas (of each loaded version)

The driver resolves the model's alias, and sends the HTTP server the current version. A new version loads while the old version
still answers. Then all new requests go to the new version, and the old version ends after its last request.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.apps.serve import proxied
from heliostat.apps.serve.asks import TEXT, kind_of
from heliostat.apps.serve.served import NoModel, Options, ServedModels, VersionSource
from heliostat.cluster import ray_internals
from heliostat.cluster.private_ray import LOOPBACK
from heliostat.errors import ConfigError, HeliostatError, StoppedError
from heliostat.inference.batch import loading
from heliostat.text import brief
from heliostat.training.driver.signals import Signals

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from heliostat.apps.serve.front import Front

log = logging.getLogger(__name__)

FRONT = "heliostat-front"
START_S = 600.0  # maximum seconds until a version is loaded
FRONT_S = 300.0  # maximum seconds until a dead HTTP server answers again
DRAIN_MORE_S = 10.0  # added to an answer's deadline, before an old version ends
DRIVER, NAMESPACE = "heliostat-serve-driver", "heliostat"  # name of the actor that exists as long as the command runs
CONTROLLER = "ServeController"  # Ray Serve's own actor, which ends with the endpoint
OURS = ({"Front"}, {"Model"})  # deployments of the endpoint's applications
MODULES = ("ray.serve", "heliostat.apps.serve.deployed", "heliostat.apps.serve.engine")


class Versions:
    """Switches traffic between versions of the model.

    `load` starts a version's replicas, and `end` ends them. `use` sends the HTTP server the current version, and returns the
    number of open requests of each version. An old version ends after its last request, or after `drain_s` seconds.
    """

    def __init__(
        self,
        load: Callable[[str], None],
        use: Callable[[str], dict[str, int]],
        end: Callable[[str], None],
        drain_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.load, self.use, self.end, self.drain_s, self.clock = load, use, end, drain_s, clock
        self.current, self.failed = "", ""
        self.until: dict[str, float] = {}  # version -> deadline on `clock`, for versions that are draining

    def tick(self, wanted: str) -> None:
        """Switches to the wanted version: loads it, makes it the HTTP server's current version, and ends old versions.

        If the wanted version doesn't load, the current version continues to answer. Raises HeliostatError if there is no
        current version.
        """
        if wanted not in (self.current, self.failed):
            self._move(wanted)
        open_ = self.use(self.current)
        for old, until in list(self.until.items()):
            if not open_.get(old) or self.clock() > until:
                if open_.get(old):
                    log.warning(
                        "ending model version %s: %d of the version's requests didn't end within %g s",
                        old,
                        open_[old],
                        self.drain_s,
                    )
                del self.until[old]
                self.end(old)
                log.info("model version %s has ended", old)

    def _move(self, wanted: str) -> None:
        self.failed = ""
        if wanted not in self.until:  # a version that is still draining is loaded already
            try:
                self.load(wanted)
            except StoppedError:
                raise
            except HeliostatError as e:
                if not self.current:
                    raise
                self.failed = wanted
                log.error("can't serve model version %s, so version %s continues to answer: %s", wanted, self.current, brief(e))
                return
        self.until.pop(wanted, None)
        if self.current:
            self.until[self.current] = self.clock() + self.drain_s
            log.info(
                "new requests go to model version %s, and version %s finishes the requests that it has already received",
                wanted,
                self.current,
            )
        self.current = wanted


def serve(
    served: ServedModels, keys: Callable[[], dict[str, str] | None], options: Options, ready: Callable[[str], None]
) -> None:
    """Serves a model, an index, or both, until a signal stops it. Calls `ready` with the URL once the endpoint answers.

    Raises ConfigError, before anything starts and before `keys` is called, if the model or the index can't be served.
    """
    source, kind = served.source, served.kind()
    shared = bool(os.environ.get("RAY_ADDRESS"))
    if not shared:
        require_free(options.port)
    endpoint = ServeEndpoint(served, kind, options)
    endpoint.engine(source.folder(source.wanted()))
    endpoint.connect()
    if shared:  # checked only now, because `connect` ends the endpoint of a killed command, which may use the port
        require_free(options.port)
    known = keys()
    with endpoint.signals:  # after Ray's start, because Ray sets its own signal handlers
        try:
            endpoint.open(known)
            _follow(endpoint, source, options, lambda: ready(f"http://{LOOPBACK}:{options.port}/v1"))
        finally:
            endpoint.close()


def stop() -> bool:
    """Ends the endpoint that a killed command left on a cluster. Returns whether there was such an endpoint.

    Raises ConfigError if the cluster serves other applications, or the endpoint's command is still running.
    """
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("--stop: needs --cluster. Without a cluster, the endpoint ends when its command ends")
    from heliostat.cluster.connect import connect, disconnect

    connect(cpus=1)
    with ray_internals.without_notices(CONTROLLER):
        try:
            return end_left()
        finally:
            disconnect()


def end_left() -> bool:
    """Ends the Ray Serve applications that a killed command left on the connected cluster. Returns whether there were such
    applications.

    Raises ConfigError if the endpoint's command is still running, or if Ray Serve runs applications of other programs, because
    these applications would end too.
    """
    import ray
    from ray import serve

    from heliostat.apps.serve import deployed

    status = serve.status()
    applications = status.applications
    if not applications and not status.proxies:
        return False
    if not applications and not deployed.started_here():
        raise ConfigError(
            "another program started Ray Serve on this cluster, and stopping this endpoint would stop Ray Serve for "
            "this program. Use another cluster"
        )
    if not all(_ours(name, set(one.deployments), FRONT in applications) for name, one in applications.items()):
        raise ConfigError(
            "this cluster's Ray Serve has other applications, and stopping this endpoint would stop these applications. "
            "Use another cluster"
        )
    try:
        ray.get_actor(DRIVER, namespace=NAMESPACE)
    except ValueError:  # Ray ends this actor with its driver
        log.warning(
            "ending the applications of an endpoint whose command was killed: %s",
            ", ".join(sorted(applications)) or "no application",
        )
        serve.shutdown()
        deployed.record_start(False)
        return True
    raise ConfigError(
        "this cluster has an endpoint, and its command is still running. Stop that command with Ctrl-C, or use another cluster"
    )


def _ours(name: str, deployments: set[str], fronted: bool) -> bool:
    """Returns whether this application belongs to an endpoint, judged by the application's deployments. An application without
    deployments belongs to an endpoint if it is the HTTP server, or if the HTTP server runs (`fronted`)."""
    return deployments in OURS if deployments else name == FRONT or fronted


class CommandActor:
    """Shows that the command is still running: Ray ends this actor when the command's driver ends."""


def _follow(endpoint: ServeEndpoint, source: VersionSource | NoModel, options: Options, ready: Callable[[], None]) -> None:
    versions = Versions(endpoint.load, endpoint.use, endpoint.end, options.deadline_s + DRAIN_MORE_S)
    announced, silent_since = False, 0.0
    while not endpoint.signals.name:
        try:
            versions.tick(source.wanted())
            silent_since = 0.0
        except FrontError as e:
            silent_since = silent_since or time.monotonic()
            log.warning("the HTTP server doesn't answer (%s). Ray Serve restarts it", brief(e))
            if time.monotonic() > silent_since + FRONT_S:
                raise
        if not announced and not silent_since:
            ready()
            announced = True
        endpoint.wait(options.poll_s)


class FrontError(HeliostatError):
    """Reports that the HTTP server doesn't answer the driver."""


class ServeEndpoint:
    """Starts and ends Ray Serve applications: one for the HTTP server, and one for each version of the model."""

    def __init__(self, served: ServedModels, kind: str | None, options: Options) -> None:
        import torch

        self.served, self.kind, self.options, self.signals = served, kind, options, Signals()
        self.front: DeploymentHandle[Front] | None = None
        self.driver: object = None
        self.gpus = torch.cuda.device_count()

    def engine(self, folder: Path | None) -> tuple[str, str]:
        """Returns the engine for a version's model, and the reason for this choice. Raises ConfigError if the engine of
        --engine doesn't support the model."""
        if folder is None or self.kind != TEXT:
            if self.options.engine == "vllm":
                raise ConfigError("--engine vllm: needs a model that generates text. Use --engine auto")
            return "transformers", ""
        return loading.choose(self.options.engine, folder, "serve", self.gpus)

    def connect(self) -> None:
        """Connects to Ray, and ends the endpoint that a killed command left; raises ConfigError if other programs use Ray Serve
        on this cluster."""
        import ray.serve  # noqa: F401  # first, because importing it sets its logger to INFO

        from heliostat.cluster import private_ray
        from heliostat.cluster.connect import connect

        proxied.set_ahead()
        private_ray.ahead(self.gpus, MODULES)
        connect(cpus=2 * self.options.replicas[1] + 2, gpus=self.gpus)  # twice: the old version runs while a new version loads
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        end_left()

    def open(self, keys: dict[str, str] | None) -> None:
        """Starts Serve's proxy on loopback, and the HTTP server."""
        import ray
        from ray import serve
        from ray.serve.schema import LoggingConfig

        from heliostat.apps.serve import deployed

        if os.environ.get("RAY_ADDRESS"):  # on a shared cluster, the endpoint can outlive the command
            self.driver = ray.remote(num_cpus=0)(CommandActor).options(name=DRIVER, namespace=NAMESPACE).remote()
            deployed.record_start(True)
        http = {"host": LOOPBACK, "port": self.options.port}
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=LoggingConfig(enable_access_log=False),
                    controller_options=proxied.controller())  # fmt: skip
        self._deploy(FRONT, self._front(keys), "/")
        self.front = serve.get_app_handle(FRONT)

    def load(self, version: str) -> None:
        """Starts a version's replicas and waits until they run. If one of these replicas fails, ends all of them and raises
        HeliostatError."""
        folder = self.served.source.folder(version)
        if folder is not None and (kind := kind_of(folder)) != self.kind:
            raise ConfigError(
                f"{folder}: is a model for {kind}, but the endpoint serves a model for {self.kind}. Start another endpoint"
            )
        log.info("loading %s", version)
        try:
            self._deploy(version, self._model(folder), None)
        except BaseException:
            self.end(version)
            raise

    def use(self, version: str) -> dict[str, int]:
        """Sends the HTTP server the current version, and returns the number of open requests of each version.

        Raises FrontError if the HTTP server doesn't answer within 30 seconds.
        """
        assert self.front
        try:
            return self.front.use.remote(version).result(timeout_s=30)
        except Exception as e:
            raise FrontError(f"the HTTP server doesn't answer: {type(e).__name__}: {brief(e)}") from e

    def end(self, version: str) -> None:
        """Ends a version's replicas. If Serve fails to end the replicas, logs a warning."""
        from ray import serve

        try:
            serve.delete(version)
        except Exception as e:  # noqa: BLE001 (Serve retries; it ends with the endpoint at the latest)
            log.warning("the replicas of model version %s are still shutting down (%s)", version, brief(e))

    def close(self) -> None:
        """Shuts down Ray Serve, and disconnects from Ray."""
        from ray import serve

        from heliostat.apps.serve import deployed
        from heliostat.cluster.connect import disconnect

        with ray_internals.without_notices(CONTROLLER):
            serve.shutdown()
            if self.driver:
                deployed.record_start(False)
            disconnect()

    def wait(self, seconds: float) -> None:
        """Waits for this number of seconds, or until a signal arrives."""
        end = time.monotonic() + seconds
        while not self.signals.name and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _deploy(self, name: str, application: Application, route: str | None) -> None:
        """Starts an application and waits until it runs.

        Raises HeliostatError if the start fails or takes longer than START_S seconds. Raises StoppedError if a signal arrives.
        """
        from ray import serve

        target = serve.RunTarget(application, name=name, route_prefix=route)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        end = time.monotonic() + START_S
        while (state := serve.status().applications[name]).status != "RUNNING":
            if self.signals.name:
                raise StoppedError(f"stopped before {name} was loaded")
            if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                messages = [one.message for one in state.deployments.values() if one.message]
                raise HeliostatError(f"{name} didn't start: {brief(_last(messages[0] if messages else state.message))}")
            if time.monotonic() > end:
                raise HeliostatError(
                    f"{name} didn't start within {START_S:g} s. Check that Ray has a CPU or a GPU for each replica"
                )
            time.sleep(0.1)

    def _front(self, keys: dict[str, str] | None) -> Application:
        from ray import serve

        from heliostat.apps.serve.deployed import DeployedFront

        front: Any = serve.deployment(DeployedFront, name="Front", max_ongoing_requests=100_000, max_constructor_retry_count=2,
                                health_check_period_s=2, ray_actor_options={"num_cpus": 0})  # fmt: skip
        return front.bind(self.served.settings(self.kind, keys, self.options))

    def _model(self, folder: Path | None) -> Application:
        from ray import serve

        from heliostat.apps.serve.deployed import DeployedReplica
        from heliostat.cluster.connect import remote_environment

        gpus, (engine, why) = min(self.gpus, 1), self.engine(folder)
        if why:
            log.info("the engine %s generates text with the model %s (%s)", engine, folder, why)
        least, most = self.options.replicas
        count: dict[str, Any] = {"num_replicas": most}
        if least < most:
            scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": self.options.batch}
            count = {"autoscaling_config": scaling}
        model: Any = serve.deployment(
            DeployedReplica, name="Model", max_ongoing_requests=2 * self.options.batch, max_constructor_retry_count=2,
            health_check_period_s=2, ray_actor_options={"num_cpus": 1, "num_gpus": gpus, "runtime_env": remote_environment(gpus)},
            **count,
        )  # fmt: skip
        return model.bind(self.served.holds(folder, self.options.batch, engine))


def require_free(port: int) -> None:
    """Raises ConfigError if a process already listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise ConfigError(f"--port: {port} on {LOOPBACK} is in use. Pass another port")


def _last(text: str) -> str:
    """Returns the line of Serve's message that names the error: the last line without indentation."""
    return next((line for line in reversed(text.strip().splitlines()) if line.strip() and not line.startswith(" ")), text)
