"""Prepares a sample of a text input, and predicts from it what the whole would give and take: the funnel, tokens, hours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from heliostat.curation import pieces
from heliostat.curation.engine import RUN_SHARE, Curated, filled
from heliostat.curation.pieces import FilePart
from heliostat.curation.predicting import SHARD, TOKENIZER, Prediction, Rate, spread_of
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import SampledParts
from heliostat.curation.similar import alike_of
from heliostat.curation.text import rates
from heliostat.curation.text.making import TextMaking, Totals
from heliostat.errors import DataError
from heliostat.tasks import merging, spill
from heliostat.tasks.flow import Task
from heliostat.tasks.work import key


@dataclass
class TextTrial(TextMaking):
    """Makes a dataset of a sample, and predicts that of the whole."""

    sample: SampledParts = field(kw_only=True)
    _left: Curated = field(default_factory=Curated, init=False)

    @property
    def explained(self) -> bool:
        return True

    def _pieces(self, inputs: list[InputFile]) -> Iterator[list[FilePart]]:
        return self.sample.pieces()

    def _log(self, totals: Totals) -> None:
        """Logs nothing: what the sample drops is in the prediction."""

    def curated(self, inputs: list[InputFile]) -> Curated:
        self._left = super().curated(inputs)
        return self._left

    def predicted(self, inputs: list[InputFile]) -> dict[str, Any]:
        """Returns the prediction as JSON values."""
        rows, meta = self.run(inputs)
        if not rows:
            raise DataError(f"nothing is left of the sample ({meta.get('dropped')}); give a larger one")
        funnel = json.loads(self.output.join(meta["curation"]["funnel"]).read())
        spread = spread_of(self.flow, self._left.runs, self.sample.fraction)
        most = None if self.given is not None else int(self.tokenizer["train_bytes"])
        alike = alike_of(self.flow, self.output, meta["curation"]["ends"], funnel, self.sample)
        made = Prediction(self.sample, self.stages, funnel, self.flow, self.counted, spread, alike, most_trained=most,
                          shards_drop_duplicates=True)  # fmt: skip
        made.rate = self._rate(funnel[SHARD], made)
        merges = self._merged(made)
        found = made.told(len(inputs))
        found["notes"] += merges
        if made.rate.high > made.rate.low * 1.01:
            found["notes"].append(f"tokens: the sample's own tokenizer fits it better than that of the whole would: "
                                  f"{made.rate.low:.4f} tokens a byte here, {made.rate.high:.4f} of text that did not train one, "
                                  f"{made.rate.expected:.4f} expected of all")  # fmt: skip
        return found

    def _merged(self, made: Prediction) -> list[str]:
        """Adds what merging the whole's runs will take to the seconds of the sample's tasks, as that of some of the sample's runs
        takes; returns what is to be said of it."""
        runs, most, left = self._left.runs, self.memory_limit // RUN_SHARE, sum(run.bytes for run in self._left.runs)
        factor = made.factors[0]["" if self.together else SHARD]  # exact duplicates are left out with the shards, or regrouping
        whole = left * self.sample.of_bytes * factor
        least = 1 if self.together else pieces.number(self.sample.input_bytes, self.sample.files)
        many, shards = max(least, round(whole / most)), max(1, round(whole / self.shard_bytes))
        times = merging.passes(many, whole, shards, most)
        if not times:
            return []
        if "merge" in self.flow.seconds:
            own = merging.passes(len(runs), left, max(1, round(left / self.shard_bytes)), most)
            more, what = times / max(1, own), "merge"
        else:
            some, what = next(filled(runs, lambda run: run.bytes, 2 * most)), "merging"
            told = {"runs": some, "low": 0, "high": spill.ALL, "run_bytes": most}
            self.flow.all(what, merging.merge, iter([Task(key(what, [[run.name, run.decided] for run in some]), told)]))
            more = times * left / max(1, sum(run.bytes for run in some))
        for counts in (self.flow.seconds, self.flow.walls):
            counts["merge"] = counts[what] * more * factor / made.factors[0][""]
        self.flow.forget("merging")
        how = "once" if times == 1 else f"{times} times"
        return [f"shards: the whole has about {many:,} runs for {shards:,} shards, and merges its runs {how} first; "
                "the time for that is estimated from merging some of the sample's"]  # fmt: skip

    def _rate(self, shard: dict[str, Any], made: Prediction) -> Rate:
        """Estimates the tokens a byte of the whole: those of the sample, if its tokenizer is the whole's."""
        seen = shard["counts"]["tokens"] / shard["kept_bytes"]
        if self.given is not None:
            return Rate(seen, seen, seen)
        runs, config = self._left.runs, self.tokenizer
        task = Task(key("rates", [[run.name, run.decided] for run in runs], config), {"runs": runs, "config": config})
        (halves,) = self.flow.all("rates", rates.halves, iter([task]))
        self.flow.forget("rates")
        trained = min(config["train_bytes"], shard["kept_bytes"])
        made.training_grows = rates.training_grows(self.flow.seconds[TOKENIZER], trained, halves) if halves["trained"] else 1.0
        whole = shard["kept_bytes"] * self.sample.of_bytes * made.factors[0][""]
        return rates.of_whole(seen, shard["kept_bytes"], halves, self.tokenizer["train_bytes"], whole)
