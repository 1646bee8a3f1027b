"""Defines every error that heliostat raises on purpose: one line for the person, the cause chained for the engineer.

Exit codes: 2 where a person must change something first (the command, a file, a dataset's place, credentials), 130 where the run
was stopped on request, 1 for everything else.

The command line prints the line and exits with `exit_code`; a traceback means a bug. All of them pickle, because they travel from
Ray workers to the driver, so what each takes are its `args`: the message, and what the driver must know. No message holds the
password of a URI, in any message.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from heliostat.redact import redact


class HeliostatError(Exception):
    """Serves as the base class of every error that heliostat raises on purpose."""

    exit_code = 1
    found: Mapping[str, object] = {}  # what a command had found out before: `--json` prints it next to the error

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(a) if isinstance(a, str) else a for a in args))

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(HeliostatError, ValueError):
    """Reports that a job, pipeline or command line cannot work: names the field, the value and the fix."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """Reports that an optional part of heliostat is needed and not installed: names the extra."""


class StorageError(HeliostatError):
    """Reports that object storage failed beyond its retry budget, or refused access."""


class AccessError(StorageError):
    """Reports that the store refuses access, or has no such bucket, or no room for a folder: a retry by the same process is
    useless before that changes.

    `place`: the URI of the file or folder; `node`: the id of the Ray node that was refused, by default that of this process
    (`this_node`). Empty where they are not known.
    """

    exit_code = 2
    this_node = ""  # set by processes that train or fetch

    def __init__(self, message: str, place: str = "", node: str = "") -> None:
        self.place, self.node = place, node or AccessError.this_node
        super().__init__(message, place, self.node)


class DataError(HeliostatError):
    """Reports that a dataset is missing, unfinished, or not what its manifest describes."""


class MissingDataError(DataError):
    """Reports that there is no dataset at the place that is named, or that it was made without what is asked for."""

    exit_code = 2


class CheckpointError(HeliostatError):
    """Reports that a checkpoint is missing, incomplete, or does not fit the job."""


class CorruptCheckpointError(CheckpointError):
    """Reports that the checkpoint of `step` is incomplete, or its bytes are not those that were written: use the one before."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step


class VerifyError(HeliostatError):
    """Reports that a run's receipts are damaged, or differ from what its data plan and datasets give."""


class NumericsError(HeliostatError):
    """Reports that a job computes something else than one plain process of torch: names the parameter and the step."""


class NonFiniteError(HeliostatError):
    """Reports that the loss or the gradient became NaN or infinite; a retry would repeat it."""


class LossSpikeError(HeliostatError):
    """Reports that the loss of a step is far above what is usual: the run is to go back to before it and leave its samples out.
    `step` counts from 0; the message, as all that people read, from 1."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step


class CorruptionError(HeliostatError):
    """Reports that workers computed other bits than others from the same samples and weights (`train.sdc_check`): their `nodes`
    are at fault, or one of them is. `agreed`: the steps that were done when all last agreed."""

    def __init__(self, message: str, nodes: list[str], agreed: int) -> None:
        super().__init__(message, nodes, agreed)
        self.nodes, self.agreed = nodes, agreed


class TrainingError(HeliostatError):
    """Reports that the run failed, after all the retries that it was allowed. `suspects`: ids of nodes that may be the cause."""

    suspects: tuple[str, ...] = ()


class WorkerError(TrainingError):
    """Reports that a worker raised an error that is not heliostat's own: in a recipe, a library, or heliostat's code. `rank`: of
    the worker, where all workers raise its error."""

    rank: int | None = None


class PeerLostError(TrainingError):
    """Reports that a worker ended because another worker had failed: this error is never the cause."""


class DeviceError(TrainingError):
    """Reports that a GPU failed: names the worker, its node and the device."""


class StalledError(TrainingError):
    """Reports that no worker made progress within the watchdog's limit, or that one of them is frozen."""


class PlacementError(TrainingError):
    """Reports that the cluster had no room for the workers, or not for long enough to start them."""


class LeaseError(HeliostatError):
    """Reports that another driver has taken the run over: this one must not write to it any more."""


class StoppedError(HeliostatError):
    """Reports that the run was requested to stop, and did so behind a checkpoint."""

    exit_code = 130


class LimitError(StoppedError):
    """Reports that a limit of the job (`limits`) stopped the run, after a checkpoint."""


class ClusterError(HeliostatError):
    """Reports that a cluster did not start or stop, cannot be reached, or refused a request."""


class TrackingError(HeliostatError):
    """Reports that MLflow cannot be reached, or refused a request."""


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts the place that is at fault before an error's own message, unless the message names it."""
    try:
        yield
    except HeliostatError as e:
        if str(where) in str(e):
            raise
        e.args = (f"{where}: {e.args[0]}", *e.args[1:])
        raise


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raises what a task raised, if it is meant for the person, as it was before Ray wrapped it."""
    try:
        yield
    except Exception as e:
        cause = innermost(e) if hasattr(e, "cause") or not isinstance(e, HeliostatError) else None  # Ray's wrappers may be both
        if cause is None:
            raise
        raise type(cause)(str(cause), *cause.args[1:]) from e


def innermost(error: BaseException | None) -> HeliostatError | None:
    """Finds the HeliostatError under Ray's wrappers, if one is the cause: it is what the person should read."""
    inner, seen = None, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray makes classes that are both RayTaskError and the cause's class; their text is a traceback: look inside
        if isinstance(error, HeliostatError) and not hasattr(error, "cause"):
            inner = error
        error = getattr(error, "cause", None) or error.__cause__
    return inner
