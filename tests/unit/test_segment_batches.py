"""Tests what a segment does with a batch of documents: it processes again only what a stage has changed."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from heliostat.curation import registry
from heliostat.curation.chain import Chain, bytes_of
from heliostat.curation.segment import Collecting, Spiller
from heliostat.curation.stage import Document, Dropped, Outcome, Stage
from heliostat.storage.locations import Location
from heliostat.tasks.work import key


class Marking(Stage):
    """Appends a mark to each text with a `+`, in place or in a new document. Drops each text with a `-`."""

    reasons: ClassVar = {"minus": "a minus"}
    in_place: bool = True

    @classmethod
    def named(cls) -> str:
        return "marking"

    def open(self):
        return lambda documents: [self.mark(document) for document in documents]

    def mark(self, document: Document) -> Outcome:
        if "-" in document.text:
            return Outcome(None, "minus")
        if "+" in document.text and self.in_place:
            document.text += "é"
        elif "+" in document.text:
            document = Document(document.id, f"{document.text}é", document.columns)
        return Outcome(document)


@dataclass
class FinishCounter:
    """Drops finished texts that are longer than `most` characters, and lists the ids that it finishes."""

    by_text: bool
    most: int = 12
    ids: list[str] = field(default_factory=list)

    def finish(self, document: Document) -> Document | Dropped:
        self.ids.append(document.id)
        return document if len(document.text) <= self.most else Dropped(document.id, "too_long")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_text_is_finished_again_only_if_a_stage_changed_it(tmp_path, in_place, monkeypatch):
    monkeypatch.setattr(registry, "find", lambda name: Marking)
    texts = [f"{sign}{'öa'[n % 2] * (n % 13)}" for n, sign in enumerate(["+", "", "-", "", "+"] * 40)]
    entry = {"stage": "marking", "in_place": in_place}
    stage = registry.parse(entry)
    rows = {}
    for by_text in (True, False):
        chain = Chain(Location(str(tmp_path)), [(stage.entry(), key(stage.follows()), ())] * 2)
        out, source = Spiller(Location(str(tmp_path)), 1 << 20), FinishCounter(by_text)
        Collecting(chain, source, out).batch([Document(str(n), text) for n, text in enumerate(texts)])
        rows[by_text] = out.rows, sorted(out.reasons.items()), chain.tally
        kept = {str(n) for n, text in enumerate(texts) if "-" not in text}
        changed = {id for id in kept if "+" in texts[int(id)]}
        assert set(source.ids) == (changed if by_text else kept)
        marked = [bytes_of(Document(id, texts[int(id)] + "éé" * (id in changed))) for id in kept]
        assert chain.tally["1 marking"]["kept_bytes"] == sum(marked), "sizes follow the changes"
        assert chain.tally["1 marking"]["bytes"] == sum(marked) - 2 * len(changed)
    for counts in (counts for *_, tally in rows.values() for counts in tally.values()):
        counts["seconds"] = 0.0
    assert rows[True] == rows[False]
    assert rows[True][1][0][1] > 0, "some changed texts are too long"
