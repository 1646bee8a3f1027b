"""Every error that heliostat raises on purpose: one line for the person, the cause chained for the engineer.

Exit codes: 2 where a person must change something first (the command, a file, a dataset's place, credentials), 130 where the run
was told to stop, 1 for everything else.

The command line prints the line and exits with `exit_code`; a traceback means a bug. All of them pickle, because they
travel from Ray workers to the driver, so what each takes are its `args`: the message, and what the driver must know. No
message holds the password of a URI, whoever wrote it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from heliostat.redact import redact


class HeliostatError(Exception):
    """Base of all errors below."""

    exit_code = 1
    found: dict[str, Any] = {}  # what a command had found out before: `--json` prints it beside the error

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(a) if isinstance(a, str) else a for a in args))


class ConfigError(HeliostatError, ValueError):
    """A job, pipeline or command line that cannot work: names the field, the value and the fix."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """An optional part of heliostat is asked for, and not installed: names the extra."""


class StorageError(HeliostatError):
    """Object storage failed beyond its retry budget, or refused us."""


class AccessError(StorageError):
    """The store refuses us, has no such bucket, or no room for a folder there: of no use to ask again before that is changed."""

    exit_code = 2


class DataError(HeliostatError):
    """A dataset is missing, unfinished, or not what its manifest says."""


class MissingDataError(DataError):
    """There is no dataset where one is named."""

    exit_code = 2


class CheckpointError(HeliostatError):
    """A checkpoint is missing, torn, or does not fit the job."""


class CorruptCheckpointError(CheckpointError):
    """The checkpoint of `step` is torn, or its bytes are not those that were written: the one before is to be used."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step

    def __str__(self) -> str:
        return self.args[0]


class VerifyError(HeliostatError):
    """A run's receipts are damaged, or do not say what its data plan and datasets give."""


class NonFiniteError(HeliostatError):
    """The loss or the gradient became NaN or infinite; a retry would repeat it."""


class LossSpikeError(HeliostatError):
    """The loss of a step is far above what is usual: the run is to go back to before it and leave its samples out. `step` counts
    from 0; the message, as all that people read, from 1."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step

    def __str__(self) -> str:
        return self.args[0]


class TrainingError(HeliostatError):
    """The run failed, after whatever retries it was allowed."""


class WorkerError(TrainingError):
    """A worker raised an error that is not one of these: in a recipe, a library, or here."""


class StalledError(TrainingError):
    """No worker got on within the watchdog's limit, or one of them is frozen."""


class PlacementError(TrainingError):
    """The cluster had no room for the workers, or not for long enough to start them."""


class LeaseError(HeliostatError):
    """Another driver has taken the run over: this one must not write to it any more."""


class StoppedError(HeliostatError):
    """The run was told to stop, and did so behind a checkpoint."""

    exit_code = 130


class ClusterError(HeliostatError):
    """A cluster did not start or stop, cannot be reached, or refused what was asked of it."""


class TrackingError(HeliostatError):
    """MLflow cannot be reached or refused us."""


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts the place that is at fault before an error's own words, unless they name it."""
    try:
        yield
    except HeliostatError as e:
        if str(where) in str(e):
            raise
        e.args = (f"{where}: {e.args[0]}", *e.args[1:])
        raise


def innermost(error: BaseException | None) -> HeliostatError | None:
    """The HeliostatError under Ray's wrappers, if one is the cause: it is what the person should read."""
    found, seen = None, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray makes classes that are both RayTaskError and the cause's class; their text is a traceback: look inside
        if isinstance(error, HeliostatError) and not hasattr(error, "cause"):
            found = error
        error = getattr(error, "cause", None) or error.__cause__
    return found
