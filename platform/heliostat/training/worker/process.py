"""Runs attempts in a process that outlives the attempts: a Ray actor of the driver's pool (`training.driver.pool`).

Between two attempts, a process leaves its process group and resets DeepSpeed's state. DeepSpeed's counters must be equal in a
process that survived and in a new one.
"""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from typing import TYPE_CHECKING, TypedDict

import ray

from heliostat.cluster import processes
from heliostat.engine import process_group
from heliostat.engine.process_group import WorkerPlace
from heliostat.errors import AccessError, HeliostatError, PeerLostError, WorkerError, innermost
from heliostat.runs.events import WorkerFailed
from heliostat.training import faults
from heliostat.training.worker import sigterm

if TYPE_CHECKING:
    from heliostat.training.worker.build import WorkerConfig, WorkerSummary

log = logging.getLogger(__name__)


class WorkerFacts(TypedDict):
    """Describes a worker's process: its id, its node's id and address, its GPUs' ids.

    `spent`: true if the process must not be used again.
    """

    pid: int
    node: str
    address: str
    gpus: list[str]
    spent: bool


class TrainWorker:
    def __init__(self) -> None:
        self._spent = False
        sigterm.heed_sigterm()
        AccessError.this_node = ray.get_runtime_context().get_node_id()

    def facts(self) -> WorkerFacts:
        context = ray.get_runtime_context()
        return {
            "pid": os.getpid(),
            "node": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
            "spent": self._spent or sigterm.received.is_set(),
        }

    def free_port(self) -> int:
        """Finds an unused TCP port of this node."""
        return processes.free_port(ray.util.get_node_ip_address())

    def run(self, place: WorkerPlace, config: WorkerConfig) -> WorkerSummary:
        """Runs one attempt's worker and returns its summary. Releases everything that belongs to the attempt at the end."""
        from heliostat.training.worker import collector
        from heliostat.training.worker.build import Worker

        collector.spare_imports()
        process_group.join(place)
        worker, failed = None, True
        try:
            worker = Worker(config)
            summary = worker.run()
            failed = False
            return summary
        except BaseException as e:
            error = _raised(e)
            # first, because the code below may hang on a broken device
            config["mailbox"].post(WorkerFailed(rank=place.rank, error=_own(error)))
            process_group.abort()  # on a GPU, a collective would wait for a dead worker forever
            _release(e)
            self._spent |= isinstance(e, AccessError)  # its credentials may have expired; a new process reads them again
            if error is not e:
                raise error from None
            raise
        finally:
            if worker is not None:
                worker.end()  # last, because it may hang on a broken device
                self._spent |= worker.busy  # its threads would write into the next attempt's checkpoint, or use its device
            self._spent |= failed and place.backend == "nccl" and not process_group.reforms()
            del worker
            self._leave()

    def _leave(self) -> None:
        """Leaves the process group. If this fails, the process isn't used again; the attempt's result doesn't change."""
        try:
            process_group.leave()
        except Exception as e:  # noqa: BLE001 (raised by a library or a broken device)
            self._spent = True
            log.warning("can't reuse this worker's process, because it couldn't leave its group: %s: %s", type(e).__name__, e)


def _raised(error: BaseException) -> BaseException:
    """Returns the error for the driver: a PeerLostError after the order to abort, otherwise `error`, in a form that reaches the
    driver.

    A device's error is returned even after the order to abort, because an abort doesn't break devices.
    """
    said = faults.describe(error)
    if process_group.ordered() and faults.classify(said) != "device":
        return PeerLostError(f"this worker ended because another worker failed: {said}")
    return error if _arrives(error) else _own(error)


def _own(error: BaseException) -> HeliostatError:
    """Returns the innermost error of heliostat if the driver can receive it.

    Otherwise, returns a WorkerError that describes the error.
    """
    known = innermost(error)
    return known if known and _arrives(known) else WorkerError(f"the workers failed: {faults.describe(error)}")


def _arrives(error: BaseException) -> bool:
    """Returns whether the error would reach the driver unchanged. An error doesn't arrive if its class doesn't accept the error's
    own `args`."""
    if isinstance(error, ray.exceptions.RayError):  # from the data stream; the driver reads its cause
        return True
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (this process pickled it)
    except Exception:  # noqa: BLE001 (such a class may raise anything)
        return False
    return True


def _release(error: BaseException | None) -> None:
    """Frees the objects that the frames of an error and its causes hold, such as the engine. The traceback's lines stay
    readable."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
