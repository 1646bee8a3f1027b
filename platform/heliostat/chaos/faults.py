"""Defines the faults. Each fault has a preparation (`prepare`) and an action at the chosen step of the run (`strike`).

No fault changes the training code. Faults send signals to processes, damage files, stop servers, and fill disks. `FAULTS` lists
all faults. If this machine can't inject a fault, the fault's `unable` returns the reason.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from heliostat import extras
from heliostat.chaos import proxy
from heliostat.chaos.nodes import LocalNodes
from heliostat.chaos.process import ChaosError, Command, workers
from heliostat.chaos.servers import ServerProcess, mlflow_server, s3_server
from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.storage.locations import Location
from heliostat.tracking import logger
from heliostat.validation.check import Checked

SEEING_S = 120.0  # maximum seconds until a fault affects the run
KEYS = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos", "AWS_EC2_METADATA_DISABLED": "true"}  # moto accepts any
MODEL = "heliostat-chaos"  # name of the registered model, for faults that need one
ROOM_LEFT = 64 << 10  # free bytes on a full disk: enough for a receipt, but not for a checkpoint


@dataclass
class Scene:
    """Holds the state of one fault's run.

    `settings` and `environment` are the settings and variables of the run's command. `storage` and `tracking` are the addresses
    that this process uses.
    """

    checked: Checked
    folder: Path
    at: float  # the step after which the fault strikes, plus a fraction of the next step
    rate: float
    random: random.Random
    stack: ExitStack  # undoes the fault's changes after the run
    storage: Location
    tracking: str
    checkpoint_bytes: int  # size of the largest checkpoint of the run without faults
    late_s: float  # seconds from the last step to the end of the run without faults
    name: str = ""
    tool: Any = None  # the result of `prepare`, for `strike`
    settings: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    struck: float = 0.0  # wall-clock time of the fault
    seen: float | None = None  # wall-clock time of the fault's first effect, if only the fault's code knows it
    cured: float | None = None  # wall-clock time at which the effect ended, if only the fault's code knows it

    @property
    def run(self) -> Location:
        return self.storage.join(self.name)


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    strike: Callable[[Scene, Command], None]
    prepare: Callable[[Scene], object] = lambda scene: None
    unable: Callable[[Job], str | None] = lambda job: None
    notice: str = ""  # text in the output that shows that the run noticed the fault; if empty, an attempt's end shows it
    cured: str = ""  # text in the output that shows that the fault is over; if empty, the next new step shows it
    submitted_again: bool = False  # whether the fault ends the command, so that it must be submitted again
    late: bool = False  # whether the fault strikes after the last step


# processes -----------------------------------------------------------------------------------------------------------


def _one_worker(scene: Scene, command: Command) -> psutil.Process:
    processes = workers(command.process.pid)
    if not processes:
        raise ChaosError("found no worker process, so there was nothing to kill. Read the fault's .log file in the work folder")
    return scene.random.choice(processes)


def kill_worker(scene: Scene, command: Command) -> None:
    _one_worker(scene, command).kill()


def hang(scene: Scene, command: Command) -> None:
    _one_worker(scene, command).suspend()


def sigterm(scene: Scene, command: Command) -> None:
    command.process.send_signal(signal.SIGTERM)


def kill_driver(scene: Scene, command: Command) -> None:
    command.process.kill()


def prepare_late(scene: Scene) -> None:
    """Makes the run register its model, so that the run still works for some seconds after its last step."""
    scene.settings["mlflow.register"] = MODEL


def kill_driver_late(scene: Scene, command: Command) -> None:
    """Kills the driver at a random moment between the last checkpoint and the command's end.

    The delay is at most the time between the last step and the end of the run without faults.
    """
    last = layout.folder(scene.run, scene.checked.job.last_step).join(layout.INDEX)
    command.until(last.exists, SEEING_S, "the last checkpoint was written")
    time.sleep(scene.random.uniform(0.0, scene.late_s))
    if command.process.poll() is not None:
        raise ChaosError("the run ended before the fault was due. Try another --seed")
    scene.struck = time.time()
    command.process.kill()


# nodes ---------------------------------------------------------------------------------------------------------------


def cannot_make_nodes(job: Job) -> str | None:
    if job.workers.gpus:
        return "simulates nodes on this machine's CPUs, so workers.gpus must be 0"
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
    except OSError as e:
        return f"needs the loopback addresses 127.0.0.2 and above, as on Linux ({e.strerror})"
    return None


def prepare_nodes(scene: Scene) -> LocalNodes:
    """Starts a node for each worker, and a spare node."""
    job = scene.checked.job
    nodes = scene.stack.enter_context(LocalNodes(scene.folder, job.workers.most + 1, job.workers.cpus + 1))
    scene.environment |= nodes.environment
    scene.settings["workers.placement"] = "strict_spread"
    return nodes


def kill_node(scene: Scene, command: Command) -> None:
    busy = [node for node in scene.tool.nodes[1:] if node.workers()]  # the first node is the head
    if not busy:
        raise ChaosError(
            "found no Ray node with a worker, so there was nothing to kill. Read the fault's .log file in the work folder"
        )
    scene.random.choice(busy).kill()


def prepare_head(scene: Scene) -> LocalNodes:
    scene.environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # by default, a driver waits a minute
    return prepare_nodes(scene)


def restart_head(scene: Scene, command: Command) -> None:
    """Stops the complete cluster, including Ray's control plane on the head. Waits until the command ends, and starts the cluster
    again."""
    scene.tool.stop()
    command.until_ended(SEEING_S)
    scene.tool.start()


# stores --------------------------------------------------------------------------------------------------------------


def no_s3(job: Job) -> str | None:
    return None if importlib.util.find_spec("moto") else f"needs an S3 server. Run: {extras.command('s3-test')}"


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets these variables in this process's environment, which child processes inherit. Restores the environment afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def prepare_s3(scene: Scene) -> proxy.FaultProxy:
    """Puts the datasets and the run on S3, behind a proxy that can inject faults."""
    scene.stack.enter_context(environment(KEYS))
    server = scene.stack.enter_context(s3_server(scene.folder))
    between = scene.stack.enter_context(proxy.FaultProxy(server.endpoint, seed=scene.random.randrange(1 << 30)))
    store = pafs.S3FileSystem(endpoint_override=server.endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    store.create_dir("chaos")
    ours, theirs = (f"?endpoint_override={endpoint}&scheme=http" for endpoint in (server.endpoint, between.endpoint))
    for i, source in enumerate(scene.checked.job.sources):
        copy(source, Location(f"s3://chaos/data/{i}{ours}"))
        scene.settings[f"data.sources.{i}.path"] = f"s3://chaos/data/{i}{theirs}"
    scene.storage = Location(f"s3://chaos/runs{ours}")
    scene.settings["storage"] = f"s3://chaos/runs{theirs}"
    return between


def s3_503(scene: Scene, command: Command) -> None:
    """Makes the store reject a share of the requests until the run ends."""
    scene.tool.faults = (proxy.ProxyFault("status", rate=scene.rate),)
    command.until(lambda: bool(scene.tool.injected), SEEING_S, "request was rejected")
    scene.seen = time.time()


def copy(source: Location, target: Location) -> None:
    for name, _ in source.files():
        target.join(name).write(source.join(name).read())


def prepare_corrupt_shard(scene: Scene) -> None:
    """Copies the datasets, and flips a bit in a row group that has a sample for the fault's step."""
    scene.struck = scene.seen = scene.cured = time.time()  # the run notices the damage when it reads, and continues
    for i, source in enumerate(scene.checked.job.sources):
        place = Location(str(scene.folder / f"data-{i}"))
        place.delete()
        copy(source, place)
        scene.settings[f"data.sources.{i}.path"] = str(place)
    order = scene.checked.order
    wanted = order.locate(order.step(int(scene.at)).ravel()[:1])
    number, chunk = int(wanted.source[0]), int(wanted.chunk[0])
    row = scene.checked.manifests[number].chunks.slice(chunk, 1).to_pylist()[0]
    flip(scene.folder / f"data-{number}" / row["path"], row["row_group"])


def flip(shard: Path, row_group: int) -> None:
    """Flips a bit in the middle of a row group's first column."""
    column = pq.read_metadata(shard).row_group(row_group).column(0)
    with shard.open("r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def met_corrupt_shard(scene: Scene, command: Command) -> None:
    """Does nothing, because the preparation has already damaged the data."""


def torn_checkpoint(scene: Scene, command: Command) -> None:
    """Waits for the next complete checkpoint, truncates one of its shards to half its size, and kills a worker. The run must then
    resume from the checkpoint before the truncated checkpoint."""
    command.until(lambda: bool(whole_checkpoints(scene.run)), SEEING_S, "checkpoint was written")
    known = set(whole_checkpoints(scene.run))
    command.until(lambda: bool(set(whole_checkpoints(scene.run)) - known), SEEING_S, "other checkpoint was written")
    newest = max(whole_checkpoints(scene.run))
    folder = Path(layout.folder(scene.run, newest).path)
    shard = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    scene.struck = time.time()
    os.truncate(shard, shard.stat().st_size // 2)
    _one_worker(scene, command).kill()


def whole_checkpoints(run: Location) -> list[int]:
    return [step for step in layout.steps(run) if layout.folder(run, step).join(layout.INDEX).exists()]


# MLflow --------------------------------------------------------------------------------------------------------------


def prepare_mlflow(scene: Scene) -> ServerProcess:
    server = scene.stack.enter_context(mlflow_server(scene.tracking, scene.folder))
    scene.settings["mlflow.uri"] = f"http://{server.endpoint}"
    return server


def mlflow_down(scene: Scene, command: Command) -> None:
    """Stops the MLflow server. Starts the server again after the run has noticed the stop and completed five more steps."""
    scene.tool.stop()
    command.until(lambda: bool(command.heard(logger.AWAY, scene.struck)), SEEING_S, "metric was missed")
    so_far = command.step
    command.until(lambda: command.step >= so_far + 5 or command.step >= scene.checked.job.train.steps, SEEING_S, "step was made")
    scene.tool.start()


# disks ---------------------------------------------------------------------------------------------------------------


def no_disk(job: Job) -> str | None:
    """Returns the reason why this machine can't mount a small disk; None if this machine can mount one."""
    if os.geteuid():
        return "mounts a small tmpfs, which needs root"
    with tempfile.TemporaryDirectory() as probe:
        try:
            mount_disk(Path(probe), 1 << 20)
        except ChaosError as e:
            return str(e)
        unmount_disk(Path(probe))
    return None


def mount_disk(folder: Path, size: int) -> None:
    """Mounts a tmpfs of `size` bytes, for which this process must be root. Raises ChaosError if the mount fails."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise ChaosError("needs the command `mount`") from e
    if done.returncode:
        raise ChaosError(f"can't mount a tmpfs ({done.stderr.strip()})")


def unmount_disk(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def prepare_disk(scene: Scene) -> None:
    """Mounts a disk for the run, with room for the run's checkpoints and little more."""
    disk = scene.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount_disk(disk, (scene.checked.job.checkpoint.keep + 3) * scene.checkpoint_bytes + (32 << 20))
    scene.stack.callback(unmount_disk, disk)
    scene.storage = Location(str(disk))
    scene.settings["storage"] = str(disk)


def disk_full(scene: Scene, command: Command) -> None:
    """Fills the disk. Frees the space when a write of the run has failed."""
    disk = Path(scene.storage.path)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - ROOM_LEFT)
    command.until(lambda: bool(command.heard("no space left", scene.struck)), SEEING_S, "write failed")
    ballast.unlink()


AGAIN = "Resuming from step"
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill-worker", "a worker's process is killed", kill_worker),
        Fault("kill-node", "a Ray node is killed, with all that runs on it", kill_node, prepare_nodes, cannot_make_nodes),
        Fault("hang", "a worker's process is suspended, and stays suspended", hang),
        Fault("sigterm", "the command gets SIGTERM, and is submitted again", sigterm, notice="SIGTERM: stopping",
              submitted_again=True),
        Fault("kill-driver", "the command's process is killed, and the command is submitted again", kill_driver,
              submitted_again=True),
        Fault("kill-driver-late", "the command's process is killed after the last checkpoint, and the command is submitted again",
              kill_driver_late, prepare_late, submitted_again=True, late=True),
        Fault("restart-head", "the cluster's head dies and starts again, and the command is submitted again", restart_head,
              prepare_head, cannot_make_nodes, submitted_again=True),
        Fault("s3-503", "the object store rejects a share of the requests", s3_503, prepare_s3, no_s3),
        Fault("corrupt-shard", "a shard has one wrong byte", met_corrupt_shard, prepare_corrupt_shard),
        Fault("torn-checkpoint", "a shard of the newest checkpoint loses half its bytes, and a worker dies", torn_checkpoint),
        Fault("mlflow-down", "MLflow's server is killed, and starts again later", mlflow_down, prepare_mlflow,
              notice=logger.AWAY, cured=logger.BACK),
        Fault("disk-full", "the disk of the run's folder fills up, and later has free space again", disk_full, prepare_disk,
              no_disk, notice="can't save a checkpoint"),
    )
}  # fmt: skip


def rng(seed: int, name: str) -> random.Random:
    """Returns the random generator of a fault. This generator doesn't depend on other faults."""
    return random.Random(f"{seed}:{name}")


def when(random_: random.Random, steps: int, every: int) -> float:
    """Draws the time of a fault, measured in steps: a number of steps, plus a fraction of the next step.

    At least two checkpoints follow this time, because some faults need them.
    """
    return random_.uniform(1.0, max(2.0, steps - 2 * every - 1.0))
