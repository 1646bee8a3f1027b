"""Defines the golden loss curves: losses and gradient norms of small jobs, in every precision and ZeRO stage, on 1 and 2 workers.

A curve runs the worker's own steps, engine, recipe, data order, and split of batches. Of a run, only Ray, checkpoints, and
evaluations are left out. `FOLDER` has one file for each recipe and precision, with every number as Python's `repr`, which is
exact. Only `python -m tests.golden.write --overwrite` writes them, and a commit that changes them gives the reason.

Numbers are the same to the last bit only if the same kernels compute them, so each file names the `environment` in which it was
made. Elsewhere, curves are near (`TOLERANCE`).

The last bits also depend on the process's earlier work. DeepSpeed's stage 3 replaces torch's `linear` with its own, permanently:
gradients of stages 0 to 2 in the same process are then rounded differently. The files were written by processes that ran all
cases in the order of `CASES`, so `play` gives each case the same `linear` as there. So a process that runs some of the files gets
the same bits. Placement in memory, such as the heap before a case, changes no bit.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.data import stream
from heliostat.data.dataset import DataPlan, open_dataset, plan
from heliostat.data.manifest import read as read_manifest
from heliostat.engine import deepspeed_engine
from heliostat.engine.sample_group import SampleGroup
from heliostat.recipes.loading import load
from heliostat.runs.time_ledger import Ledger
from heliostat.training.worker.micro_batches import BatchPlan
from heliostat.training.worker.step import Stepper

from tests.golden import data
from tests.integration import ranks
from tests.unit import build_images
from tests.unit.build_job import BASE, job

FOLDER = Path(__file__).parent
LINEAR = torch.nn.functional.linear
STEPS = 10  # of the TRAINED that a job has, its schedule among them
TRAINED = 20
DEADLINE_S = 540
WORKERS = (1, 2)
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}  # a bf16 job at stage 0 is refused
VERSIONS = ("torch", "deepspeed", "transformers", "diffusers", "numpy")  # of what computes
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative, in another environment; AVX2 for AVX-512: 6e-7, 3e-2
ALIKE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, between stages and worker counts in one environment


@dataclass(frozen=True)
class Case:
    """Describes a curve. `file`: the recipe and precision, which name its file."""

    recipe: str
    precision: str
    stage: int
    workers: int

    @property
    def file(self) -> str:
        return f"{self.recipe}-{self.precision}"

    @property
    def name(self) -> str:
        return f"zero{self.stage} workers{self.workers}"


RATE = {"causal_lm": 1e-2, "causal_lm_documents": 1e-2, "text_to_image": 2e-3}  # at which bf16's rounding does not grow
RECIPES = tuple(RATE)
CASES = [
    Case(recipe, precision, stage, workers)
    for recipe in RECIPES
    for precision in STAGES
    for stage in STAGES[precision]
    for workers in WORKERS
    if recipe != "causal_lm_documents" or (precision, stage) == ("fp32", 2)
]
FILES = tuple(dict.fromkeys(case.file for case in CASES))


def job_of(case: Case, folder: Path) -> Job:
    """Returns a job with 8 samples per step: text in micro-batches of 2 (4 or 2 per worker), images in micro-batches of 4 (2 or 1
    per worker)."""
    changes: dict[str, Any] = {"train.precision": case.precision, "train.zero.stage": case.stage, "workers.count": case.workers}
    changes |= {"train.steps": TRAINED, "train.schedule": {"name": "cosine", "warmup_steps": 4}, "data.seed": 5, "train.seed": 11}
    changes |= {
        "evaluate": None,
        "data.shuffle_window": 64,
        "data.virtual_ranks": 2,
        "train.optimizer": {"lr": RATE[case.recipe]},
    }
    if case.recipe == "text_to_image":
        images = build_images.job(folder / "text_to_image", caption_dropout=0.2)
        return job(**{**images, **changes, "train.micro_batch_size": 4, "train.recipe_version": 1})
    changes |= {"data.sources": [{"path": str(folder / "causal_lm")}], "data.document_mask": case.recipe == "causal_lm_documents"}
    return job(**{**changes, "model": {**BASE["model"], "vocab_size": 96}})


class Steps(Stepper):
    """Runs steps of a job, with their data, without a run around them."""

    def __init__(self, made: Job, data_plan: DataPlan) -> None:
        self.plan, self.rank, self.world = data_plan, dist.get_rank(), dist.get_world_size()
        self.dataset = open_dataset(data_plan)
        recipe = load(made, self.dataset.sources)
        engine = deepspeed_engine.build_engine(made, recipe)
        super().__init__(made, engine, recipe, BatchPlan(made, data_plan), SampleGroup(), Ledger("computing"))

    def curve(self) -> tuple[list[float], list[float]]:
        """Returns the losses and gradient norms of all steps."""
        samples = self.dealt()
        for step in range(STEPS):
            self.step(step, self.prepare(step, samples.next_step()))
        losses = torch.stack(self.losses).double()
        dist.all_reduce(losses)
        return losses.tolist(), list(self.norms)

    def dealt(self) -> stream.LaneStream:
        task = stream.fetch(self.plan, self.dataset.order, 0, STEPS, replace=True)
        return stream.LaneStream(self._mine(task), self.plan, self.dataset.order, self.rank, self.world, 0)

    def _mine(self, task: stream.Fetch) -> Iterator[Any]:
        """Yields this worker's blocks, as the stream assigns them."""
        for window in range(task.count):
            for table in task({"id": np.array([window])}):
                if table["block"][0].as_py() % self.world == self.rank:
                    yield table


def _set_linear(case: Case) -> None:
    """Sets the `linear` that the case had when all cases ran: torch's, or DeepSpeed's after the first case of stage 3."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    first = next(number for number, one in enumerate(CASES) if one.stage == 3)
    torch.nn.functional.linear = zero3_linear_wrap if CASES.index(case) > first else LINEAR


def play(group: Any, everyone: Any, folder: str, *files: str) -> Iterator[dict[str, Any]]:
    """In every rank, yields the curves of these files with this number of workers."""
    for i, case in enumerate(CASES):
        if case.file not in files or case.workers != dist.get_world_size():
            continue
        _set_linear(case)
        made = job_of(case, Path(folder))
        data_plan = plan(made, [read_manifest(location) for location in made.sources])
        losses, norms = Steps(made, data_plan).curve()
        if dist.get_rank() == 0:
            yield {"case": i, "losses": losses, "norms": norms}


Curves = dict[Case, list[tuple[float, float]]]  # (loss, gradient norm) of each step


def collect(told: list[dict[str, Any]]) -> Curves:
    """Collects the curves that `play` yielded on all ranks."""
    found = {CASES[row["case"]]: list(zip(row["losses"], row["norms"], strict=True)) for row in told}
    return {case: found[case] for case in CASES if case in found}


def play_all(folder: Path, files: Iterable[str] = FILES) -> Curves:
    """Computes all curves of these files; uses one process group for each number of workers, and the data below `folder`."""
    data.build(folder)
    return collect(ranks.run(f"{__name__}:play", WORKERS, str(folder), *files, deadline_s=DEADLINE_S))


def environment() -> dict[str, str]:
    """Returns the facts that decide which kernels compute: libraries and the CPU."""
    cpu = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    kind = " ".join(cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {**versions, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": kind}


def differences(made_in: dict[str, str]) -> list[str]:
    """Lists the differences between this environment and that of a file, one line each."""
    here = environment()
    return [f"{key}: {made_in.get(key)} -> {here[key]}" for key in here if made_in.get(key) != here[key]]


# files ---------------------------------------------------------------------------------------------------------------


def write(curves: Curves, folder: Path = FOLDER) -> None:
    for name in dict.fromkeys(case.file for case in curves):
        lines = [f"# Golden curves of {name}; written by `python -m tests.golden.write --overwrite`, and held to by",
                 "# tests/integration/test_golden_curves.py, to the last bit where the environment is this one:"]  # fmt: skip
        lines += [f"#   {key}: {value}" for key, value in environment().items()]
        lines += ["# Of each step from 0: loss, gradient norm before clipping."]
        for case, points in curves.items():
            if case.file == name:
                lines += ["", case.name, *(f"{step:2} {loss!r} {norm!r}" for step, (loss, norm) in enumerate(points))]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def read(folder: Path = FOLDER) -> tuple[Curves, dict[str, dict[str, str]]]:
    """Reads the curves in all files, and each file's environment by its name."""
    curves: Curves = {}
    environments: dict[str, dict[str, str]] = {}
    cases = {(case.file, case.name): case for case in CASES}
    for path in sorted(folder.glob("*.txt")):
        points: list[tuple[float, float]] = []
        for line in path.read_text().splitlines():
            if line.startswith("#   "):
                key, _, value = line.removeprefix("#   ").partition(": ")
                environments.setdefault(path.stem, {})[key] = value
            elif line.startswith("zero"):
                points = curves.setdefault(cases[path.stem, line], [])
            elif line and not line.startswith("#"):
                step, loss, norm = line.split()
                assert int(step) == len(points), f"{path}: step {step} is out of turn"
                points.append((float(loss), float(norm)))
    return curves, environments
