"""Tests the records of datasets of conversations: each conversation's provenance, and datasets without one of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from heliostat.curation import forget, reasons
from heliostat.curation.conversations.pipeline import ConversationPipeline, PreferencePipeline, RenderedPipeline
from heliostat.curation.text import trace
from heliostat.data import documents, manifest
from heliostat.data.conversations import FACT
from heliostat.data.manifest import Manifest
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.work import Work

from tests.unit import build_conversations
from tests.unit.build_conversations import WORDS
from tests.unit.build_curation import HereFlow
from tests.unit.build_pipeline import make_dataset

LENGTH = 48


class Local(RenderedPipeline):
    """Runs tasks in this process."""

    def flow(self, work: Work | None = None, cluster: Cluster | None = None) -> HereFlow:
        return HereFlow(work or self.worked, again=0)


class Conversations(Local, ConversationPipeline):
    pass


class Preferences(Local, PreferencePipeline):
    pass


def prepared(folder: Path, records: list[dict[str, Any]], pipeline: type[Local] = Conversations, **keys: Any) -> Manifest:
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "tokenizer.json").write_text(build_conversations.tokenizer().to_str())
    tokenizer = {"path": str(folder / "tokenizer.json"), "end_of_document": build_conversations.END}
    usual = {"name": "chats", "input": str(folder / "in"), "output": str(folder / "out"), "tokenizer": tokenizer,
             "template": "chatml", "sequence_length": LENGTH, "chunk_tokens": 300, "shard_bytes": 900}  # fmt: skip
    made = pipeline(**{**usual, **keys})
    made.check()
    return make_dataset(made)


def chats(number: int) -> list[dict[str, Any]]:
    return [{"messages": messages} for messages in build_conversations.conversations(number)]


def held(dataset: Manifest) -> list[tuple[str, int, dict[str, Any]]]:
    """Returns (shard, row group, row) of all rows."""
    rows = []
    for path in dataset.paths:
        file = pq.ParquetFile(Path(dataset.location.path) / path)
        rows += [(path.split("/")[1], group, row) for group in range(file.num_row_groups)
                 for row in file.read_row_group(group).to_pylist()]  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Makes a dataset of conversations with a duplicate, a long conversation that is split, and one without an answer."""
    records = chats(30)
    long = [{"role": role, "content": " ".join(WORDS[n : n + 3])} for n in range(8) for role in ("user", "assistant")]
    records += [records[3], {"messages": long}, {"messages": long[:1]}]
    return prepared(tmp_path_factory.mktemp("made"), records, too_long="split", stages=[{"stage": "length", "min_words": 5}])


def test_the_outcome_of_each_conversation_is_known_with_its_row_or_the_reason(made):
    ends = {row["id"]: row for table in reasons.ends(made) for row in reasons._rows(table)}
    assert len(ends) == 33 and Counter(row["reason"] for row in ends.values()).keys() >= {"kept", "duplicate", "no_answer"}
    owners = {id for _, _, row in held(made) for id in row["ids"]}
    assert owners == {id for id, row in ends.items() if row["reason"] == "kept"}
    for id, row in ends.items():
        traced = trace.trace(made, row)
        assert traced["read"] == {"file": "chats.jsonl", "line": int(id.partition("#")[2])} and traced["notes"] == []
        assert traced["rows"] and traced["end"]["what"], id
        if row["reason"] == "kept":
            assert [(step["stage"], step["did"]) for step in traced["stages"]] == [("read", "kept"), ("0 length", "kept")]
            assert traced["stages"][1]["measures"]["words"] >= 5
            rows = [r for _, _, r in held(made) if id in r["ids"]]
            assert len(traced["shard"]["pieces"]) == len(rows) and traced["columns"]["counts"]["tokens"] == sum(
                length for r in rows for owner, length in zip(r["ids"], r["lengths"], strict=True) if owner == id
            )
    kept = [trace.trace(made, ends[f"chats.jsonl#{number}"])["kept"] for number in (4, 31)]
    assert kept[0] == kept[1] != ""
    long = ends["chats.jsonl#32"]
    assert long["columns"]["counts"]["split"] == 1 and len(documents.pieces(made, long["detail"], long["id"])) > 1


def test_a_changed_input_is_a_note(tmp_path):
    made = prepared(tmp_path, chats(6))
    (tmp_path / "in" / "chats.jsonl").write_text("{}\n" * 6)
    (end,) = trace.find(made, id="chats.jsonl#1")
    traced = trace.trace(made, end)
    assert "the input has changed" in traced["notes"][0] and traced["shard"]["pieces"] and traced["kept"] == "chats.jsonl#1"


@pytest.mark.parametrize("id", ["chats.jsonl#1", "chats.jsonl#2", "chats.jsonl#32"])
def test_a_forgotten_conversation_is_in_no_row_and_no_count_and_no_other_one_moves(made, tmp_path, id):
    """The counts are those of the other rows. Held-out positions stay."""
    output = made.location.ending(f"-{id.partition('#')[2]}")
    target, rows = forget.one(trace.find(made, id=id), "--id")
    forget.check(made, output)
    less = forget.forget(made, target, rows, output)
    assert manifest.read(output).digest == less.digest != made.digest

    def others(dataset: Manifest) -> list[tuple[str, int, str, list[int], list[bool]]]:
        return sorted((shard, row["ids"][i], row["tokens"][sum(row["lengths"][:i]) : sum(row["lengths"][: i + 1])],
                       row["trained"][sum(row["lengths"][:i]) : sum(row["lengths"][: i + 1])])
                      for shard, _, row in held(dataset) for i in range(len(row["ids"])))  # fmt: skip

    assert others(less) == [one for one in others(made) if one[1] != id] != others(made)
    packs = [tuple(i for i in row["ids"] if i != id) for _, _, row in held(made)]
    assert [tuple(row["ids"]) for _, _, row in held(less)] == [pack for pack in packs if pack]
    counts, all_rows = less.meta[FACT]["counts"], [row for _, _, row in held(less)]
    assert counts["tokens"] == sum(len(row["tokens"]) for row in all_rows)
    assert counts["trained"] == sum(sum(row["trained"]) for row in all_rows)
    assert counts["conversations"] == sum(len(row["ids"]) for row in all_rows)
    assert counts["padding"] == len(all_rows) * LENGTH - counts["tokens"] >= 0
    assert counts == reasons.funnel(less)["shard"]["counts"]
    assert less.meta["documents"] == made.meta["documents"] - 1 == reasons.funnel(less)["shard"]["kept"]
    split = trace.find(made, id=id)[0]["columns"]["counts"].get("split", 0)
    assert counts["split"] == made.meta[FACT]["counts"]["split"] - split and (split or id != "chats.jsonl#32")
    places = {one: place for _, place, one in _places(made)}
    assert all(places[one] == place for _, place, one in _places(less))
    assert trace.trace(less, trace.find(less, id=id)[0])["end"]["reason"] == "forgotten"


def _places(dataset: Manifest) -> list[tuple[str, int, str]]:
    """Returns (shard, hold-out position, id) of all conversations."""
    chunks, listed = dataset.chunks.select(["path", "row_group"]).to_pylist(), []
    for chunk, place in zip(chunks, dataset.places.tolist(), strict=True):
        table = pq.ParquetFile(Path(dataset.location.path) / chunk["path"]).read_row_group(chunk["row_group"])
        listed += [(chunk["path"], place, id) for ids in table["ids"].to_pylist() for id in ids]
    return listed


def test_the_counts_without_a_conversation_are_those_of_a_dataset_prepared_without_it(tmp_path):
    records = chats(20)
    made = prepared(tmp_path / "all", records)
    (end,) = trace.find(made, id="chats.jsonl#20")
    less = forget.forget(made, "chats.jsonl#20", [end], made.location.ending("-less"))
    again = prepared(tmp_path / "less", records[:-1])
    names = made.meta[FACT]["counts"].keys() - {"padding"}  # packs aren't made again
    assert {name: less.meta[FACT]["counts"][name] for name in names} == {name: again.meta[FACT]["counts"][name] for name in names}
    assert (less.meta["documents"], less.meta["bytes"]) == (again.meta["documents"], again.meta["bytes"])


def test_a_pair_is_traced_and_forgotten(tmp_path):
    drawn = random.Random(1)
    pairs = [{"prompt": " ".join(drawn.sample(WORDS, 4)), "chosen": drawn.choice(WORDS), "rejected": "no"} for _ in range(12)]
    made = prepared(tmp_path, [*pairs, {**pairs[0], "rejected": pairs[0]["chosen"]}], Preferences)
    (end,) = trace.find(made, id="chats.jsonl#3")
    traced = trace.trace(made, end)
    (piece,) = traced["shard"]["pieces"]
    group = pq.ParquetFile(Path(made.location.path) / traced["shard"]["path"]).read_row_group(piece["row_group"])
    assert group["id"][piece["first"]].as_py() == "chats.jsonl#3" and traced["notes"] == []
    (bad,) = trace.find(made, id="chats.jsonl#13")
    assert (bad["reason"], trace.trace(made, bad)["end"]["what"]) == ("same_answers", "a preference whose answers are equal")
    less = forget.forget(made, "chats.jsonl#3", [end], made.location.ending("-less"))
    assert [row["id"] for _, _, row in held(less)] == [row["id"] for _, _, row in held(made) if row["id"] != "chats.jsonl#3"]
    assert less.meta[FACT]["counts"]["tokens"] == sum(
        len(row[name]) for _, _, row in held(less) for name in ("prompt", "chosen", "rejected")
    )
    assert less.meta[FACT]["counts"]["turns"] == 22 and less.meta[FACT]["counts"]["padding"] == 0
