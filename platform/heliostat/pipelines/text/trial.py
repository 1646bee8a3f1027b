"""Prepares a sample of a text input, and predicts from it what the whole would give and take: the funnel, tokens, hours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from heliostat.curation import segment, tally
from heliostat.curation.engine import segments
from heliostat.curation.pieces import Part
from heliostat.curation.stage import GlobalStage
from heliostat.errors import DataError
from heliostat.pipelines.prepare import InputFile
from heliostat.pipelines.text import estimates
from heliostat.pipelines.text.estimates import Share
from heliostat.pipelines.text.making import Making, Totals
from heliostat.pipelines.text.sampling import Sample

SHARD, TOKENIZER = "shard", "tokenizer"
FEW = 400  # documents, of which a share of a half is known to 5 %
HOUR_S = 3600
Funnel = dict[str, dict[str, Any]]


@dataclass
class Trial(Making):
    """Makes a dataset of a sample, and predicts that of the whole."""

    sample: Sample = field(kw_only=True)

    @property
    def explained(self) -> bool:
        return True

    def _pieces(self, inputs: list[InputFile]) -> Iterator[list[Part]]:
        return self.sample.pieces()

    def _log(self, totals: Totals) -> None:
        """Logs nothing: what the sample drops is in the prediction."""

    def predicted(self, inputs: list[InputFile]) -> dict[str, Any]:
        """Returns the prediction as JSON values."""
        rows, meta = self.run(inputs)
        if not rows:
            raise DataError(f"nothing is left of the sample ({meta.get('dropped')}); give a larger one")
        funnel: Funnel = json.loads(self.output.join(meta["curation"]["funnel"]).read())
        repeated = self._repeated(funnel)
        factors = kept_factors(funnel, repeated)
        made = rows_of(funnel, self.sample, [kept_factors(funnel, repeated, which) for which in ("expected", "low", "high")])
        sampled, taken = funnel[SHARD]["kept_bytes"], self.flow.seconds
        hours = {kind: s / HOUR_S for kind, s in self._seconds(factors, sampled, taken).items()}
        waited = {kind: max(taken[kind], wall) for kind, wall in self.flow.walls.items() if kind != TOKENIZER}
        clock = self._seconds(factors, sampled, waited | {k: v for k, v in self.flow.walls.items() if k == TOKENIZER})
        alone = clock.pop(TOKENIZER, 0.0) / HOUR_S
        for row in made:
            row["cpu_hours"] = self._of_stage(row["stage"], factors)
        first = [tally.label(*numbered) for numbered in segments(self.stages)[0]]
        made[0]["cpu_hours"] = hours[segment.READ] - sum(row["cpu_hours"] for row in made if row["stage"] in first)
        total, cpus = sum(hours.values()), self.flow.cpus()
        return {
            "sample": {"fraction": self.sample.fraction, "documents": funnel[segment.READ]["documents"],
                       "bytes": round(self.sample.taken_bytes), "read_bytes": self.sample.read_bytes},
            "input": {"files": len(inputs), "bytes": self.sample.input_bytes},
            "funnel": made,
            "duplicates": {name: vars(share) for name, share in repeated.items()},
            "documents": made[-1]["kept"],
            "tokens": made[-1]["tokens"],
            "cpu_hours": total,
            "wall_hours": sum(clock.values()) / HOUR_S / cpus + alone,
            "cpus": cpus,
            "notes": self._notes(funnel, repeated),
        }  # fmt: skip

    def _repeated(self, funnel: Funnel) -> dict[str, Share]:
        """Estimates the duplicates of each stage that drops documents for others, exact duplicates of the shards among them."""
        found = dict[str, Share]()
        for name, part in funnel.items():
            if "clusters" in part["counts"] or (name == SHARD and not found):  # an exact one is a near one
                dropped, clusters = part["documents"] - part["kept"], part["counts"].get("clusters")
                sizes = [size for size, _ in part.get("largest", [])]
                found[name] = estimates.duplicates(part["documents"], dropped, dropped if clusters is None else clusters, sizes,
                                                   self.sample.of_documents)  # fmt: skip
        return found

    def _seconds(self, factors: dict[str, float], sampled: int, taken: dict[str, float]) -> dict[str, float]:
        """Predicts the seconds of each kind of task from those of the sample; stages are opened as often as there."""
        before = {number: factors[tally.label(number, stage)] for number, stage in enumerate(self.stages)}
        found = {}
        for kind, seconds in taken.items():
            opening, numbered = self.flow.opening.get(kind, 0.0), re.match(r"\w+-(\d+)", kind)
            factor = before[int(numbered[1])] if numbered else 1.0 if kind == segment.READ else factors[SHARD]
            found[kind] = (seconds - opening) * self.sample.of_bytes * factor + opening
        reading = self.counted[segment.READ]["seconds"]
        found[segment.READ] += reading * (self.sample.input_bytes / self.sample.read_bytes - self.sample.of_bytes)
        if TOKENIZER in found:
            most, whole = self.tokenizer["train_bytes"], sampled * self.sample.of_bytes * factors[SHARD]
            found[TOKENIZER] = taken[TOKENIZER] * min(most, whole) / min(most, sampled)
        return found

    def _of_stage(self, name: str, factors: dict[str, float]) -> float:
        seconds = self.flow.seconds["shards"] if name == SHARD else self.counted.get(name, {}).get("seconds", 0.0)
        return seconds * self.sample.of_bytes * factors[name] / HOUR_S

    def _notes(self, funnel: Funnel, repeated: dict[str, Share]) -> list[str]:
        kept, notes = funnel[SHARD]["kept"], list[str]()
        for name, share in repeated.items():
            if share.high - share.low > 0.01:
                notes.append(f"{name}: a sample holds few duplicates of its own documents: {share.seen:.1%} here, "
                             f"{share.expected:.1%} expected of all, {share.low:.1%} to {share.high:.1%} possible")  # fmt: skip
        for number, stage in enumerate(self.stages):
            if isinstance(stage, GlobalStage) and (name := tally.label(number, stage)) not in repeated:
                notes.append(f"{name}: compares all documents, of which a sample holds few; it will drop more of the whole")
        if kept < FEW:
            notes.append(
                f"{kept:,} documents of the sample are kept, so what they are few of is known badly; give a larger share"
            )
        if self.given is None and funnel[SHARD]["kept_bytes"] < self.tokenizer["train_bytes"]:
            notes.append("tokens: the tokenizer is trained on the sample, so it fits that better than one of the whole would")
        return notes


def kept_factors(funnel: Funnel, repeated: dict[str, Share], which: str = "expected") -> dict[str, float]:
    """Computes by what share of the sample's documents at each stage the whole has fewer, as it has more duplicates."""
    found, factor = {}, 1.0
    for name in funnel:
        found[name] = factor
        if name in repeated and repeated[name].seen < 1:
            factor *= (1 - getattr(repeated[name], which)) / (1 - repeated[name].seen)
    return found | {"": factor}  # behind the last


def rows_of(funnel: Funnel, sample: Sample, factors: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Scales the funnel to the whole, with a binomial interval of what each stage leaves of what was read.

    `factors` are `kept_factors` for the expected share of duplicates, and the lowest and highest.
    """
    expected, fewest, most = factors
    read, shard, found = funnel[segment.READ]["documents"], funnel[SHARD], []
    per_byte = shard["counts"]["tokens"] / shard["kept_bytes"]
    pages = max((i for i, name in enumerate(funnel) if name.endswith(" extract")), default=0)
    spread = sample.unknown * estimates.Z * math.sqrt((1 - sample.fraction) / max(1, read))  # of the number read
    names = [name for name in funnel if name != segment.FINISH]
    for place, (name, after) in enumerate(zip(names, [*names[1:], ""], strict=True)):
        part, came, (low, high) = funnel[name], expected[name], estimates.wilson(funnel[name]["kept"], read)
        kept_bytes, times = part["kept_bytes"] * sample.of_bytes * expected[after], sample.of_documents * read
        found.append({
            "stage": name,
            "documents": round(part["documents"] * sample.of_documents * came),
            "bytes": round(part["bytes"] * sample.of_bytes * came),
            "kept": round(part["kept"] * sample.of_documents * expected[after]),
            "kept_low": round(low * times * (1 - spread) * most[after]),
            "kept_high": round(high * times * (1 + spread) * fewest[after]),
            "kept_bytes": round(kept_bytes),
            "tokens": round(kept_bytes * per_byte) if place >= pages else None,
            "dropped": {reason: round(n * sample.of_documents * came) for reason, n in part["dropped"].items()},
        })  # fmt: skip
        if len(part["dropped"]) == 1:  # for others: duplicates among them, of which there are more than the sample's
            found[-1]["dropped"] = dict.fromkeys(part["dropped"], found[-1]["documents"] - found[-1]["kept"])
    return found
