"""Makes a dataset of pairs: reads and curates as for text, trains the tokenizer if there is to be one, and writes the shards."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heliostat.curation import tally
from heliostat.curation.engine import RUN_SHARE, Curated, StageEngine
from heliostat.curation.pairs import extracting, reading
from heliostat.curation.pairs.reading import PairSource
from heliostat.curation.pairs.shards import PairSharding, write_shards
from heliostat.curation.prepare import InputFile
from heliostat.curation.text import documents, sources, tokens
from heliostat.curation.text.making import Reading
from heliostat.curation.text.tasks import bounds
from heliostat.data import versions
from heliostat.data.manifest import FILES, SHARDS
from heliostat.tasks import merging
from heliostat.tasks.flow import Task
from heliostat.tasks.work import key

log = logging.getLogger(__name__)


@dataclass
class PairMaking(Reading):
    """Makes the dataset of one pipeline; the fields are its keys."""

    shard_bytes: int
    chunk_pairs: int

    def run(self, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Writes everything but the manifest, and returns its rows and metadata."""
        source = self.source
        assert isinstance(source, PairSource)
        identity = [source.input, vars(source.rules), source.query_column, vars(source.least), extracting.VERSION]
        curated = StageEngine(self.flow, source, identity, self.memory_limit).curate(self._pieces(inputs), self.stages, False)
        self._log(curated)
        meta: dict[str, Any] = {"kind": "rows", "dropped": dict(sorted(curated.reasons.items())), "listed": self._listed(curated)}
        if not curated.runs:
            return [], meta
        meta |= self._tokenizer(curated) if self.tokenizer else {}
        shards = [shard for record in self._shards(curated) for shard in record["shards"]]
        kinds = sum((Counter(shard["kinds"]) for shard in shards), Counter[str]())
        counts = {name: sum(shard[name] for shard in shards) for name in ("documents", "duplicates", "bytes")}
        facts = {"kinds": dict(sorted(kinds.items())), **counts}
        return [chunk for shard in shards for chunk in shard["chunks"]], {**meta, **facts}

    def _tokenizer(self, curated: Curated) -> dict[str, Any]:
        definition = self.given if self.given is not None else self._train(curated)
        made = tokens.load(definition)
        return {
            "files": {"tokenizer.json": versions.store(self.output, f"{FILES}/tokenizer-", definition.encode(), ".json")},
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "vocab_size": made.get_vocab_size(),
            "end_of_document": tokens.end_id(made, self.tokenizer["end_of_document"]),
        }

    def _shards(self, curated: Curated) -> Iterator[dict[str, Any]]:
        plan = PairSharding(self.output.uri, max(1, round(curated.bytes / self.shard_bytes)), self.chunk_pairs)
        each, shared = curated.bytes // plan.shards, self.flow.share(plan)
        ranges = merging.merged(self.flow, curated.runs, plan.shards,
                                lambda first, stop: bounds(first, plan.shards, stop), self.memory_limit // RUN_SHARE)  # fmt: skip

        def work() -> Iterator[Task]:
            for part in ranges:
                follows = key("pairs", [[run.name, run.decided] for run in part.runs], vars(plan))
                given = {"runs": self.flow.share(part.runs), "plan": shared}
                for n in range(part.first, part.stop):
                    yield Task(key(follows, n), {"first": n, "stop": n + 1}, given, each)

        there = dict(self.output.join(SHARDS).files())

        def whole(record: dict[str, Any]) -> bool:
            return all(there.get(s["path"].removeprefix(f"{SHARDS}/")) == s["file_bytes"] for s in record["shards"])

        yield from self.flow.all("shards", write_shards, work(), valid=whole)

    def _log(self, curated: Curated) -> None:
        """Logs what was left out, by reason, with examples."""
        of_stages = {f"{tally.label(i, s)}: {r}": f"{s.named()}: {w}" for i, s in enumerate(self.stages)
                     for r, w in s.reasons.items()}  # fmt: skip
        told = documents.REASONS | reading.REASONS | of_stages
        for reason, count in sorted(curated.reasons.items()):
            log.warning("dropped %d: %s, such as %s", count, told.get(reason, reason), sources.examples(curated.examples[reason]))
