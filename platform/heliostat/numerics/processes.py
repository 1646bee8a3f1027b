"""Runs the small job of `heliostat check --numerics` in separate processes: one plain process, two workers, and the worker that
resumes with another configuration.

`run` starts `python -m heliostat.numerics.processes`, which imports the libraries once and forks the other processes. The
processes find each other through a file, and communicate only over loopback. All processes end when the process that called `run`
ends, or at a deadline.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, cast

from heliostat.cluster import private_ray
from heliostat.config import workspace
from heliostat.config.spec import Job
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError, HeliostatError, TrainingError, innermost

if TYPE_CHECKING:
    from heliostat.numerics.small import SmallTrial

DEADLINE_S = 600.0
END_S = 10.0
POLL_S = 0.05
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(job: Job, digests: list[str], folder: Path, gpus: bool) -> None:
    """Runs the small job of a job in `folder`, with the dataset versions of `digests`. Raises the error of a process that
    failed."""
    give(job, digests, folder, gpus)
    host = subprocess.Popen(
        [sys.executable, "-m", "heliostat.numerics.processes", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=(folder / "log.txt").open("wb"),
        env=_environment(gpus), start_new_session=True,
    )  # fmt: skip
    try:
        host.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise TrainingError(
            f"--numerics: the comparison took longer than {DEADLINE_S:.0f} s. Last line of its log: {_last(folder)}"
        ) from None
    finally:
        _end(host)
    if (failed := folder / "error.json").exists():
        error = json.loads(failed.read_text())
        kind = ConfigError if error["exit_code"] == 2 else TrainingError
        raise kind(f"--numerics: {error['who']}: {error['message']}")
    if host.returncode:
        raise TrainingError(
            f"--numerics: the comparison's process ended with code {host.returncode}. Last line of its log: {_last(folder)}"
        )


def give(job: Job, digests: list[str], folder: Path, gpus: bool) -> None:
    (folder / "given.json").write_text(json.dumps({"job": job.dump(), "digests": digests, "gpus": gpus}))


def _environment(gpus: bool) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(workspace.root()), os.environ.get("PYTHONPATH")]))
    # torch checks for a GPU with NVML, without initializing CUDA, so that a fork can use CUDA
    own = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if gpus else {**THREADS, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, **private_ray.CONFINED, "PYTHONPATH": path}


def _end(host: subprocess.Popen[bytes]) -> None:
    """Ends the process `host`, and all processes that `host` has forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)
    host.wait(END_S)
    if host.stdin:
        host.stdin.close()


def _last(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(the log is empty)"


# in the host ---------------------------------------------------------------------------------------------------------


def main(folder: Path) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        return host(folder)
    except BaseException as e:
        _tell(folder, "the trial", e)
        raise


def _end_with_parent() -> None:
    """Ends this process and all processes that it forked, as soon as the parent process has ended."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def host(folder: Path) -> int:
    """Runs the small job that `folder` describes, and waits for all of its processes. Returns 1 if a process has failed, else
    0."""
    from heliostat.data import manifest
    from heliostat.numerics import plain, play, small

    arguments = json.loads((folder / "given.json").read_text())
    job = Job.model_validate(arguments["job"])
    sources = [manifest.read_shared(source, digest) for source, digest in zip(job.sources, arguments["digests"], strict=True)]
    trial = small.trial(job, sources, folder / "run", arguments["gpus"])
    laid_out = plan(trial.job, sources)
    open_dataset(laid_out)
    (folder / "trial.json").write_text(json.dumps(_describe(trial)))
    gc.freeze()
    context = multiprocessing.get_context("fork")

    def start(who: str, play_it: Callable[..., None], *more: object) -> ForkProcess:
        process = context.Process(target=_child, args=(who, folder, play_it, *more), daemon=True)
        process.start()
        return process

    plainly = small.unaided(trial.recipe)
    beside = start("the plain process", plain.play_plain, trial.job, laid_out, plainly, folder)  # before DeepSpeed is imported
    ranks = range(small.WORKERS)
    workers = [
        start(f"worker {r}", _in_group, r, len(ranks), play.play, trial.job, laid_out, trial.recipe, folder) for r in ranks
    ]
    if not _ended(workers, beside):
        return 1
    other = small.elsewhere(trial.job)
    last = start(
        "the worker that resumes", _in_group, 0, 1, play.resume, other, plan(other, sources, laid_out), trial.recipe, folder
    )
    return 0 if _ended([last, beside]) else 1


def _describe(trial: SmallTrial) -> dict[str, object]:
    from heliostat.numerics import small
    from heliostat.recipes.text.causal_lm import CausalLM

    train, other = trial.job.train, small.elsewhere(trial.job)
    return {
        "run": str(trial.job.run_folder),
        "model": trial.description,
        "workers": small.WORKERS,
        "gpus": bool(trial.job.workers.gpus),
        "stage": train.zero.stage,
        "precision": train.precision,
        "optimizer": train.optimizer.name,
        "steps": small.STEPS,
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "sequence_length": trial.recipe.length if isinstance(trial.recipe, CausalLM) else None,
        "resumed": {"workers": 1, "stage": other.train.zero.stage, "step": small.SAVED},
    }


def _ended(processes: list[ForkProcess], beside: ForkProcess | None = None) -> bool:
    """Waits until all processes have ended, and returns True. Returns False as soon as one of these processes, or `beside`, has
    failed."""
    watched = [*processes, *([beside] if beside else [])]
    while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in watched):
        time.sleep(POLL_S)
    return not any(p.exitcode for p in watched)


def _child(who: str, folder: Path, play_it: Callable[..., None], *args: object) -> None:
    try:
        play_it(*args)
    except BaseException as e:
        _tell(folder, who, e)
        raise


def _in_group(rank: int, world: int, play_it: Callable[..., None], job: Job, *args: object) -> None:
    """Runs a function in a new process group, as an attempt's workers do."""
    from heliostat.engine import deepspeed_engine, process_group

    gpus = job.workers.gpus
    deepspeed_engine.prepare_environment(gpus)
    folder = cast(Path, args[-1])
    names = tuple(map(str, range(world))) if gpus else ()
    meeting = f"file://{folder / f'group-{world}'}"
    process_group.join(process_group.WorkerPlace(rank, world, rank, world, meeting, "nccl" if gpus else "gloo", names))
    try:
        play_it(job, *args)
    finally:
        process_group.leave()


def _tell(folder: Path, who: str, error: BaseException) -> None:
    """Writes the first error of a comparison to the folder. Drops later errors, because the first error causes them."""
    known = innermost(error) or error
    lines = str(known).strip().splitlines() or [""]
    own = known if isinstance(known, HeliostatError) else None
    text = "\n".join(lines) if own else f"{type(known).__name__}: {lines[-1]}"
    raw = json.dumps({"who": who, "message": text, "exit_code": own.exit_code if own else 1})
    part = folder / f"error-{os.getpid()}"
    part.write_text(raw)
    with contextlib.suppress(FileExistsError):
        os.link(part, folder / "error.json")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
