"""Tests the curation engine: interrupted runs resume, unchanged work isn't repeated, and the result doesn't depend on order or
split."""

import contextlib
import random
from typing import ClassVar

import pytest
from heliostat.curation import chain, engine, registry, tally
from heliostat.curation.pieces import FilePart
from heliostat.curation.segment import load
from heliostat.curation.stage import Document, GlobalStage, Outcome, Stage
from heliostat.errors import HeliostatError
from heliostat.storage.locations import Location
from heliostat.tasks import libraries
from heliostat.tasks.flow import execute
from heliostat.tasks.work import Work, key

from tests.unit.build_curation import KilledError, curate, left, left_out, spelled


class Longer(Stage):
    """Drops documents of few words, and counts calls in `made`."""

    reasons: ClassVar = {"short": "fewer than min_words words"}
    thresholds: ClassVar = {"words": ("min_words",)}
    seen: ClassVar[list[str]] = []
    min_words: int = 100

    @classmethod
    def named(cls) -> str:
        return "longer"

    def open(self):
        def work(documents):
            self.seen.extend(d.id for d in documents)
            return [self.judge(d) for d in documents]

        return work

    def judge(self, document: Document) -> Outcome:
        words = len(document.text.split())
        short = words < self.min_words
        return Outcome(None if short else document, "short" if short else "", measures={"words": words}, counts={"seen": 1})


class Upper(Stage):
    """Changes the text to capitals, in place."""

    @classmethod
    def named(cls) -> str:
        return "upper"

    def open(self):
        def work(documents):
            for document in documents:
                document.text = document.text.upper()
            return [Outcome(d, counts={"done": 1}) for d in documents]

        return work


class Fewer(Stage):
    """Returns fewer outcomes than documents, which is an error."""

    @classmethod
    def named(cls) -> str:
        return "fewer"

    def open(self):
        return lambda documents: []


@pytest.fixture(autouse=True, scope="module")
def own_stages():
    """Registers the stages of this file by their names."""
    real, own = registry.find, {"longer": Longer, "upper": Upper, "fewer": Fewer}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "find", lambda name: own.get(name) or real(name))
        yield


def texts(count: int = 60, seed: int = 0) -> dict[str, str]:
    """Returns texts of 80 to 140 words; every fifth is similar to the one before."""
    rng, made = random.Random(seed), dict[str, str]()
    for i in range(count):
        words = [f"w{spelled(rng.randrange(9999))}" for _ in range(80 + i)]
        if i % 5 == 4:
            words = [*list(made.values())[-1].split(), "more"]
        made[f"{seed}-{i:03d}"] = " ".join(words)
    return made


PIPELINE = [{"stage": "longer"}, {"stage": "minhash"}, {"stage": "upper"}]


def test_stages_run_in_their_order(tmp_path):
    given = texts()
    found, here = curate(tmp_path, given, PIPELINE)
    kept, gone = left(found, here), left_out(found, here)
    assert kept and all(kept[id] == given[id].upper() for id in kept) and kept.keys() | gone.keys() == given.keys()
    short = {id for id, value in given.items() if len(value.split()) < 100}
    assert {id for id, (stage, *_) in gone.items() if stage == "0 longer"} == short
    assert {id for id, (stage, *_) in gone.items() if stage == "1 minhash"} == gone.keys() - short != set()
    assert [[type(s).__name__ for _, s in part] for part in engine.segments([Longer(), *map(registry.parse, PIPELINE)])] == [
        ["Longer", "Longer"], ["MinHash"], ["Upper"]]  # fmt: skip
    assert all(issubclass(type(part[0][1]), GlobalStage) == (n == 1) for n, part in enumerate(
        engine.segments([registry.parse(e) for e in PIPELINE])))  # fmt: skip


@pytest.mark.parametrize(
    ("path", "source", "again"),
    [("a.jsonl.gz", "in", False), ("a.warc", "in", False), ("a.warc.gz", "in", True), ("", "in/a.wet.gz", True)],
)
def test_an_interrupted_run_reads_archives_again_after_their_reader_changed(path, source, again):
    """Earlier versions dropped pages at the end of a block. The records of their other tasks are still valid."""
    part = FilePart(path, 9, 9)
    stages = engine.StageEngine(None, None, [source], 1 << 30)
    (task,) = stages._over_pieces([[part]], [], True)
    versions = libraries.versions(libraries.READING)
    before = key("read", [source], versions, [], stages.run_bytes, True, [part.identity])
    assert (before in (task.key, task.before)) != again


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return curate(tmp_path_factory.mktemp("whole"), texts(), PIPELINE, seed=1)


@pytest.mark.parametrize("most", [0, 1, 3, 6, 8, 11, 13, 14, 15, 18])
def test_a_run_that_was_killed_goes_on_and_does_nothing_twice(tmp_path, most, unbroken):
    """The run is killed after any number of tasks, several times. The documents are the same, and so is the number of tasks."""
    whole, there = unbroken
    total = sum(there.done.values())
    assert total > 18
    with pytest.raises(KilledError):
        curate(tmp_path / "cut", texts(), PIPELINE, seed=2, most=most)
    with contextlib.suppress(KilledError):
        curate(tmp_path / "cut", texts(), PIPELINE, seed=3, most=4)
    found, here = curate(tmp_path / "cut", texts(), PIPELINE, seed=4)
    assert found.runs == whole.runs and found.reasons == whole.reasons and sorted(found.left_out) == sorted(whole.left_out)
    assert left(found, here) == left(whole, there)
    assert sum(here.done.values()) <= total - most and sum(here.done.values()) + sum(here.kept.values()) == total


def test_what_is_finished_is_not_done_again(tmp_path):
    found, first = curate(tmp_path, texts(), PIPELINE)
    Longer.seen.clear()
    again, here = curate(tmp_path, texts(), PIPELINE, seed=9)
    assert not here.done and here.kept == first.done and not Longer.seen
    assert (again.runs, sorted(again.left_out), again.reasons, again.examples) == (
        found.runs,
        sorted(found.left_out),
        found.reasons,
        found.examples,
    )


def test_a_task_whose_answer_was_lost_is_not_done_again(tmp_path):
    """Ray runs a task again if its worker died between the record and the answer. A later run decides for itself."""
    work, ran = Work(Location(str(tmp_path))), list[int]()

    def task(folder: Location, number: int) -> dict[str, object]:
        ran.append(number)
        return {"number": number, "files": []}

    first = execute(work, "one", "kind", "key", task, {"number": 1})
    assert execute(work, "one", "kind", "key", task, {"number": 1}) == first and ran == [1]
    execute(work, "two", "kind", "key", task, {"number": 1})
    (tmp_path / "done/kind/key.json").write_text("{cut")
    execute(work, "two", "kind", "key", task, {"number": 1})
    assert ran == [1, 1, 1]


def test_a_changed_stage_redoes_what_follows_from_it(tmp_path):
    curate(tmp_path, texts(), PIPELINE)
    Longer.seen.clear()
    _, here = curate(tmp_path, texts(), [PIPELINE[0], {"stage": "minhash", "keep": "first"}, PIPELINE[2]])
    assert not Longer.seen, "what comes before is not done again"
    kinds = ("sign", "meet", "edges", "large", "small", "members")
    assert all(f"minhash-1-{kind}" not in here.done for kind in kinds), "neither are the signatures, which do not follow from it"
    assert here.done["minhash-1-choose"] == 1 and here.done["stages-2"] > 0
    _, there = curate(tmp_path, texts(), [{"stage": "longer", "min_words": 101}, *PIPELINE[1:]])
    assert there.done["read"] == 5


def test_new_input_is_only_its_own_work(tmp_path):
    old, new = texts(), texts(40, seed=1)
    curate(tmp_path, old, PIPELINE)
    Longer.seen.clear()
    both, here = curate(tmp_path, old, PIPELINE)
    assert not here.done
    more = old | new
    dealt = [*[list(old)[i::5] for i in range(5)], list(new)]
    whole, there = curate(tmp_path, {id: more[id] for part in dealt for id in part}, PIPELINE, pieces=dealt)
    assert set(Longer.seen) == set(new) and there.done["read"] == 1 and there.kept["read"] == 5
    assert there.done["minhash-1-sign"] == 1
    fresh, elsewhere = curate(tmp_path / "fresh", more, PIPELINE, pieces=3)
    assert left(whole, there) == left(fresh, elsewhere) and both != whole


def test_a_record_without_its_files_counts_for_nothing(tmp_path):
    found, _ = curate(tmp_path, texts(), PIPELINE[:1])
    lost = found.runs[2].name
    (tmp_path / "spill" / lost).unlink()
    (next((tmp_path / "done" / "read").glob("*.json"))).write_text('{"cut')
    again, here = curate(tmp_path, texts(), PIPELINE[:1])
    assert 1 <= here.done["read"] <= 2 and again.runs == found.runs and (tmp_path / "spill" / lost).exists()


def test_runs_are_no_larger_than_their_share_of_memory(tmp_path):
    given = texts(200)
    found, here = curate(tmp_path, given, [], pieces=1, memory_limit=1 << 17)
    assert len(found.runs) > 5 and max(run.bytes for run in found.runs) <= (1 << 17) // engine.RUN_SHARE
    assert left(found, here) == given and sum(run.rows for run in found.runs) == 200


def test_the_funnel_counts_what_stages_did(tmp_path):
    """The counts are the same for any split of the input, except for the seconds."""
    given = texts()
    summed = []
    for pieces in (1, 7):
        found, here = curate(tmp_path / str(pieces), given, PIPELINE, pieces=pieces)
        total = engine.summed(here, [*found.tallies] * 40)
        total = engine.summed(here, [*found.tallies])
        assert sorted(total) == ["0 longer", "1 minhash", "2 upper", "read"]
        assert all(part.pop("seconds") > 0 for part in total.values())
        summed.append(total)
    assert summed[0] == summed[1]
    read, longer, minhash, upper = (summed[0][name] for name in ("read", "0 longer", "1 minhash", "2 upper"))
    assert read["documents"] == read["kept"] == 60 and read["bytes"] == longer["bytes"]
    assert longer["documents"] == 60 and longer["kept"] == minhash["documents"] and minhash["kept"] == upper["documents"]
    assert longer["dropped"] == {"short": 60 - longer["kept"]} and longer["counts"] == {"seen": 60}
    assert longer["bytes"] == sum(map(len, given.values())) and upper["bytes"] == upper["kept_bytes"]
    assert sum(kept for kept, _ in longer["histograms"]["words"].values()) == longer["kept"]
    assert sum(dropped for _, dropped in longer["histograms"]["words"].values()) == longer["dropped"]["short"]
    rules = longer["examples"]
    assert set(rules) == {"dropped short", "kept words"} and all(len(e) <= tally.EXAMPLES for e in rules.values())
    assert all(100 <= e[4]["words"] <= 110 for e in rules["kept words"]), "only just kept"
    assert minhash["largest"] and minhash["counts"]["clusters"] == len(minhash["largest"])
    assert all(size > 1 and id in given for size, id in minhash["largest"])
    assert load(here.work.spill, next(iter(found.tallies)))


def test_a_stage_that_loses_documents_is_an_error(tmp_path):
    with pytest.raises(HeliostatError, match="stage '0 fewer' returned 0 outcomes for 12 documents"):
        curate(tmp_path, texts(), [{"stage": "fewer"}])


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.01234, "0.012"), (-123456.0, "-120000"), (99.6, "100")])
def test_two_digits(value, text):
    assert f"{tally.rounded(value):.6g}" == text


@pytest.mark.parametrize(("raw", "message"), [
    ({"stage": "minhsh"}, "'minhsh' isn't a stage. Did you mean 'minhash'"),
    ({"min_words": 3}, "stage: required key missing. Write stage: NAME"),
    ({"minhash": {"bands": 3}}, "stage: required key missing. Write stage: minhash"),
    (3, "Write {stage: NAME, KEY: VALUE}"),
    ("minhash", "expected a mapping, got 'minhash'. Write {stage: minhash}"),
    ({"stage": "longer", "min_word": 3}, "longer: min_word: unknown key. Did you mean 'min_words'"),
    ({"stage": "longer", "min_words": "x"}, "longer: min_words: expected an integer, got 'x'. Write min_words: INTEGER"),
])  # fmt: skip
def test_what_is_wrong_with_a_stage_is_said(raw, message):
    with pytest.raises(ValueError) as e:
        registry.parse(raw)
    assert message in str(e.value)


def test_a_worker_opens_a_stage_again_whose_list_is_another_in_the_same_place(tmp_path):
    """A later prepare may reuse the process of an idle worker. An unchanged list is read only once."""
    words, texts = tmp_path / "words.txt", {"a": "some apples here", "b": "some pears there"}
    stages = [{"stage": "bad_words", "lists": [str(words)]}]
    for time, (word, stays) in enumerate([("apples", "b"), ("pears", "a"), ("pears", "a")]):
        words.write_text(word)
        before = chain._opened.cache_info().misses
        assert set(left(*curate(tmp_path / str(time), texts, stages, 2))) == {stays}
        assert chain._opened.cache_info().misses - before == (time < 2)
