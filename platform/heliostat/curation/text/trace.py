"""Shows a document's provenance in a dataset: its source file, each stage's action, the kept duplicate, and its shard."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pyarrow.fs import FileType

from heliostat.curation import readers, reasons, registry, segment, tally
from heliostat.curation.chain import bytes_of
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
    """Finds documents by id, URL, or text; returns the fate of each (`reasons.END`). ConfigError if no document matches."""
    if id is not None:
        rows, what = reasons.end_of(dataset, id), f"--id: {id!r}: no document has this id"
        what += ". An id is the path in the input. If a file has several documents, `#line`, `#row` or `#byte` follows the path"
    elif url is not None:
        rows, what = reasons.with_column(dataset, "url", url), f"--url: {url!r}: no document has this url"
    else:
        assert text is not None
        if dataset.kind != "tokens":
            raise ConfigError("--text: the dataset contains images. Pass --id or --url")
        hashes, fate = _hashes(dataset, text)
        rows = [row for digest in hashes for row in reasons.kept_as(dataset, digest)]
        what = f"--text: no document has this text, neither as given nor after the stages{fate}"
    if not rows:
        raise ConfigError(f"{what} ({dataset.location})")
    return sorted(rows, key=lambda row: row["id"])


def _hashes(dataset: Manifest, raw: bytes) -> tuple[list[str], str]:
    """Computes the hashes under which a text may be stored, and finds the stage that would drop it, if any."""
    by, fate = reasons.made_by(dataset), ""
    document = documents.clean("--text", raw, source_of(by).rules if by else documents.TextRules())
    if isinstance(document, documents.Dropped):
        raise ConfigError(f"--text: not a document: {document.reason} ({documents.REASONS[document.reason]})")
    hashes, last = [_hash(document)], document
    for step, after in stages_again(by, last) if by else ():
        if step["did"] == "cut":
            fate = f". Stage {step['stage']} derives texts from all documents, which --text can't find. Use --id or --url"
        elif after is None:
            fate = f". Stage {step['stage']} would drop it: {step['reason']}"
        last = after or last
    finished = source_of(by).finish(last) if by and not fate else None
    if isinstance(finished, Document):
        hashes.append(_hash(finished))
    return list(dict.fromkeys(hashes)), fate


def _hash(document: Document) -> str:
    assert isinstance(document.text, str)
    return hashlib.sha256(document.text.encode()).hexdigest()


def trace(dataset: Manifest, end: dict[str, Any]) -> dict[str, Any]:
    """Returns a document's provenance, given its fate.

    The result has `id`, `columns`, `read`, `stages`, `end`, `instead` (the steps from the duplicate to the kept document), `kept`
    (the id in the dataset, or null), `shard` (its path and `pieces`), and `notes`.
    """
    funnel, notes = reasons.funnel(dataset), list[str]()
    by, steps = reasons.made_by(dataset), list[dict[str, Any]]()
    try:
        steps = _again(by, end, funnel, notes) if by and end["reason"] not in (CRASHED, UNREAD) else []
    except HeliostatError as e:
        notes.append(str(e))
    if not steps:
        if end["reason"] in (CRASHED, UNREAD):
            notes.append("heliostat doesn't run the stages again, because the document would crash this process too")
        elif dataset.kind == "tokens":
            notes.append("the input has changed, so heliostat doesn't know how the stages changed the document")
        steps = _recorded(funnel, end)
    for step in steps:
        step |= {"what": _meaning(funnel, step), "thresholds": funnel.get(step["stage"], {}).get("thresholds", {})}
    instead, last = _instead(dataset, end)
    kept = last["id"] if last["reason"] == "kept" else None
    path = places.current(dataset, last["detail"]) if kept else None
    pieces_held = places.pieces(dataset, path, last["id"]) if path else []
    return {
        "id": end["id"],
        "images": dataset.kind != "tokens",
        "columns": end["columns"],
        "read": origin(end["id"]),
        "stages": steps,
        "end": {**{k: end[k] for k in ("stage", "reason", "detail", "measures")}, "what": _meaning(funnel, end)},
        "instead": instead,
        "kept": kept,
        "shard": {"path": path, "pieces": [asdict(piece) for piece in pieces_held]} if pieces_held else None,
        "notes": notes,
    }


def _again(by: dict[str, Any], end: dict[str, Any], funnel: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """Runs the document through the stages again. From a stage that removed text shared with other documents, it continues with
    the recorded results. Returns an empty list if the document can't be read."""
    document = read_again(source_of(by), end["id"])
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
        notes.append(f"the input has changed: today, the document would be {today}; in this dataset, it was {then}")
    return steps


def _recorded(funnel: dict[str, Any], end: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the stages from the dataset's record: the stages that the document passed, and the stage that dropped it."""
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
    """Follows a duplicate to the kept document. Returns the steps, each with its cluster, and the fate of the last document."""
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


def source_of(made_by: dict[str, Any]) -> TextSource:
    """Makes the source from which the dataset was read (`reasons.made_by`)."""
    rules = made_by["rules"]
    return TextSource(made_by["input"], documents.TextRules(**{**rules, "columns": tuple(rules["columns"])}))


def origin(id: str) -> dict[str, Any]:
    """Parses an id: the file, and the `line`, `row`, `byte`, or `path` in it if the file has several documents."""
    if match := MEMBER.match(id):
        return {"file": match[1], "path": match[2]}
    path, _, number = id.rpartition("#")
    if not path or not number.isdecimal():
        return {"file": id}
    return {"file": path, readers.numbered(path) or "row": int(number)}


def read_again(source: TextSource, id: str) -> Document | Dropped | None:
    """Reads a document again; None if it no longer exists."""
    base, file = sources.root(source.input), origin(id)["file"]
    alone = base.fs.get_file_info(base.path).type == FileType.File or (file == base.name and clones.is_clone(file))
    part = FilePart("" if alone else file, base.fs.get_file_info((base if alone else base.join(file)).path).size or 0, 0)
    return next((item for item in source.read(part) if item.id == id), None)


def stages_again(made_by: dict[str, Any], document: Document) -> Iterator[tuple[dict[str, Any], Document | None]]:
    """Yields (a stage's action on a document, the document after it).

    Ends at the stage that drops the document. Also ends at a stage that removed text shared with other documents, because the
    shared text is no longer known.

    An action has `stage`, `did`, `reason`, `detail`, `measures`, `counts`, and `bytes` (before and after the stage). `did` is
    kept, changed, dropped, compared (the stage compares documents), or cut (the stage removes shared text). ConfigError if this
    version of heliostat lacks one of the dataset's stages, or has changed the stage's keys.
    """
    for number, entry in enumerate(made_by["stages"]):
        try:
            stage = registry.parse(entry)
        except ValueError as e:
            raise ConfigError(f"the dataset has a stage that this version doesn't have, or has changed: {e}") from e
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
