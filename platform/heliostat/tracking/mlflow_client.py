"""Accesses runs in MLflow's store: sends metrics, reads artifacts, and finds runs. Each failure becomes one clear error."""

from __future__ import annotations

import os
import re
import socket
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import JsonValue

from heliostat import extras
from heliostat.errors import ConfigError, TrackingError
from heliostat.runs.mlflow_id import MlflowIdRecord, record
from heliostat.storage.records import Format
from heliostat.storage.retries import Backoff, FailedAttempts, retry
from heliostat.text import brief
from heliostat.tracking.metrics import Point
from heliostat.tracking.tags import FOLDER, KIND, NAME, TRAINING

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.store.entities import PagedList

T = TypeVar("T")

PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # default ports of databases, by the beginning of their URI
ARTIFACT: Format[JsonValue] = Format(cast(type[JsonValue], JsonValue), "record in MLflow", TrackingError)
ANSWER_S = 5.0  # timeout for a database's connection or a server's answer; MLflow itself tries for 100 s
BUDGET_S = 10.0  # maximum time for a server's answer, over all attempts
PAUSES = Backoff(0.5, 2.0)
# by default MLflow's client blocks for minutes while it retries, and draws a progress bar for every file
CLIENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is for results
}


def set_client() -> None:
    """Limits how long MLflow's client retries, and how much it prints. Doesn't change variables that are already set."""
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)


def send(client: MlflowClient, run_id: str, points: list[Point]) -> None:
    """Logs points to a run in one call. MLflow accepts at most 1,000 points per call."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(p.key, p.value, int(p.at * 1000), p.step) for p in points])


def known(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Maps each metric to the last coordinate (step, or time in milliseconds) that MLflow has for it."""
    newest = client.get_run(run_id).data.to_proto().metrics
    return {m.key: Point(m.key, m.value, m.timestamp / 1000, m.step).place for m in newest}


def read_json(client: MlflowClient, run_id: str, artifact: str, kind: type[T]) -> T | None:
    """Reads a JSON artifact of a run; None if the run doesn't have this artifact. Raises TrackingError if the artifact isn't
    JSON.

    `kind`: the artifact's type. This function doesn't check the type, because heliostat itself wrote the artifact.
    """
    folder = artifact.rpartition("/")[0] or None
    if artifact not in {f.path for f in client.list_artifacts(run_id, folder)}:
        return None
    with tempfile.TemporaryDirectory(prefix="heliostat-") as local:
        data = Path(client.download_artifacts(run_id, artifact, local)).read_bytes()
    return cast(T, ARTIFACT.parse(data, f"run {run_id}: {artifact}"))


def write_json(client: MlflowClient, run_id: str, value: object, artifact: str) -> None:
    """Writes a JSON artifact of a run. Replaces an earlier artifact with this name."""
    client.log_dict(run_id, value, artifact)  # type: ignore[arg-type]  # it takes any JSON value


def write_bytes(client: MlflowClient, run_id: str, data: bytes, artifact: str) -> None:
    """Writes an artifact of a run. Replaces an earlier artifact with this name."""
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        file = Path(folder) / Path(artifact).name
        file.write_bytes(data)
        client.log_artifact(run_id, str(file), str(Path(artifact).parent))


def pages(search: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    """Yields the results of a search, page by page. `search` is called with the token of each page."""
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page


def logged_models(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Lists all logged models of a run, oldest first. The list includes incomplete models and the models of checkpoints."""
    of_run, experiment_ids = f"source_run_id = '{run.info.run_id}'", [run.info.experiment_id]
    models = pages(lambda token: client.search_logged_models(experiment_ids, filter_string=of_run, page_token=token))
    return sorted(models, key=lambda m: m.creation_timestamp)


def connect(uri: str) -> MlflowClient:
    """Connects to MLflow's store at `uri`. Returns an MlflowClient, and makes the store MLflow's default.

    Raises TrackingError if the store is a database whose server accepts no connection.
    """
    import mlflow

    set_client()
    _probe(uri)
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def _probe(uri: str) -> None:
    """Raises TrackingError if a database's server accepts no connection. Skips a URI without a readable host and port."""
    kind = uri.partition(":")[0].partition("+")[0]
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or PORTS.get(kind)
    except ValueError:  # several hosts, or a password with unescaped characters
        return
    if kind not in PORTS or not host or not port:
        return
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as e:
        raise TrackingError(
            f"MLflow at {uri}: {host}:{port} accepts no connection ({brief(e)}). Start the database server"
        ) from e


@contextmanager
def asking(uri: str) -> Iterator[None]:
    """Converts errors of MLflow and of its database within the context into a TrackingError of one line.

    If the store is an HTTP server, first waits until the server answers, with any status. Raises TrackingError if the server
    doesn't answer within BUDGET_S seconds.
    """
    import mlflow

    set_client()
    if uri.startswith(("http://", "https://")):
        _until_answers(uri)
    try:
        yield
    except mlflow.exceptions.MlflowException as e:
        raise TrackingError(f"MLflow at {uri}: {fault(e)}") from e
    except ModuleNotFoundError as e:
        extra = extras.bringing(e.name or "")
        fix = f". Run: {extras.command(extra)}" if extra else ""
        raise TrackingError(
            f"MLflow at {uri}: the database of this store needs the Python module {e.name!r}, which isn't installed{fix}"
        ) from e
    except Exception as e:
        if not type(e).__module__.startswith("sqlalchemy"):
            raise
        raise TrackingError(f"MLflow at {uri}: {brief(e)}") from e


def _until_answers(uri: str) -> None:
    parts = urlsplit(uri)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health").geturl()

    def ask() -> None:
        try:
            urllib.request.urlopen(place, timeout=ANSWER_S).close()
        except urllib.error.HTTPError as e:  # the server answers, and MLflow's client will report the error
            e.close()
        except urllib.error.URLError as e:
            if not isinstance(e.reason, ssl.SSLError):  # MLflow's client has its own certificates
                raise

    def judge(error: Exception) -> None:
        if not isinstance(error, OSError | HTTPException):
            raise error

    def give_up(failure: FailedAttempts) -> NoReturn:
        reason = brief(getattr(failure.error, "reason", failure.error) or type(failure.error).__name__)
        fix = "Start the server with `mlflow server`, or pass another store: --mlflow URI"
        raise TrackingError(f"MLflow at {uri}: no answer within {BUDGET_S:g} s ({reason}). {fix}") from failure.error

    retry(ask, BUDGET_S, PAUSES, judge, give_up)


def fault(error: object) -> str:
    """Summarizes an error of MLflow's client in one line: the HTTP status with its reason, or the cause if there was no
    answer."""
    said = " ".join(re.sub("<[^>]*>", " ", str(error)).split())
    if status := re.search(r"error code (\d{3})|too many (\d{3}) error responses", said):
        body = re.search(r"[Rr]esponse body: '?(.+)", said)
        return f"the server answered {status[1] or status[2]}" + (f": {brief(body[1])}" if body else "")
    cause = re.search(r"\(Caused by (.+)\)$", said)
    return brief(cause[1] if cause else said or type(error).__name__)


def experiments(client: MlflowClient, name: str | None = None, deleted: bool = False) -> dict[str, str]:
    """Maps the ids of all experiments to their names. If `name` is given, returns only this experiment. Raises ConfigError if
    this experiment doesn't exist. `deleted`: whether to include deleted experiments."""
    from mlflow.entities import ViewType

    if name is not None:
        existing = client.get_experiment_by_name(name)
        if existing is None:
            raise ConfigError(
                f"--experiment: {name!r} isn't an experiment. Experiments: {', '.join(experiments(client).values())}"
            )
        return {existing.experiment_id: existing.name}
    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    return {e.experiment_id: e.name for e in pages(lambda token: client.search_experiments(view, page_token=token))}


def experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Finds or creates the experiment, and returns its id.

    Marks the experiment as an experiment for model training, unless a user has chosen a kind. A kind that MLflow's UI has
    inferred doesn't count as a choice.
    """
    existing = client.get_experiment_by_name(name)
    if existing is None:
        place = None
        if uri.startswith("sqlite:///"):  # MLflow's default is below the process's current folder
            place = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name)
        existing = client.get_experiment(client.create_experiment(name, artifact_location=place))
    kind = existing.tags.get(KIND, "")
    if not kind or kind.endswith(("_inferred", "_inferred_type")):
        client.set_experiment_tag(existing.experiment_id, KIND, TRAINING)
    return str(existing.experiment_id)


def runs(client: MlflowClient, experiment_ids: list[str], deleted: bool = False) -> list[Run]:
    """Lists all runs that heliostat made in these experiments, newest first. `deleted`: whether to include deleted runs."""
    from mlflow.entities import ViewType

    ours, newest, view = f"tags.`{NAME}` LIKE '%'", ["start_time DESC"], ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    return list(pages(lambda token: client.search_runs(experiment_ids, ours, view, page_token=token, order_by=newest)))


def find(client: MlflowClient, run: str, uri: str) -> Run:
    """Finds a run by its id or its folder; raises ConfigError if MLflow doesn't have the run, or if heliostat didn't make the
    run."""
    from mlflow.exceptions import MlflowException

    from heliostat.storage.locations import Location

    known: MlflowIdRecord = {"run_id": run} if re.fullmatch(r"[0-9a-f]{32}", run) else record(Location(run))
    run_id = known.get("run_id")
    if run_id is None:
        problem = "isn't a run id (32 hex digits) or a run's folder with a run.json"
        raise ConfigError(f"{run!r}: {problem}. List the runs: heliostat run list")
    try:
        recorded_run = client.get_run(run_id)
    except MlflowException as e:
        fix = (
            f". The run is in another store: pass --mlflow {recorded}"
            if (recorded := known.get("uri")) and recorded != uri
            else ". List the runs: heliostat run list"
        )
        raise ConfigError(f"{run!r}: no such run in {uri}{fix}") from e
    if FOLDER not in recorded_run.data.tags:
        raise ConfigError(f"{run!r}: isn't a run of `heliostat train` ({uri}). List the runs: heliostat run list")
    return recorded_run
