"""Runs a model over all documents of an input, on Ray: `heliostat model infer MODEL --input IN --out OUT`.

    OUT/answers/9c01....parquet   answers of a piece of the input, in its order
    OUT/bad.parquet               inputs without an answer, and the reasons
    OUT/inference.json            written last: model, settings, digest of the inputs, counts, files in the input's order
    OUT/work                      results of finished pieces, by the keys of their inputs

Each input is answered once. The file name of a piece is a digest of everything that determines the piece's answers.
`inference.json` lists each file once. If a command is killed, the next command continues after the last finished piece, on any
number of workers. If inputs are added, only their pieces run. Answers are deleted if their inputs no longer exist. The number of
deleted answers is reported.

Only one command at a time writes to the folder, and the folder has the answers to only one input. On machines of the same kind,
an answer depends only on the input, the model, and the settings. `prepare` can read OUT/answers as an input.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.text.sources import absolute
from heliostat.curation.watching import PipelineWatch
from heliostat.errors import ConfigError
from heliostat.inference.batch import loading, reading, tasks
from heliostat.inference.batch.tasks import BatchSettings, PieceRecord
from heliostat.recipes import exported, model_origins
from heliostat.storage import lease
from heliostat.storage.locations import Location
from heliostat.tasks import files as model_files
from heliostat.tasks import shipping
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.progress import Progress
from heliostat.tasks.work import Work, key
from heliostat.terminal import console

log = logging.getLogger(__name__)

RECORD, BAD, WORK = "inference.json", "bad.parquet", "work"
SETTINGS = "settings.json"  # settings that the folder belongs to


def infer(
    model: Path,
    input: str,
    output: str,
    settings: BatchSettings,
    workers: int = 2,
    quiet: bool = False,
    engine: str = "transformers",
) -> dict[str, Any]:
    """Answers all documents of an input; returns the values of `inference.json`, without the list of files.

    `quiet`: whether to hide the progress. `engine`: transformers, vllm, or auto; auto uses vLLM if vLLM supports the task. Raises
    ConfigError, before anything starts, in these cases:

    - the model doesn't support the task, or its answers leave no room for a prompt
    - there is no input
    - the output contains something else, or answers to another input
    - another command writes to the output
    """
    known, place = loading.require(model, settings.task, settings.options), Location(output)
    files = reading.of(input, settings).listing()
    import torch

    gpus = torch.cuda.device_count()
    by, why = loading.choose(engine, model, settings.task, gpus)
    settings = settings.model_copy(update={"engine": by})
    about = {"folder": str(model), "digest": model_digest(model), "origin": model_origins.of(str(model), model), **known}
    facts = {"model": about, "engine": {"name": by, "version": version(by)}, "settings": settings.identity}
    claim(place, {"model": about["digest"], "input": absolute(input), **settings.identity}, "answers", "batch inference")
    with lease.take(place, "written", "Wait for that process, or stop it", field="--out") as lease_:
        log.info("%s answers (%s)", by, why)
        with flow_on_ray(place, f"answering {input}", workers, gpus, quiet) as flow:
            return answer(flow, files, facts | {"input": input}, place, lease_.fence.check)


@contextmanager
def flow_on_ray(place: Location, title: str, workers: int, gpus: int, quiet: bool) -> Iterator[Flow]:
    """Starts Ray, or connects to a running Ray. Yields a `Flow`, which runs tasks on Ray, shows the progress, and stores the
    results of finished tasks in the folder `place`."""
    from heliostat.cluster.connect import connect

    connect(cpus=workers, gpus=gpus)
    with PipelineWatch(console, title, quiet) as watch, Flow(Work(place.join(WORK)), progress=Progress(watch.show)) as flow:
        yield flow


def answer(
    flow: Flow, files: list[InputFile], facts: dict[str, Any], place: Location, before_commit: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Answers the documents of these files with Ray tasks (`flow`), and writes the results to the folder `place`.

    `before_commit`: raises an error if another command has taken over the folder.
    """
    began = time.time()
    records = _answered(flow, _tasks(flow, files, facts, place), place)
    flow.close()
    before_commit()
    missing = _missing(facts["settings"]["keep"], records)
    if missing:
        log.warning(
            "--keep: %s: the inputs have no such column, so this column of the answers is empty", ", ".join(map(repr, missing))
        )
    listed = [{"file": f"{tasks.ANSWERS}/{r['name']}.parquet", "rows": r["answers"]} for r in records if r["answers"]]
    gone = _others(place, {str(one["file"]) for one in listed})
    result = facts | {"inputs": _inputs(records), **_counts(records), "missing": missing, "deleted": sum(map(_rows, gone)),
                    "seconds": round(time.time() - began, 1), "cpu_seconds": round(sum(r["seconds"] for r in records), 1),
                    "devices": _devices(records), "new": flow.done.get("infer", 0)}  # fmt: skip
    _list_bad(place, records)
    place.join(RECORD).write(json.dumps({**result, "answers_in": listed}, indent=1).encode())
    shipping.withdraw(flow.work.spill)
    for one in gone:
        one.delete()
    return result


def model_digest(folder: Path) -> str:
    """Computes the SHA-256 digest of a model's files, in hex."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder)}\0".encode() + bytes.fromhex(model_files.digest("model", str(file))))
    return digest.hexdigest()


def origin(folder: Path) -> dict[str, object]:
    """Returns the model's MLflow run and step, if the model's folder records them."""
    if not (folder / exported.RECORD).is_file():
        return {}
    return {"origin": exported.record(folder).get("origin", {})}


def _tasks(flow: Flow, files: list[InputFile], facts: dict[str, Any], place: Location) -> list[Task]:
    """Makes one Ray task for each piece of the input, in the input's order."""
    settings, input = facts["settings"], facts["input"]
    read = reading.of(input, BatchSettings(**settings))
    model = facts["model"]
    shared = {"source": read.source(flow), "output": place.uri, "model": shipping.describe("model", model["folder"]),
              "follows": model["digest"], "settings": settings}  # fmt: skip

    def task(piece: list[FilePart]) -> Task:
        name, before = (
            key("infer", model["digest"], settings, input, read.identity, identity)
            for identity in ([part.identity for part in piece], [part.identity_by_time for part in piece])
        )
        return Task(name, {"piece": piece, "name": name, **shared}, bytes=sum(part.length for part in piece), before=before)

    return [task(piece) for piece in read.pieces(flow, files)]


def _answered(flow: Flow, wanted: list[Task], place: Location) -> list[PieceRecord]:
    """Runs the tasks, one per piece of the input; returns the tasks' records in the input's order."""
    present = dict(place.files())

    def whole(record: dict[str, Any]) -> bool:
        wrote = ((tasks.ANSWERS, record["bytes"]), (tasks.BAD, record["bad_bytes"]))
        return all(present.get(f"{folder}/{record['name']}.parquet") == size for folder, size in wrote if size)

    return cast(list[PieceRecord], flow.all("infer", tasks.answer_piece, iter(wanted), valid=whole, pooled=True))


def _counts(records: list[PieceRecord]) -> dict[str, int]:
    return {"answers": sum(r["answers"] for r in records), "bad": sum(r["bad"] for r in records),
            "tokens": sum(r["tokens"] for r in records), "truncated": sum(r["truncated"] for r in records)}  # fmt: skip


def _devices(records: list[PieceRecord]) -> list[dict[str, object]]:
    """Sums the time that each kind of device worked on the answers. The unit is processor seconds for CPUs, and elapsed seconds
    for GPUs."""
    used: dict[tuple[str, int | None], float] = {}
    for record in records:
        gpu = record.get("gpu")
        device = (gpu[0], gpu[1]) if gpu else ("cpu", None)
        used[device] = used.get(device, 0.0) + (record.get("wall", record["seconds"]) if gpu else record["seconds"])
    return [{"name": name, "memory": memory, "seconds": round(s, 1)} for (name, memory), s in used.items()]


def _missing(keep: list[str], records: list[PieceRecord]) -> list[str]:
    """Lists the columns of --keep that no input has; empty if no input was read."""
    read = any(r.get("read") for r in records)
    return [column for column in keep if read and not any(r.get("kept", {}).get(column) for r in records)]


def _inputs(records: list[PieceRecord]) -> str:
    """Computes one digest of all inputs in their order."""
    return hashlib.sha256("".join(r["inputs"] for r in records).encode()).hexdigest()


def _list_bad(place: Location, records: list[PieceRecord]) -> None:
    """Writes the inputs without an answer to one table. Only the rows of one piece at a time are in memory."""
    if not any(r["bad"] for r in records):
        place.join(BAD).delete()
        return

    def fill(out: pa.NativeFile) -> None:
        with pq.ParquetWriter(out, tasks.BAD_SCHEMA) as writer:
            for record in records:
                if record["bad"]:
                    raw = place.join(tasks.BAD, f"{record['name']}.parquet").read()
                    writer.write_table(pq.read_table(pa.BufferReader(raw)))

    place.join(BAD).send(fill, sum(r["bad_bytes"] for r in records))


def _others(place: Location, listed: set[str]) -> list[Location]:
    """Lists the answer files that aren't in `listed`: their inputs no longer exist."""
    names = (f"{tasks.ANSWERS}/{name}" for name, _ in place.join(tasks.ANSWERS).files())
    return [place.join(name) for name in names if name not in listed]


def _rows(file: Location) -> int:
    """Counts the answers in a file; 0 if the file is damaged, because then no answer can be read."""
    try:
        return pq.read_metadata(file.open()).num_rows
    except pa.ArrowInvalid:
        return 0


def claim(place: Location, settings: dict[str, object], holding: str, made_by: str) -> None:
    """Writes the settings of a command to the folder in which the command writes its results. Raises ConfigError if the folder
    contains something else, or was written with other settings.

    `holding`, `made_by`: names of the folder's contents, for the error messages.
    """
    known = _known(place)
    if known is None:
        others = [name for name, _ in place.files() if not name.startswith(f"{SETTINGS}.")]  # incomplete claims
        if not others and place.join(SETTINGS).create(json.dumps(settings).encode()):
            return
        known = _known(place)  # another command may have been faster
        if known is None:
            raise ConfigError(f"--out: {place}: not empty, and has no {made_by}. Pass another folder")
    if changed := [name for name in {**settings, **known} if known.get(name) != settings.get(name)]:
        name = changed[0]
        was, now = (str(one.get(name))[:80] for one in (known, settings))
        raise ConfigError(f"--out: {place} contains {holding} of another {name} ({was!r}, not {now!r}). Pass another folder")


def _known(place: Location) -> dict[str, object] | None:
    """Reads the settings with which a folder was written; None if the folder has no settings."""
    try:
        known = json.loads(place.join(SETTINGS).read())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(f"--out: {place.join(SETTINGS)} is damaged. Pass another folder") from e
    return known if isinstance(known, dict) else {}
