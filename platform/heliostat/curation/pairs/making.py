"""Makes a dataset of pairs: reads and curates as for text, trains the tokenizer if there is to be one, and writes the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from heliostat.curation.engine import Curated
from heliostat.curation.making import Written
from heliostat.curation.pairs import extracting, reading
from heliostat.curation.pairs.reading import PairSource
from heliostat.curation.pairs.shards import PairSharding, write_shards
from heliostat.curation.text import documents
from heliostat.curation.text.making import Reading, identities
from heliostat.tasks.flow import Task
from heliostat.tasks.work import key


@dataclass
class PairMaking(Reading):
    """Makes the dataset of one pipeline; the fields are its keys."""

    meanings: ClassVar = documents.REASONS | reading.REASONS
    recorded: ClassVar = False

    source: PairSource
    chunk_pairs: int

    @property
    def identity(self) -> list[Any]:
        source = self.source
        return [source.input, vars(source.rules), source.query_column, vars(source.least), extracting.VERSION]

    def write(self, curated: Curated) -> Written:
        facts: dict[str, Any] = {}
        if self.tokenizer:
            facts = self.tokenizer_facts(self.definition(curated), self.tokenizer["end_of_document"])
        shards = [shard for record in self._shards(curated) for shard in record["shards"]]
        kinds = sum((Counter(shard["kinds"]) for shard in shards), Counter[str]())
        facts |= {name: sum(shard[name] for shard in shards) for name in ("documents", "duplicates", "bytes")}
        return Written([chunk for shard in shards for chunk in shard["chunks"]], {"kinds": dict(sorted(kinds.items())), **facts})

    def _shards(self, curated: Curated) -> Iterator[dict[str, Any]]:
        plan = PairSharding(self.output.uri, max(1, round(curated.bytes / self.shard_bytes)), self.chunk_pairs)
        each, shared, ranges = curated.bytes // plan.shards, self.flow.share(plan), self.ranges(curated.runs, plan.shards)

        def work() -> Iterator[Task]:
            for part in ranges:
                follows = key("pairs", identities(part.runs), vars(plan))
                given = {"runs": self.flow.share(part.runs), "plan": shared}
                for n in range(part.first, part.stop):
                    yield Task(key(follows, n), {"first": n, "stop": n + 1}, given, each)

        return self.shards(write_shards, work())
