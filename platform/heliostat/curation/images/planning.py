"""Plans the tasks that read images. The driver writes nothing for a task: a description of a few hundred bytes travels with the
task, and tasks that read the metadata files write the larger descriptions to temporary files.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple
from typing import Any

from heliostat.curation import segment
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.text import sources
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key


def parts(
    flow: Flow, uri: str, files: list[InputFile], columns: ImageColumns, limit: int, target: int | None = None
) -> Iterator[FilePart]:
    """Yields a part for each task that reads images. `limit`: maximum bytes of a metadata file. `target`: bytes of input per
    task, as in `sources.tasks`."""
    if not (tables := image_sources.metadata_files(files)):
        sizes = {f.path: f.bytes for f in files}
        yield from (described(task, sizes) for task in image_sources.tasks(uri, files, columns, limit, target))
        return
    work = (_table_task(flow, uri, path, files, columns, limit) for path in tables)
    for record in flow.all("metadata", of_table, work, reads=True):
        yield from (FilePart(name, bytes, 0, path_by_time=by_time) for name, bytes, by_time in record["parts"])


def _table_task(flow: Flow, uri: str, path: str, files: list[InputFile], columns: ImageColumns, limit: int) -> Task:
    folder = path.rpartition("/")[0]
    some = files
    if folder:  # files are sorted by path, and "0" is the character after "/"
        first, stop = (bisect_left(files, f"{folder}{end}", key=lambda f: f.path) for end in "/0")
        some = files[first:stop]
    listed, about = [astuple(file) for file in some], {"uri": uri, "path": path, "columns": columns, "limit": limit}
    name = key("metadata", listed, {**about, "columns": asdict(columns)})
    return Task(name, about, {"listed": flow.share(listed)}, sum(file.bytes for file in some if file.path == path))


def of_table(
    folder: Location, uri: str, path: str, columns: ImageColumns, limit: int, listed: list[tuple[Any, ...]]
) -> dict[str, object]:
    """Writes the descriptions of the tasks that read the files in a metadata file to temporary files. `listed`: the fields of
    each `InputFile` in the metadata file's folder. In the returned record, `parts` has the name, the bytes to read, and the name
    without ETags of each description."""
    files = [InputFile(*fields) for fields in listed]
    sizes, named = {f.path: f.bytes for f in files}, list[list[object]]()
    for task in image_sources.tasks_of_table(sources.root(uri), path, image_sources.states_of(files), columns, limit):
        part = described(task, sizes)
        named.append([segment.store(folder, task), part.bytes, part.path_by_time])
    return {"parts": named, "files": [name for name, *_ in named]}


def described(task: dict[str, Any], sizes: Mapping[str, int], also: Mapping[str, object] | None = None) -> FilePart:
    """Returns the part for a task that reads images. The task's description identifies the part. `sizes`: the bytes of each input
    file. `also`: entries of the description that don't identify the part, because they don't affect what the task reads."""
    paths = [one["path"] for one in task.get("parts") or task.get("entries", [])]
    name, by_time = segment.name_of(task), segment.name_of(_without_etags(task))
    size = sum(sizes.get(path, 0) for path in paths)
    description = json.dumps({**task, **(also or {})})
    return FilePart(name, size, 0, path_by_time=by_time if by_time != name else "", description=description)


def task_of(folder: Location, part: FilePart) -> dict[str, Any]:
    """Returns the description of a task that reads images, from its part or from a temporary file."""
    return json.loads(part.description) if part.description else segment.load(folder, part.path)


def _without_etags(task: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a reading task's description without ETags, as older versions of heliostat named such descriptions."""
    if "parts" in task:
        return {**task, "parts": [{key: part[key] for key in part if key != "etag"} for part in task["parts"]]}
    return {**task, "state": [one and one[:2] for one in task["state"]]} if "state" in task else task
