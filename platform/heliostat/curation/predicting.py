"""Predicts the result and the cost for the whole input from a run on a sample: the funnel, tokens, hours, and their bounds."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from heliostat.curation import estimates, segment, tally
from heliostat.curation.comparing import counted
from heliostat.curation.engine import segments
from heliostat.curation.estimates import DuplicateShare
from heliostat.curation.sampled import SampledParts
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.curation.stage import GlobalStage, Stage
from heliostat.storage.locations import Location
from heliostat.tasks import cpu_time, spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

SHARD, TOKENIZER = "shard", "tokenizer"
FEW = 400  # number of documents with which a share of one half is known within 5 %
GOOD = 0.1  # maximum relative error of bytes and tokens without a note
HOUR_S = 3600
GROUP = 64  # runs that a task measures
SMALL_FILES = 4  # temporary files that a task writes or reads, in addition to its documents
WHICH = ("expected", "low", "high")
Funnel = dict[str, dict[str, Any]]
ROWS = 100_000  # dropped documents that a task counts: about 500 bytes of memory each
EXACT = "exact"  # stands in for a stage's name in the fates of exact duplicates
Alike = tuple[dict[int, int], dict[int, int]]
"""Two counts of duplicates. The first maps the number of documents that a cluster has in one place (2 or more) to how often
this number occurs. The second maps the number of places in which a cluster has documents (2 or more) to how often this number
occurs."""


@dataclass(frozen=True)
class Rate:
    """Holds the tokens per byte of the whole input: the expected value and bounds."""

    expected: float
    low: float
    high: float


@dataclass
class Prediction:
    """Predicts the result for the whole input from a run on a sample. Uses the funnel of this run, the CPU seconds of its tasks
    (`flow`), and the CPU seconds of the stages (`counted`)."""

    sample: SampledParts
    stages: list[Stage]
    funnel: Funnel
    flow: Flow
    counted: tally.Tally
    spread: float
    """Relative standard error of the kept bytes."""
    fixed: float
    """CPU seconds of each task that don't grow with its documents."""
    duplicates: dict[str, Alike]
    """Counts of duplicates for each stage that compares documents. The key for the shards' exact duplicates is `exact`."""
    rate: Rate | None = None
    most_trained: int | None = None
    """Maximum bytes of text for training a tokenizer; None: all text."""
    training_grows: float = 1.0
    """Exponent of the growth of a tokenizer's training time with the size of its text."""
    shards_drop_duplicates: bool = False
    """Whether the tasks that write shards drop exact duplicates, as they do for text."""

    def __post_init__(self) -> None:
        self.repeated = self._repeated()
        self.factors = [kept_factors(self.funnel, self.repeated, which) for which in WHICH]

    def report(self, files: int) -> dict[str, Any]:
        rows, hours = self._rows(), self._hours(self.factors[0], self.flow.seconds)
        total, cpus = sum(hours.values()), self.flow.cpus()
        last, spread = rows[-1], estimates.Z * self.spread
        waited = {
            kind: wall if kind == TOKENIZER else max(self.flow.seconds[kind], wall) for kind, wall in self.flow.walls.items()
        }
        clock = self._hours(self.factors[0], waited)
        alone = clock.pop(TOKENIZER, 0.0)  # training the tokenizer uses all CPUs at once
        few, many = (sum(self._hours(self.factors[i], self.flow.seconds).values()) for i in (2, 1))  # most, fewest duplicates
        report = {
            "sample": {"fraction": self.sample.fraction, "documents": self.funnel[segment.READ]["documents"],
                       "bytes": round(self.sample.taken_bytes), "read_bytes": self.sample.read_bytes},
            "input": {"files": files, "bytes": self.sample.input_bytes},
            "funnel": rows,
            "duplicates": {name: vars(share) for name, share in self.repeated.items()},
            "documents": last["kept"],
            "tokens": last["tokens"],
            "cpu_hours": total,
            "cpu_hours_low": few * max(0.0, 1 - spread),
            "cpu_hours_high": many * (1 + spread),
            "wall_hours": sum(clock.values()) / cpus + alone,
            "cpus": cpus,
            "notes": self._notes(),
        }  # fmt: skip
        least, most = (last["kept_bytes"] * self.factors[i][""] / self.factors[0][""] for i in (2, 1))
        least, most = least * max(0.0, 1 - spread), most * (1 + spread)
        report |= {"bytes": last["kept_bytes"], "bytes_low": round(least), "bytes_high": round(most)}
        if self.rate and last["tokens"] is not None:
            report |= {"tokens_low": round(least * self.rate.low), "tokens_high": round(most * self.rate.high)}
        return report

    def _rows(self) -> list[dict[str, Any]]:
        rows = rows_of(self.funnel, self.sample, self.factors, self.rate.expected if self.rate else None)
        hours = self._hours(self.factors[0], self.flow.seconds)
        for row in rows:
            row["cpu_hours"] = self._of_stage(row["stage"], hours)
        first = [tally.label(*numbered) for numbered in segments(self.stages)[0]]
        rows[0]["cpu_hours"] = max(0.0, hours[segment.READ] - sum(row["cpu_hours"] for row in rows if row["stage"] in first))
        return rows

    def _repeated(self) -> dict[str, DuplicateShare]:
        """Estimates the duplicates for each stage that compares documents, and for shards that drop exact duplicates."""
        shares = dict[str, DuplicateShare]()
        for name, part in self.funnel.items():
            if "clusters" in part["counts"] or (name == SHARD and self.shards_drop_duplicates and not shares):
                # shards count only if no stage compares documents, because exact duplicates are near-duplicates
                groups, places = self.duplicates.get(EXACT if name == SHARD else name, ({}, {}))
                rate = self.sample.taken_bytes / self.sample.read_bytes
                shares[name] = estimates.duplicates_by_place(part["documents"], groups, places, rate, self.sample.of_documents)
        return shares

    def _hours(self, factors: dict[str, float], taken: dict[str, float]) -> dict[str, float]:
        """Predicts the hours of each kind of task for the whole input. `taken`: the seconds of each kind in the run on the
        sample. `factors`: a result of `kept_factors`."""
        before = {number: factors[tally.label(number, stage)] for number, stage in enumerate(self.stages)}
        hours, sample = {}, self.sample
        for kind, seconds in taken.items():
            fixed = self.fixed * (self.flow.done.get(kind, 0) + self.flow.kept.get(kind, 0))
            once, numbered = min(seconds, self.flow.opening.get(kind, 0.0) + fixed), re.match(r"[a-z]+-(\d+)", kind)
            factor = before[int(numbered[1])] if numbered else 1.0 if kind == segment.READ else factors[""]
            hours[kind] = ((seconds - once) * sample.of_bytes * factor + once) / HOUR_S
        reading = self.counted[segment.READ]["seconds"]
        hours[segment.READ] += reading * (sample.input_bytes / sample.read_bytes - sample.of_bytes) / HOUR_S
        if TOKENIZER in hours and self.most_trained is not None:
            sampled = self.funnel[SHARD]["kept_bytes"]
            most, whole = self.most_trained, sampled * sample.of_bytes * factors[""]
            hours[TOKENIZER] = taken[TOKENIZER] * (min(most, whole) / min(most, sampled)) ** self.training_grows / HOUR_S
        return hours

    def _of_stage(self, name: str, hours: dict[str, float]) -> float:
        """Predicts a stage's hours: those of its own tasks, or if it has none, its share of other tasks (`counted`)."""
        own = "shards" if name == SHARD else "{1}-{0}-".format(*name.split(" ", 1)) if " " in name else name
        if of_tasks := [value for kind, value in hours.items() if kind.startswith(own)]:
            return sum(of_tasks)
        return float(self.counted.get(name, {}).get("seconds", 0.0) * self.sample.of_bytes * self.factors[0][name] / HOUR_S)

    def _notes(self) -> list[str]:
        kept, notes = self.funnel[SHARD]["kept"], list[str]()
        for name, share in self.repeated.items():
            if share.high - share.low > 0.01:
                notes.append(f"{name}: {share.seen:.1%} of the sample's documents are duplicates. Of the whole input, "
                    f"{share.expected:.1%} are expected, and {share.low:.1%} to {share.high:.1%} are possible, because a "
                    "sample has only some of the copies")  # fmt: skip
        for number, stage in enumerate(self.stages):
            if isinstance(stage, GlobalStage) and (name := tally.label(number, stage)) not in self.repeated:
                notes.append(
                    f"{name}: this stage compares all documents. In the whole input, the stage will drop a larger share "
                    "of documents than in the sample"
                )
        if kept < FEW:
            notes.append(f"only {kept:,} documents of the sample are kept, so the estimates are rough. Pass a larger --sample")
        if (known := estimates.Z * self.spread) > GOOD:
            larger = estimates.enough(self.sample.fraction, self.spread, GOOD)
            notes.append(f"the predicted bytes, tokens, and hours have an error of {known:.0%}, because of the number and sizes "
                f"of the kept documents. Pass --sample {larger:.2g} to reduce the error to {GOOD:.0%}")  # fmt: skip
        return notes


def kept_factors(funnel: Funnel, repeated: dict[str, DuplicateShare], which: str = "expected") -> dict[str, float]:
    """Computes a factor for the number of documents at each stage. The whole input has more duplicates than the sample, so it
    keeps a smaller share of its documents."""
    factors, factor = {}, 1.0
    for name in funnel:
        factors[name] = factor
        if name in repeated and repeated[name].seen < 1:
            factor *= (1 - getattr(repeated[name], which)) / (1 - repeated[name].seen)
    return factors | {"": factor}  # the factor after the last stage


def rows_of(
    funnel: Funnel, sample: SampledParts, factors: list[dict[str, float]], per_byte: float | None
) -> list[dict[str, Any]]:
    """Scales the sample's funnel (counts per stage) to the whole input. Adds a 95 % confidence interval to the number of
    documents that each stage keeps.

    `factors`: results of `kept_factors` for the expected, the lowest, and the highest share of duplicates. `per_byte`: tokens per
    byte.
    """
    expected, fewest, most = factors
    read, rows = funnel[segment.READ]["documents"], list[dict[str, Any]]()
    pages = max((i for i, name in enumerate(funnel) if name.endswith(" extract")), default=0)
    spread = sample.unknown * estimates.Z * math.sqrt((1 - sample.fraction) / max(1, read))  # error of the documents read
    names = [name for name in funnel if name != segment.FINISH]
    for place, (name, after) in enumerate(zip(names, [*names[1:], ""], strict=True)):
        part, came, (low, high) = funnel[name], expected[name], estimates.wilson(funnel[name]["kept"], read)
        kept_bytes, times = part["kept_bytes"] * sample.of_bytes * expected[after], sample.of_documents * read
        rows.append({
            "stage": name,
            "documents": round(part["documents"] * sample.of_documents * came),
            "bytes": round(part["bytes"] * sample.of_bytes * came),
            "kept": round(part["kept"] * sample.of_documents * expected[after]),
            "kept_low": round(low * times * max(0.0, 1 - spread) * most[after]),
            "kept_high": round(high * times * (1 + spread) * fewest[after]),
            "kept_bytes": round(kept_bytes),
            "tokens": round(kept_bytes * per_byte) if per_byte is not None and place >= pages else None,
            "dropped": {reason: round(n * sample.of_documents * came) for reason, n in part["dropped"].items()},
        })  # fmt: skip
        if len(part["dropped"]) == 1:  # with several reasons, duplicates change the proportions
            rows[-1]["dropped"] = dict.fromkeys(part["dropped"], rows[-1]["documents"] - rows[-1]["kept"])
    return rows


def spread_of(flow: Flow, runs: list[SpilledRun], fraction: float) -> float:
    """Estimates the relative standard error of the bytes that a sample keeps, if documents are independent.

    The error is large if a few large documents have most of the bytes.
    """
    parts = [runs[first : first + GROUP] for first in range(0, len(runs), GROUP)]
    work = (Task(key("spread", [[run.name, run.decided] for run in part]), {"runs": part}) for part in parts)
    measured = flow.all("spread", squares, work)
    flow.forget("spread")
    bytes, squared = (sum(record[name] for record in measured) for name in ("bytes", "squares"))
    return math.sqrt((1 - fraction) * squared) / bytes if bytes else 0.0


def fixed_seconds(flow: Flow) -> float:
    """Measures the CPU seconds of a task that don't grow with its documents. A sample has tasks of some milliseconds, so these
    seconds are a large part of them. The complete input has about as many tasks, but larger ones."""
    (record,) = flow.all("fixed", small_files, iter([Task(key("fixed"), {})]))
    flow.forget("fixed")
    return float(record["fixed"])


def small_files(folder: Location) -> dict[str, object]:
    """Measures the least CPU seconds for writing and reading SMALL_FILES temporary files of one row."""
    names, seconds = list[str](), list[float]()
    for number in range(SMALL_FILES * SMALL_FILES):
        start = cpu_time.now()
        names.append(spill.write(folder, pa.table({"key": pa.array([number], pa.uint64())})))
        list(spill.read(folder, names[-1]))
        seconds.append(cpu_time.now() - start)
    return {"fixed": SMALL_FILES * min(seconds), "files": names}


def squares(folder: Location, runs: list[SpilledRun]) -> dict[str, object]:
    """Sums the sizes in bytes of the documents in some temporary files, and the squares of these sizes."""
    total, squared = 0, 0.0
    for run in runs:
        for table in survivors(folder, run, columns=["bytes"]):
            sizes = table["bytes"].to_numpy().astype(np.float64)
            total, squared = total + int(sizes.sum()), squared + float((sizes * sizes).sum())
    return {"bytes": total, "squares": squared}


def alike_of(
    flow: Flow, output: Location, ends: list[list[str]], funnel: dict[str, dict[str, Any]], sample: SampledParts
) -> dict[str, Alike]:
    """Counts the duplicates that each comparing stage dropped in a sample, within places and across places (`Alike`). A place is
    a file, or a range of a file."""
    compared = [name for name, part in funnel.items() if "clusters" in part["counts"]]
    stages, parts = [*compared, EXACT], max(1, sum(funnel[name]["documents"] for name in [*compared, "shard"]) // ROWS)
    arguments = {"output": output.uri, "paths": [path for _, path in ends], "stages": stages}
    follows, shared = key(arguments, sample.places), {"places": flow.share(sample.places)}
    work = (Task(key(follows, part, parts), {"part": part, "parts": parts, **arguments}, shared) for part in range(parts))
    counts = [record["alike"] for record in flow.all("alike", count_alike, work)]
    flow.forget("alike")
    return {name: (_summed(one[name][0] for one in counts), _summed(one[name][1] for one in counts)) for name in stages}


def _summed(counts: Iterable[dict[str, int]]) -> dict[int, int]:
    total = sum((Counter(some) for some in counts), Counter[str]())
    return {int(size): number for size, number in total.items()}


def count_alike(folder: Location, part: int, parts: int, output: str, paths: list[str], stages: list[str],
                places: list[str]) -> dict[str, object]:  # fmt: skip
    """Counts the duplicates that each stage dropped. The task counts those in part `part` of `parts` equal parts of all clusters.

    Returns the two counts of `Alike` for each stage.
    """
    by_stage: dict[str, tuple[set[int], list[tuple[int, int]]]] = {name: (set(), []) for name in stages}
    drawn = set(places)
    for path in paths:
        for table in spill.read(Location(output), path):
            table = table.filter(pc.is_in(table["stage"], pa.array(stages)))
            columns = (table[name].to_pylist() for name in ("id", "stage", "reason", "detail"))
            for id, stage, reason, detail in zip(*columns, strict=True):
                who = detail if reason == "duplicate" else detail.rpartition(" (")[0]  # others end with a number
                if (cluster := _hash(who)) % parts == part:
                    firsts, pairs = by_stage[stage]
                    pairs += [(cluster, _hash(place_of(one, drawn))) for one in ((id,) if cluster in firsts else (who, id))]
                    firsts.add(cluster)
    return {"alike": {name: _counted(pairs) for name, (_, pairs) in by_stage.items()}, "files": []}


def place_of(id: str, drawn: set[str]) -> str:
    """Returns the place of a document in the sample, such as a file: the place that is a prefix of the document's id. If no place
    is a prefix, returns the id."""
    ends = (at for at, letter in enumerate(id) if letter in "#/")
    return next((id[:at] for at in ends if id[:at] in drawn), id)


def _hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())


def _counted(pairs: list[tuple[int, int]]) -> tuple[dict[str, int], dict[str, int]]:
    groups = Counter(pairs)
    places = Counter(cluster for cluster, _ in groups)
    return counted(n for n in groups.values() if n > 1), counted(n for n in places.values() if n > 1)
