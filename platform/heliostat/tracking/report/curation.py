"""Builds one self-contained HTML page about the curation of a dataset: funnel, histograms, examples, clusters, and contents.

    html = page(gather(manifest))

All text from outside is escaped, and is cut at a maximum length.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from html import escape
from typing import Any
from urllib.parse import urlsplit

from heliostat.curation import reasons, recording
from heliostat.curation.tally import EXAMPLES
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.text import printable
from heliostat.tracking.report import svg
from heliostat.tracking.report.frame import boxes, document, side_by_side, table

log = logging.getLogger(__name__)

SAMPLED = 200_000  # maximum number of documents whose columns are counted: a random sample, the documents with the lowest hashes
TOP = 15  # maximum number of values that are shown per column
TEXT = 600  # maximum characters of an example
WORD = 120  # maximum characters of an id, a value, or a detail
PageData = dict[str, Any]


def gather(dataset: Manifest, hour: float | None = None, currency: str = "") -> PageData:
    """Collects the facts for the page as plain data. `hour`: the price of one core for one hour, in `currency`."""
    return {
        "name": dataset.meta.get("name", dataset.location.name),
        "dataset": str(dataset.location),
        "digest": dataset.digest,
        "shards": len(dataset.paths),
        "funnel": reasons.funnel(dataset),
        "seconds": reasons.seconds(dataset),
        "hour": hour,
        "currency": currency,
        "columns": columns(dataset),
        "recorded_every": recording.every_of(dataset),
    }


def pages(manifests: list[Manifest]) -> Iterator[tuple[str, str]]:
    """Yields (name of the run's artifact, HTML) for each dataset that has a curation record.

    Skips a dataset whose record can't be read, with a warning.
    """
    for dataset in manifests:
        if "curation" not in dataset.meta:
            continue
        try:
            text = page(gather(dataset))
        except (HeliostatError, OSError) as e:
            log.warning(
                "%s: can't read the dataset's curation record, so the run has no page about the dataset (%s)", dataset.location, e
            )
            continue
        yield f"data/{dataset.location.name}-{dataset.digest[:8]}.html", text


def columns(dataset: Manifest) -> PageData:
    """Counts the values of known columns in a random sample. Returns {sampled, counts: {column: {value: [kept, left out]}}}."""
    seen, shapes = 0, dict[str, Counter[tuple[str, bool]]]()
    for part in reasons.ends(dataset):
        if "columns" not in part.column_names:
            break
        part = part.slice(0, SAMPLED - seen)
        for raw, reason in zip(part["columns"].to_pylist(), part["reason"].to_pylist(), strict=True):
            for what, value in facts(json.loads(raw) if raw else {}):
                shapes.setdefault(what, Counter())[value, reason == "kept"] += 1
        seen += len(part)
        if seen >= SAMPLED:
            break
    counts: dict[str, dict[str, list[int]]] = {what: {} for what in shapes}
    for what, numbers in shapes.items():
        for (value, kept), number in numbers.items():
            counts[what].setdefault(value, [0, 0])[0 if kept else 1] += number
    return {"sampled": seen, "counts": counts}


def facts(report: PageData) -> list[tuple[str, str]]:
    """Extracts (kind, value) pairs from a document's columns, which are then counted. The kinds are language, domain, license,
    year, and source."""
    out = [(f"{name}s", str(report[name])) for name in ("language", "license", "source") if report.get(name)]
    try:
        host = urlsplit(str(report.get("url") or "")).hostname
    except ValueError:
        host = None
    out += [("domains", host)] if host else []
    year = str(report.get("date") or "")[:4]
    return out + ([("years", year)] if len(year) == 4 and year.isdecimal() else [])


def page(report: PageData) -> str:
    """Renders the curation page as HTML, from the facts that `gather` returns."""
    funnel = report["funnel"]
    parts = [
        f"<h1>{escape(printable(report['name']))}</h1>",
        f"<p class='muted'>{escape(printable(report['dataset']))}, digest {escape(report['digest'][:12])}</p>",
        _summary(report),
        "<h2>The funnel</h2>",
        _funnel(report),
        *_costs(report),
    ]
    for name, part in funnel.items():
        parts += _stage(name, part)
    parts += _columns(report["columns"], report["recorded_every"])
    return document(report["name"], parts)


def _summary(report: PageData) -> str:
    first, last = report["funnel"]["read"], report["funnel"]["shard"]
    facts = {
        "documents read": f"{first['documents']:,}",
        "documents kept": f"{last['kept']:,} ({_share(last['kept'], first['documents'])})",
        "bytes read": _bytes(first["bytes"]),
        "bytes kept": f"{_bytes(last['kept_bytes'])} ({_share(last['kept_bytes'], first['bytes'])})",
        **({"tokens": f"{last['counts']['tokens']:,}"} if "tokens" in last["counts"] else {}),
        "shards": f"{report['shards']:,}",
    }
    if limits := recording.limits(report["recorded_every"]):
        facts["record of documents"] = limits
    if report["seconds"]:
        spent = sum(report["seconds"].values())
        facts["processor time"] = _time(spent)
        facts |= {"price of the processor time": _price(report, spent)} if report["hour"] else {}
    return f"<dl>{boxes(facts)}</dl>"


def _funnel(report: PageData) -> str:
    funnel, seconds = report["funnel"], report["seconds"]
    total = max(1, funnel["read"]["documents"])
    left, rows = total, list[list[str]]()
    shown = [("read", 1.0, f"{funnel['read']['documents']:,} documents")]
    for name, part in funnel.items():
        if name == "finish":
            gone = sum(part["dropped"].values())
            rows.append([_cut(name), f"{left:,}", f"{left - gone:,}", f"{gone:,}", _share(gone, left), "", "", "", ""])
            left -= gone
            continue
        left, gone, spent = part["kept"], part["documents"] - part["kept"], seconds.get(name)
        speed = f"{part['bytes'] / spent / 1e6:,.1f}" if spent else ""
        time = [f"{spent:,.1f}", speed] if spent is not None else ["", ""]
        price = _price(report, spent) if spent is not None and report["hour"] else ""
        rows.append([_cut(name), f"{part['documents']:,}", f"{part['kept']:,}", f"{gone:,}", _share(gone, part["documents"]),
                     f"{_bytes(part['bytes'])} to {_bytes(part['kept_bytes'])}", *time, price])  # fmt: skip
        shown.append(
            (
                {"read": "readable", "shard": "in shards"}.get(name, f"after {name}"),
                left / total,
                f"{left:,} ({_share(left, total)})",
            )
        )
    head = ["stage", "documents received", "kept", "dropped", "share dropped", "bytes", "CPU seconds", "MB/s per core", "price"]
    return svg.bars("documents left", [(_plain(n), s, t) for n, s, t in shown]) + table(head, rows)


def _costs(report: PageData) -> list[str]:
    if not report["seconds"]:
        return []
    note = f", at {report['hour']:g} {escape(report['currency'])} per core and hour" if report["hour"] else ""
    parts = [(_plain(name), report["seconds"][name]) for name in report["funnel"] if name in report["seconds"]]
    longest = max((spent for _, spent in parts), default=0.0) or 1.0
    rows = [
        (name, spent / longest, f"{_time(spent)}, {spent / max(1e-9, sum(s for _, s in parts)):.1%}") for name, spent in parts
    ]
    return [svg.bars("processor time", rows, "var(--ink2)"), f"<p class='muted'>Seconds of processor time{note}.</p>"]


def _stage(name: str, part: PageData) -> list[str]:
    """Renders one curation stage: the reasons for dropped documents, histograms, clusters, and examples."""
    dropped, counts, what = part.get("dropped", {}), part.get("counts", {}), part.get("what", {})
    came = part.get("documents", 0)
    out = []
    if dropped:
        reasons = sorted(dropped.items(), key=lambda kv: (-kv[1], kv[0]))
        rows = [[_cut(reason), f"{n:,}", _share(n, came), _cut(what.get(reason, ""))] for reason, n in reasons]
        out.append(table(["dropped for", "documents", "share of the documents that reached the stage", "meaning"], rows))
    if counts:
        out.append(f"<p class='muted'>{escape(', '.join(f'{_plain(k)} {n:,}' for k, n in sorted(counts.items())))}</p>")
    limits = part.get("thresholds", {})
    drawn = [
        svg.histogram(_plain(m), bins, _numbers(limits.get(m, []))) for m, bins in sorted(part.get("histograms", {}).items())
    ]
    out += [side_by_side([d for d in drawn if d])] if any(drawn) else []
    if clusters := part.get("largest"):
        rows = [[f"{size:,}", _cut(id)] for size, id in clusters]
        out += ["<h3>The largest clusters</h3>", table(["documents", "the document that was kept"], rows)]
    examples = part.get("examples", {})
    for rule in sorted(examples, key=lambda r: (r.startswith("kept "), r)):
        out.append(_examples(rule, examples[rule]))
    return [f"<h2>{_cut(name)}</h2>", *out] if out else []


def _examples(rule: str, examples: list[Any]) -> str:
    """Renders a rule's examples in a folded block: ids, measures, thumbnails of images, and the beginnings of their texts."""
    kind, _, subject = rule.partition(" ")
    title = f"dropped for {subject}" if kind == "dropped" else f"kept, and close to the limit of {subject}"
    shown = []
    for _, id, text, detail, measures, *thumbnails in examples[:EXAMPLES]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
        line = "; ".join(_cut(x, TEXT) for x in (detail, figures) if x)
        more = " ..." if len(text) > TEXT else ""
        drawn = "".join(f'<p><img alt="" src="data:image/jpeg;base64,{escape(t)}"></p>' for t in thumbnails if t)
        shown.append(f"<p><b>{_cut(id)}</b> <span class='muted'>{line}</span></p>{drawn}"
                     f"<pre>{escape(printable(text[:TEXT], lines=True))}{more}</pre>")  # fmt: skip
    return f"<details><summary>{len(shown)} {_cut(title)}</summary>{''.join(shown)}</details>"


def _columns(report: PageData, every: int) -> list[str]:
    drawn = []
    for what, counts in sorted(report["counts"].items()):
        most = sorted(counts.items(), key=lambda kv: (-kv[1][0], -kv[1][1], kv[0]))[:TOP]
        most = sorted(most) if what == "years" else most
        top = max(1, *(kept for _, (kept, _) in most))
        rows = [(_plain(value), kept / top, f"{kept:,} kept, {gone:,} left out") for value, (kept, gone) in most]
        drawn.append(svg.bars(f"{what}: {len(counts):,}", rows))
    if not drawn:
        return []
    note = f"Counted in {report['sampled']:,} documents" + (
        ", a random sample." if report["sampled"] >= SAMPLED or every != 1 else "."
    )
    return ["<h2>Contents of the dataset</h2>", f"<p class='muted'>{note}</p>", side_by_side(drawn)]


def _numbers(values: list[object]) -> list[float]:
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def _plain(text: str, most: int = WORD) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _cut(text: str, most: int = WORD) -> str:
    return escape(_plain(text, most))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else ""


def _price(report: PageData, seconds: float) -> str:
    cost = seconds / 3600 * report["hour"]
    return f"{cost:,.2f} {report['currency']}" if cost >= 0.01 else f"< 0.01 {report['currency']}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds:,.1f} s"


def _bytes(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size >= u), (1.0, "B"))
    return f"{size / unit:,.1f} {name}" if unit > 1 else f"{size:,.0f} B"
