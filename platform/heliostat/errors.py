"""Defines every error that heliostat raises on purpose. An error has a message of one line for the user, and the chained cause
for the engineer.

Exit codes: 2 if the user must change something first (the command, a file, a dataset's path, credentials), 130 if the run was
stopped on request, 1 for everything else.

The command line prints the message and exits with `exit_code`. If a user sees a traceback, this is a bug. All errors can be
pickled, because Ray workers send them to the driver. So their `args` contain everything: the message, and the facts for the
driver. No message shows the password of a URI.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from heliostat.redact import redact


class HeliostatError(Exception):
    """Serves as the base class of every error that heliostat raises on purpose."""

    exit_code = 1
    found: Mapping[str, object] = {}  # results of a command before the error: `--json` prints them with the error

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(a) if isinstance(a, str) else a for a in args))

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(HeliostatError, ValueError):
    """Reports that a job, pipeline, or command can't work. The message has the field, the value, and the fix."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """Reports that a required optional part of heliostat isn't installed. The message has the name of the extra."""


class StorageError(HeliostatError):
    """Reports that object storage denied access, or still failed after all retries."""


class AccessError(StorageError):
    """Reports that the store denies access, has no such bucket, or has no room for a folder. Until this is fixed, every other
    attempt of the same process fails too.

    `place`: the URI of the file or folder. `node`: the id of the Ray node whose access was denied, by default the node of this
    process (`this_node`). A field is empty if its value isn't known.
    """

    exit_code = 2
    this_node = ""  # processes that train or fetch set it

    def __init__(self, message: str, place: str = "", node: str = "") -> None:
        self.place, self.node = place, node or AccessError.this_node
        super().__init__(message, place, self.node)


class DataError(HeliostatError):
    """Reports that a dataset is missing, incomplete, or differs from its manifest."""


class MissingDataError(DataError):
    """Reports that no dataset exists at the given path, or that the dataset lacks something that the job needs."""

    exit_code = 2


class CheckpointError(HeliostatError):
    """Reports that a checkpoint is missing, incomplete, or does not fit the job."""


class CorruptCheckpointError(CheckpointError):
    """Reports that the checkpoint of `step` is incomplete, or that its bytes have changed. The previous checkpoint must be
    used."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step


class VerifyError(HeliostatError):
    """Reports that a run's receipts are damaged, or differ from its data plan and datasets."""


class NumericsError(HeliostatError):
    """Reports that a job and one plain torch process compute different numbers. The message has the parameter and the step."""


class NonFiniteError(HeliostatError):
    """Reports that the loss or the gradient became NaN or infinite. A retry would give the same result."""


class LossSpikeError(HeliostatError):
    """Reports that the loss of a step is far above the usual loss. The run resumes from an earlier checkpoint and skips the
    step's samples.

    `step` counts from 0. The message counts steps from 1, as all texts for users do.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step


class CorruptionError(HeliostatError):
    """Reports that some workers computed different bits from the same samples and weights (`train.sdc_check`).

    `nodes`: the nodes of these workers. The fault is on one of these nodes, or on all of them. `agreed`: the number of steps up
    to which the results of all workers were equal.
    """

    def __init__(self, message: str, nodes: list[str], agreed: int) -> None:
        super().__init__(message, nodes, agreed)
        self.nodes, self.agreed = nodes, agreed


class TrainingError(HeliostatError):
    """Reports that the run failed after all its retries. `suspects`: ids of nodes that may be the cause."""

    suspects: tuple[str, ...] = ()


class WorkerError(TrainingError):
    """Reports that a worker raised an error that isn't one of heliostat's errors: in a recipe, a library, or heliostat's code.

    `rank`: if all workers raise this error, the rank of the worker that had the original error.
    """

    rank: int | None = None


class PeerLostError(TrainingError):
    """Reports that a worker ended because another worker had failed. So this error is never the cause of a failure."""


class DeviceError(TrainingError):
    """Reports that a GPU failed. The message has the worker, the node, and the device."""


class StalledError(TrainingError):
    """Reports that no worker made progress within the watchdog's limit, or that a worker is frozen."""


class PlacementError(TrainingError):
    """Reports that the cluster had no room for the workers, or lost this room before the workers started."""


class LeaseError(HeliostatError):
    """Reports that another driver has taken over the run, so this driver must not write to the run anymore."""


class StoppedError(HeliostatError):
    """Reports that the run saved a checkpoint and stopped, as requested."""

    exit_code = 130


class LimitError(StoppedError):
    """Reports that a limit of the job (`limits`) stopped the run, after a checkpoint."""


class ClusterError(HeliostatError):
    """Reports that a cluster didn't start or stop, can't be reached, or rejected a request."""


class TrackingError(HeliostatError):
    """Reports that MLflow can't be reached, or rejected a request."""


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts the name of a faulty file or folder at the start of errors that the context raises. A message that already contains
    this name stays unchanged."""
    try:
        yield
    except HeliostatError as e:
        if str(where) in str(e):
            raise
        e.args = (f"{where}: {e.args[0]}", *e.args[1:])
        raise


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raises the original HeliostatError of a task that fails within the context, without Ray's wrapper."""
    try:
        yield
    except Exception as e:
        cause = innermost(e) if hasattr(e, "cause") or not isinstance(e, HeliostatError) else None  # Ray's wrappers may be both
        if cause is None:
            raise
        raise type(cause)(str(cause), *cause.args[1:]) from e


def innermost(error: BaseException | None) -> HeliostatError | None:
    """Finds the HeliostatError inside Ray's wrappers, if there is one. This is the error for the user."""
    inner, seen = None, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray creates classes that inherit from RayTaskError and from the cause's class. Their text is a traceback, so look inside
        if isinstance(error, HeliostatError) and not hasattr(error, "cause"):
            inner = error
        error = getattr(error, "cause", None) or error.__cause__
    return inner
