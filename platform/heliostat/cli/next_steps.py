"""Shows the next steps in a folder: `heliostat` without a command.

This module reads YAML files and the folders of datasets and runs. It imports no slow library, and never connects to S3.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from pathlib import Path
from typing import Any, Literal, TypedDict

from heliostat.cli.common import program
from heliostat.text import plural

STORAGE = ".heliostat/runs"  # default of a job's `storage`
FIRST = "quickstart"  # name of the file to suggest first
LONGEST = 60  # maximum number of characters of a name in a line


class FolderRun(TypedDict):
    """Describes a job's run. `step`: the step of the last checkpoint. `answers`: the output of `model generate` with the run's
    model."""

    job: str
    name: str
    folder: str
    state: str
    step: int
    steps: int
    model: str | None
    answers: Literal["text", "images"] | None


class NextCommand(TypedDict):
    """Describes a command to type, and the reason for this command."""

    command: str
    why: str


class FolderStatus(TypedDict):
    """Describes a folder: its files, its datasets, the run that was written to last, and the next commands."""

    folder: str
    jobs: list[str]
    pipelines: list[str]
    datasets: list[str]
    run: FolderRun | None
    next: list[NextCommand]


class FoundFile(TypedDict):
    """Holds a YAML file's path and its content."""

    path: str
    content: dict[str, Any]


def status(folder: Path) -> FolderStatus:
    """Reads a folder's jobs, pipelines, datasets, and runs, and suggests the next commands."""
    jobs, pipelines = _files(folder / "jobs"), _files(folder / "pipelines")
    prepared = [str(one["content"]["output"]) for one in pipelines if _has_dataset(folder, one["content"].get("output"))]
    runs = sorted((run for one in jobs if (run := _run(folder, one))), key=lambda run: _active(folder / run["folder"]))
    result: FolderStatus = {
        "folder": str(folder.resolve()), "jobs": [one["path"] for one in jobs], "pipelines": [one["path"] for one in pipelines],
        "datasets": prepared, "run": runs[-1] if runs else None, "next": [],
    }  # fmt: skip
    name = program()
    for words, why in _next(folder, result, jobs, pipelines):
        result["next"].append({"command": shlex.join([name, *words]), "why": why})
    return result


def lines(status: FolderStatus) -> list[str]:
    """Formats the status for a terminal, in at most 8 lines."""
    if not status["jobs"] and not status["pipelines"]:
        text = ["This folder isn't a heliostat workspace: it has no jobs/ and no pipelines/."]
    else:
        counts = {"job": status["jobs"], "pipeline": status["pipelines"], "prepared dataset": status["datasets"]}
        text = [", ".join(plural(len(items), what) for what, items in counts.items())]
    if run := status["run"]:
        of = f" of {run['steps']:,}" if run["steps"] else ""  # 0: unknown, because the job has epochs or tokens
        model = f", model {run['model']}" if "/" in (run["model"] or "") else ""  # a run id has no slash
        text.append(f"run {run['name'][:LONGEST]}: {run['state']}, step {run['step']:,}{of}{model}")
    width = 80 - len("Next:  ")
    for number, one in enumerate(status["next"]):
        why = f"  # {one['why']}"
        line = one["command"] + (why if len(one["command"] + why) <= width else "")
        text.append(("Next:  " if number == 0 else " " * 7) + line)
    return [*text, "All commands: heliostat --help"]


def _next(folder: Path, status: FolderStatus, jobs: list[FoundFile], pipelines: list[FoundFile]) -> list[tuple[list[str], str]]:
    """Lists the next commands. Each command is written as the words after the program's name, with the reason for the command."""
    if not jobs and not pipelines:
        return [(["init"], "make a workspace here"), (["init", "my-workspace"], "or in a new folder")]
    if run := status["run"]:
        return _after(run)
    ready = [one for one in jobs if _ready(folder, one)]
    if ready:
        job = _first(ready)
        return [(["check", job], "find mistakes first"), (["train", job], "train a model")]
    if pipelines:
        pipeline = _first(pipelines)
        return [(["data", "prepare", pipeline], "make a dataset")] + ([(["train", _first(jobs)], "then train")] if jobs else [])
    return [(["check", _first(jobs)], "find what the job lacks")]


def _after(run: FolderRun) -> list[tuple[list[str], str]]:
    if run["state"] == "running":
        return [(["run", "goodput", run["folder"]], "how the run uses its time"), (["run", "ui"], "curves in the browser")]
    if run["state"] == "interrupted":
        return [(["train", run["job"], "--resume"], "continue from the last checkpoint")]
    ui = (["run", "ui"], "curves, samples, lineage in the browser")
    verify = (["run", "verify", run["folder"]], "check which data the run trained on")
    if run["model"] is None or run["answers"] is None:
        return [ui, verify]
    file = ["--out", "image.png"] if run["answers"] == "images" else []
    generate = (["model", "generate", run["model"], "--prompt", "Hello", *file], "use the model")
    return [generate, (["model", "play", run["model"]], "try the model in the browser"), ui, verify]


def _files(parent: Path) -> list[FoundFile]:
    """Reads the YAML files of a folder, sorted by name. Skips a file that isn't a mapping, because `check` reports it."""
    import yaml

    files = list[FoundFile]()
    for path in sorted([*parent.glob("*.yaml"), *parent.glob("*.yml")]):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            files.append({"path": str(path), "content": content})
    return files


def _first(files: list[FoundFile]) -> str:
    return next((one["path"] for one in files if Path(one["path"]).stem == FIRST), files[0]["path"])


def _ready(folder: Path, job: FoundFile) -> bool:
    """Checks whether every dataset of a job is prepared in this workspace."""
    data = job["content"].get("data")
    sources = [data, *(data.get("sources") or [])] if isinstance(data, dict) else []
    paths = [source["path"] for source in sources if isinstance(source, dict) and source.get("path")]
    return bool(paths) and all(_has_dataset(folder, path) for path in paths)


def _has_dataset(folder: Path, place: object) -> bool:
    return isinstance(place, str) and "://" not in place and (folder / place / "manifest.parquet").is_file()


def _run(folder: Path, job: FoundFile) -> FolderRun | None:
    """Reads the state of a job's run from the run's folder. Returns None if the job has no run, or if the run is on S3."""
    content = job["content"]
    storage, train = content.get("storage") or STORAGE, content.get("train")
    place = Path(str(storage)) / str(content.get("name"))
    if "://" in str(storage) or not (folder / place / "run.json").is_file():
        return None
    steps = train.get("steps") if isinstance(train, dict) else None
    steps = steps if isinstance(steps, int) else 0  # 0: not set, or a mistake that `check` reports
    ending, step = _read(folder / place / "result.json"), _last_step(folder / place)
    ended, alive = isinstance(ending.get("steps"), int) and ending["steps"] >= step, _alive(folder / place / "lease")
    return {
        "job": job["path"], "name": str(content.get("name")), "folder": str(place),
        "state": "running" if alive else "finished" if ended else "interrupted",
        "step": int(ending["steps"]) if ended else step, "steps": int(ending["steps"] if ended else steps),
        "model": _model(ending) if ended else None,
        "answers": _answers(ending) if ended else None,
    }  # fmt: skip


def _model(ending: dict[str, Any]) -> str | None:
    """Returns a name that every command accepts: the registered model, or the run's id."""
    uri = ending.get("model_uri")
    return str(ending.get("run_id")) if uri and str(uri).startswith("models:/m-") else uri


def _answers(ending: dict[str, Any]) -> Literal["text", "images"] | None:
    if not ending.get("samples"):  # the recipe can't generate, for example a classifier
        return None
    return "images" if ending.get("unit") == "samples" else "text"


def _last_step(run: Path) -> int:
    names = (p.parent.name.removeprefix("step-") for p in run.glob("checkpoints/step-*/checkpoint.json"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _active(run: Path) -> float:
    """Returns the time of a run's last write to its folder, ledger, or lease, in seconds since the epoch."""
    return max((p.stat().st_mtime for p in (run, run / "ledger", run / "lease", run / "result.json") if p.exists()), default=0.0)


def _alive(leases: Path) -> bool:
    """Returns whether the holder of the newest lease may be alive. A holder on another machine counts as alive until the lease is
    released."""
    newest = max(leases.glob("*.json"), default=None)
    holder = _read(newest) if newest else {}
    if not holder or holder.get("released"):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
