"""Finds a document's provenance in a dataset: the source file, each stage's action, the kept duplicate, and the shard."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pyarrow.fs import FileType

from heliostat.curation import readers, reasons, recording, registry, segment, tally
from heliostat.curation.chain import bytes_of
from heliostat.curation.conversations import reading
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import clones
from heliostat.curation.repeated import RepeatingStage
from heliostat.curation.stage import Document, Dropped, GlobalStage
from heliostat.curation.text import documents, sources
from heliostat.curation.text.tasks import TextSource
from heliostat.data import documents as places
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, HeliostatError
from heliostat.tasks.care import CRASHED, UNREAD

MEMBER = re.compile(r"(.*?\.(?:tar(?:\.\w+)?|tgz|zip|git))#(.+)", re.DOTALL | re.IGNORECASE)  # the file of a repository
AFTER = (segment.FINISH, "exact", "shard", "forget")  # fates of documents that passed all stages
ENDS = {"kept": "is in the dataset", "duplicate": "the same text", "forgotten": "taken out of an earlier dataset"}
HOPS = 20  # maximum steps from a duplicate to the kept document: the document in between may be a duplicate, too


def find(dataset: Manifest, id: str | None = None, url: str | None = None, text: bytes | None = None) -> list[dict[str, Any]]:
    """Finds documents by id, URL, or text. Returns each document's outcome (kept or dropped, with the reason), as rows of
    `reasons.END`. Raises ConfigError if no document matches."""
    if id is not None:
        rows, what = reasons.end_of(dataset, id), f"--id: {id!r}: no document has this id"
        what += ". An id is a path in the input. In a file of several documents, `#` and the line, row, or byte follow the path"
    elif url is not None:
        rows, what = (
            reasons.with_column(dataset, "url", url),
            f"--url: {url!r}: no document has this URL. Check the URL, or pass --id",
        )
    else:
        assert text is not None
        if dataset.kind != "tokens":
            raise ConfigError("--text: the dataset contains images or conversations. Pass --id or --url")
        hashes, fate = _hashes(dataset, text)
        rows = [row for digest in hashes for row in reasons.kept_as(dataset, digest)]
        what = f"--text: no document has this text, neither as given nor after the stages{fate}"
    if not rows:
        limits = recording.limits(recording.every_of(dataset)) if id is None or recording.may_lack(dataset, id) else ""
        fix = "so the dataset may have the document. Prepare the dataset with record_documents: all"
        raise ConfigError(f"{what} ({dataset.location})" + (f". {limits}, {fix}" if limits else ""))
    return sorted(rows, key=lambda row: row["id"])


def _hashes(dataset: Manifest, raw: bytes) -> tuple[list[str], str]:
    """Returns two values: the hashes that a text may have in the dataset, before and after the stages, and a sentence for the
    error message. The sentence names the stage that drops or changes the text, and is "" without such a stage."""
    by, fate = reasons.made_by(dataset), ""
    document = documents.clean("--text", raw, source_of(dataset, by).rules if by else documents.TextRules())
    if isinstance(document, documents.Dropped):
        raise ConfigError(f"--text: the text isn't a valid document: {document.reason} ({documents.REASONS[document.reason]})")
    hashes, last = [_hash(document)], document
    for step, after in stages_again(by, last) if by else ():
        if step["did"] == "cut":
            fate = (
                f". The changes by stage {step['stage']} depend on all documents, so --text can't find the text. "
                "Use --id or --url"
            )
        elif after is None:
            fate = f". Stage {step['stage']} would drop this text: {step['reason']}"
        last = after or last
    finished = source_of(dataset, by).finish(last) if by and not fate else None
    if isinstance(finished, Document):
        hashes.append(_hash(finished))
    return list(dict.fromkeys(hashes)), fate


def _hash(document: Document) -> str:
    assert isinstance(document.text, str)
    return hashlib.sha256(document.text.encode()).hexdigest()


def trace(dataset: Manifest, end: dict[str, Any]) -> dict[str, Any]:
    """Returns a document's provenance. `end`: the document's outcome, as a row of `reasons.END`.

    The result has `id`, `columns`, `read`, `stages`, `end`, `instead` (the steps from the duplicate to the kept document), `kept`
    (the id in the dataset, or null), `shard` (the shard's path, and the document's `pieces`), and `notes`.
    """
    funnel, notes = reasons.funnel(dataset), list[str]()
    by, steps = reasons.made_by(dataset), list[dict[str, Any]]()
    try:
        steps = _again(dataset, by, end, funnel, notes) if by and end["reason"] not in (CRASHED, UNREAD) else []
    except HeliostatError as e:
        notes.append(str(e))
    if not steps:
        if end["reason"] in (CRASHED, UNREAD):
            notes.append("heliostat doesn't run the stages again, because the document would crash this process too")
        elif by or dataset.kind == "tokens":
            notes.append("the input has changed, so heliostat doesn't know how the stages changed the document")
        steps = _recorded(funnel, end)
    for step in steps:
        step |= {"what": _meaning(funnel, step), "thresholds": funnel.get(step["stage"], {}).get("thresholds", {})}
    instead, last = _instead(dataset, end)
    if limits := recording.limits(recording.every_of(dataset)):
        unknown = "isn't recorded, so its shard and its runs are unknown" if instead and "end" not in instead[-1] else ""
        notes.append(f"{limits}" + (f". The document {instead[-1]['id']} {unknown}" if unknown else ""))
    kept = last["id"] if last["reason"] == "kept" else None
    path = places.current(dataset, last["detail"]) if kept else None
    pieces_held = places.pieces(dataset, path, last["id"]) if path else []
    return {
        "id": end["id"],
        "rows": dataset.kind != "tokens",
        "columns": end["columns"],
        "read": origin(end["id"]),
        "stages": steps,
        "end": {**{k: end[k] for k in ("stage", "reason", "detail", "measures")}, "what": _meaning(funnel, end)},
        "instead": instead,
        "kept": kept,
        "shard": {"path": path, "pieces": [asdict(piece) for piece in pieces_held]} if pieces_held else None,
        "notes": notes,
    }


def _again(
    dataset: Manifest, by: dict[str, Any], end: dict[str, Any], funnel: dict[str, Any], notes: list[str]
) -> list[dict[str, Any]]:
    """Runs the document through the stages again, and returns each stage's action. From a stage that removed text shared with
    other documents on, returns the recorded actions instead. Returns an empty list if the document can't be read."""
    document = read_again(source_of(dataset, by), end["id"])
    if document is None:
        return []
    read = {"stage": segment.READ, "did": "kept", "reason": "", "detail": "", "measures": {}, "counts": {}}
    if isinstance(document, Dropped):
        read |= {"did": "dropped", "reason": document.reason, "detail": document.detail}
    steps = [read]
    for again, _ in stages_again(by, document) if isinstance(document, Document) else ():
        if again["did"] == "cut" and end["stage"] not in {step["stage"] for step in steps}:
            notes.append(
                f"the changes by {again['stage']} depend on all documents. So these and all later changes "
                "come from the dataset's record"
            )
            recorded = _recorded(funnel, end)
            return steps + recorded[next((i for i, step in enumerate(recorded) if step["stage"] == again["stage"]), None) :]
        if again["did"] == "cut":  # the document was dropped before, and isn't dropped now
            break
        if again["did"] == "compared":
            gone = again["stage"] == end["stage"]
            again |= {"did": "dropped", "reason": end["reason"], "detail": end["detail"]} if gone else {"did": "kept"}
        steps.append(again)
        if again["did"] == "dropped":
            break
    last = steps[-1]
    today = f"dropped by {last['stage']}: {last['reason']}" if last["did"] == "dropped" else "kept"
    then = "kept" if end["stage"] in AFTER else f"dropped by {end['stage']}: {end['reason']}"
    if today != then:
        notes.append(f"the input has changed: today, the document would be {today}; in this dataset, the document was {then}")
    return steps


def _recorded(funnel: dict[str, Any], end: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the actions of the stages from the dataset's record: the stages that the document passed, and the stage that
    dropped the document."""
    steps = list[dict[str, Any]]()
    for name in funnel:
        if name in (segment.FINISH, "shard"):
            break
        empty = {"stage": name, "did": "came through", "reason": "", "detail": "", "measures": {}, "counts": {}}
        gone = name == end["stage"]
        steps.append(empty | ({"did": "dropped", **{k: end[k] for k in ("reason", "detail", "measures")}} if gone else {}))
        if gone:
            break
    return steps


def _instead(dataset: Manifest, end: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Follows a duplicate to the kept document. Returns the documents between both, each with the size of the document's cluster,
    and the outcome of the last document."""
    hops = list[dict[str, Any]]()
    while end["reason"] in ("duplicate", "near_duplicate") and len(hops) < HOPS:
        id, _, size = end["detail"].rpartition(" (one of ") if end["reason"] == "near_duplicate" else (end["detail"], "", "")
        after = reasons.end_of(dataset, id)
        hops.append({"id": id, "by": end["stage"], "cluster": int(size.rstrip(")")) if size else None})
        if not after:
            break
        end = after[0]
        hops[-1] |= {"end": {k: end[k] for k in ("stage", "reason", "detail")}}
    return hops, end


def _meaning(funnel: dict[str, Any], end: dict[str, Any]) -> str:
    meanings = documents.REASONS if end["stage"] in (segment.READ, segment.FINISH) else {}
    meanings = meanings | funnel.get(end["stage"], {}).get("what", {}) | ENDS
    return meanings.get(end["reason"], "")


def source_of(dataset: Manifest, made_by: dict[str, Any]) -> TextSource:
    """Returns an object that reads the dataset's input again. `made_by`: the dataset's record of its pipeline
    (`reasons.made_by`)."""
    if reading.RECORD in made_by:
        return reading.source_again(dataset, made_by)
    rules = made_by["rules"]
    return TextSource(made_by["input"], documents.TextRules(**{**rules, "columns": tuple(rules["columns"])}))


def origin(id: str) -> dict[str, Any]:
    """Parses a document's id. Returns the `file`, and, for a file of several documents, the document's `line`, `row`, `byte`, or
    `path` in the file."""
    if match := MEMBER.match(id):
        return {"file": match[1], "path": match[2]}
    path, _, number = id.rpartition("#")
    if not path or not number.isdecimal():
        return {"file": id}
    return {"file": path, readers.numbered(path) or "row": int(number)}


def read_again(source: TextSource, id: str) -> Document | Dropped | None:
    """Reads a document from the input again; None if the input no longer contains the document."""
    base, file = sources.root(source.input), origin(id)["file"]
    alone = base.fs.get_file_info(base.path).type == FileType.File or (file == base.name and clones.is_clone(file))
    part = FilePart("" if alone else file, base.fs.get_file_info((base if alone else base.join(file)).path).size or 0, 0)
    return next((item for item in source.read(part) if item.id == id), None)


def stages_again(made_by: dict[str, Any], document: Document) -> Iterator[tuple[dict[str, Any], Document | None]]:
    """Runs the dataset's stages on a document. Yields pairs: a stage's action, and the document after the stage.

    Ends at the stage that drops the document. Also ends at a stage that removed text shared with other documents, because the
    shared text is no longer known.

    An action has `stage`, `did`, `reason`, `detail`, `measures`, `counts`, and `bytes` (before and after the stage). `did` is
    kept, changed, dropped, compared (the stage compares documents), or cut (the stage removes shared text). Raises ConfigError if
    this version of heliostat lacks one of the dataset's stages, or has changed the stage's keys.
    """
    for number, entry in enumerate(made_by["stages"]):
        try:
            stage = registry.parse(entry)
        except ValueError as e:
            raise ConfigError(
                f"the dataset was made with a stage that this version of heliostat doesn't have, or has changed: {e}. "
                "Use the version that made the dataset"
            ) from e
        step: dict[str, Any] = {"stage": tally.label(number, stage), "reason": "", "detail": "", "measures": {}, "counts": {}}
        if isinstance(stage, RepeatingStage):
            yield {**step, "did": "cut"}, None
            return
        if isinstance(stage, GlobalStage):
            yield {**step, "did": "compared"}, document
            continue
        text, size = document.text, bytes_of(document)
        (outcome,) = stage.open()([document])
        after = outcome.document
        did = "dropped" if after is None else "kept" if after.text == text else "changed"
        step |= {"did": did, "reason": outcome.reason, "detail": outcome.detail, "measures": outcome.measures}
        yield {**step, "counts": outcome.counts, "bytes": [size, bytes_of(after) if after else 0]}, after
        if after is None:
            return
        document = after
