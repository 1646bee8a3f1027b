"""Takes one document through a dataset's stages again, from where it was read, to tell what each did to it by which figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pyarrow.fs import FileType

from heliostat.curation import readers, registry, tally
from heliostat.curation.chain import bytes_of
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import clones
from heliostat.curation.repeating import RepeatingStage
from heliostat.curation.stage import Document, Dropped, GlobalStage
from heliostat.curation.text import documents, sources
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import ConfigError

MEMBER = re.compile(r"(.*?\.(?:tar(?:\.\w+)?|tgz|zip|git))#(.+)", re.DOTALL | re.IGNORECASE)  # the file of a repository


def source_of(made_by: dict[str, Any]) -> TextSource:
    """Makes the source that the dataset was read by (`reasons.made_by`)."""
    rules = made_by["rules"]
    return TextSource(made_by["input"], documents.TextRules(**{**rules, "columns": tuple(rules["columns"])}))


def origin(id: str) -> dict[str, Any]:
    """Tells where a document was read, from its id: the file, and `line`, `row`, `byte` or `path` in it, if it holds several."""
    if found := MEMBER.match(id):
        return {"file": found[1], "path": found[2]}
    path, _, number = id.rpartition("#")
    if not path or not number.isdecimal():
        return {"file": id}
    return {"file": path, readers.numbered(path) or "row": int(number)}


def read_again(source: TextSource, id: str) -> Document | Dropped | None:
    """Reads a document again; None if it is not where it was."""
    base, file = sources.root(source.input), origin(id)["file"]
    alone = base.fs.get_file_info(base.path).type == FileType.File or (file == base.name and clones.is_clone(file))
    part = FilePart("" if alone else file, base.fs.get_file_info((base if alone else base.join(file)).path).size or 0, 0)
    return next((item for item in source.read(part) if item.id == id), None)


def stages(made_by: dict[str, Any], document: Document) -> Iterator[tuple[dict[str, Any], Document | None]]:
    """Yields what each stage does to a document, and the document behind it, up to the one that drops it, or of which nobody
    knows what it cut out.

    Of each: `stage`, `did` (kept, changed, dropped; compared, where documents are compared with others; cut, where what they have
    in common is removed), `reason`, `detail`, `measures`, `counts`, and `bytes` before and behind it. ConfigError if the dataset
    was made by stages that this version does not have, or not so.
    """
    for number, entry in enumerate(made_by["stages"]):
        try:
            stage = registry.parse(entry)
        except ValueError as e:
            raise ConfigError(f"the dataset was made by a stage that this version does not have, or not so: {e}") from e
        told: dict[str, Any] = {"stage": tally.label(number, stage), "reason": "", "detail": "", "measures": {}, "counts": {}}
        if isinstance(stage, RepeatingStage):
            yield {**told, "did": "cut"}, None
            return
        if isinstance(stage, GlobalStage):
            yield {**told, "did": "compared"}, document
            continue
        text, size = document.text, bytes_of(document)
        (outcome,) = stage.open()([document])
        after = outcome.document
        did = "dropped" if after is None else "kept" if after.text == text else "changed"
        told |= {"did": did, "reason": outcome.reason, "detail": outcome.detail, "measures": outcome.measures}
        yield {**told, "counts": outcome.counts, "bytes": [size, bytes_of(after) if after else 0]}, after
        if after is None:
            return
        document = after
