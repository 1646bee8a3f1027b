"""Tests failing tasks: they run again, the faulty document is found and left out, the others are recorded, and the work is
bounded."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from heliostat.curation import careful, engine, registry, segment, tally
from heliostat.curation.engine import Curated, StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.stage import Document, Outcome, Stage
from heliostat.curation.text import trace
from heliostat.errors import ConfigError, HeliostatError
from heliostat.storage.locations import Location
from heliostat.storage.retries import Backoff
from heliostat.tasks import care, crew, flow, ray_cluster, ray_tasks
from heliostat.tasks.clusters import TaskKind
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import Work
from ray.exceptions import WorkerCrashedError

from tests.unit.build_curation import Given, left, left_out
from tests.unit.build_ray import ForkedRay

pytestmark = pytest.mark.ci

DEADLY, WRONG = "DEADLY", "WRONG"


class Fragile(Stage):
    """Dies at a text with DEADLY, raises an error at WRONG, and dies once at the text of each of the `marks`."""

    reasons: ClassVar = {"short": "fewer than 3 words"}
    marks: str = ""
    always: str = ""

    @classmethod
    def named(cls) -> str:
        return "fragile"

    def open(self):
        return lambda documents: [self.judge(d) for d in documents]

    def judge(self, document: Document) -> Outcome:
        mark = Path(self.marks, document.id)
        if self.marks and mark.exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if DEADLY in document.text or self.always == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if WRONG in document.text or self.always == "raise":
            raise ValueError(f"some lines\ncannot make sense of {document.id}")
        short = len(document.text.split()) < 3
        return Outcome(None if short else document, "short" if short else "", counts={"seen": 1})


class Plain(Stage):
    @classmethod
    def named(cls) -> str:
        return "plain"

    def open(self):
        return lambda documents: [Outcome(d, counts={"seen": 1}) for d in documents]


class Unkept(Stage):
    """Makes a column. For one document, its value isn't JSON, which fails when the document is stored."""

    @classmethod
    def named(cls) -> str:
        return "unkept"

    def open(self):
        def outcome(document: Document) -> Outcome:
            times = document.columns.get("times", 0) + 1
            document.columns["times"] = {1: "no", "key": "of JSON"} if WRONG in document.text else times
            return Outcome(document)

        return lambda documents: [outcome(d) for d in documents]


@pytest.fixture
def forked(monkeypatch) -> ForkedRay:
    made, real = ForkedRay(), registry.find
    for module in (ray_cluster, ray_tasks):
        monkeypatch.setattr(module, "ray", made)
    monkeypatch.setattr(
        registry, "find", lambda name: {"fragile": Fragile, "plain": Plain, "unkept": Unkept}.get(name) or real(name)
    )
    monkeypatch.setattr(crew, "PAUSE", Backoff(0.01, 0.01))
    return made


def texts(count: int = 300, **marked: str) -> dict[str, str]:
    made = {f"d{i:03d}": f"words of document {i}" for i in range(count)}
    return made | {id: f"{made[id]} {mark}" for id, mark in marked.items()}


def curate(folder: Path, given: dict[str, str], stages: list[dict[str, Any]], pieces: int = 2, source: Any = None,
           memory_limit: int = 1 << 24) -> tuple[Curated, Flow]:  # fmt: skip
    made = Flow(Work(Location(str(folder))))
    parts = [FilePart(id, len(text), 0) for id, text in given.items()]
    dealt = [parts[i::pieces] for i in range(pieces)]
    curating = StageEngine(made, source or Given(given), ["given"], memory_limit)
    return curating.curate(dealt, [registry.parse(entry) for entry in stages]), made


STAGES = [{"stage": "plain"}, {"stage": "fragile"}]


@pytest.mark.parametrize("marked", [
    {"d077": WRONG}, {"d003": DEADLY, "d005": DEADLY, "d298": DEADLY},
    {"d077": DEADLY, "d079": WRONG},
])  # fmt: skip
def test_a_document_that_crashes_is_left_out_and_all_others_are_kept(tmp_path, forked, marked):
    """The funnel and the list have each document once. The next start does nothing again."""
    given = texts(**marked)
    given["d020"] = "short"
    found, made = curate(tmp_path, given, STAGES)
    gone = left_out(found, made)
    assert left(found, made).keys() == given.keys() - marked.keys() - {"d020"}
    assert gone.keys() == {*marked, "d020"} and sum(run.rows for run in found.runs) == len(given) - len(gone)
    for id, mark in marked.items():
        why = "WorkerCrashedError: " if mark == DEADLY else f"ValueError: cannot make sense of {id}"
        assert gone[id][:2] == ("1 fragile", "crashed") and gone[id][2].startswith(why)
    assert found.reasons == {"crashed": len(marked), "1 fragile: short": 1} and set(found.examples["crashed"]) <= set(marked)
    total = engine.summed(made, sorted(found.tallies))
    read, plain, fragile = (total[name] for name in ("read", "0 plain", "1 fragile"))
    assert read["documents"] == read["kept"] == plain["documents"] == plain["kept"] == fragile["documents"] == len(given)
    assert fragile["kept"] == len(given) - len(gone) and fragile["dropped"] == {"crashed": len(marked), "short": 1}
    assert fragile["bytes"] == sum(map(len, given.values())) and plain["counts"] == {"seen": len(given) - len(marked)}
    again, here = curate(tmp_path, given, STAGES)
    assert not here.done and again.reasons == found.reasons and here.crashed == len(marked)
    assert [p.name for p in tmp_path.glob("notes/*")] == ["libraries.json"]


def test_a_document_that_cannot_be_stored_is_left_out_and_those_before_it_are_stored_once(tmp_path, forked):
    """The batch fails after part of it could have been added. The second attempt starts with the original columns."""
    given = texts(d077=WRONG)
    found, made = curate(tmp_path, given, [{"stage": "unkept"}, {"stage": "plain"}])
    gone = left_out(found, made)
    assert sum(run.rows for run in found.runs) == len(given) - 1 and left(found, made).keys() == given.keys() - {"d077"}
    assert gone.keys() == {"d077"} and gone["d077"][:2] == ("finish", "crashed")
    rows = [row for run in found.runs for t in segment.survivors(made.work.spill, run) for row in t["columns"].to_pylist()]
    assert Counter(rows) == {'{"times": 1}': len(given) - 1}


def test_a_document_at_which_a_process_was_killed_by_chance_is_kept(tmp_path, forked):
    """The kernel kills the process at two documents, once each. Neither document is the cause."""
    given, marks = texts(), tmp_path / "marks"
    marks.mkdir()
    for id in ("d040", "d100"):
        (marks / id).touch()
    found, made = curate(tmp_path / "work", given, [{"stage": "fragile", "marks": str(marks)}])
    assert left(found, made).keys() == given.keys() and not found.reasons and not list(marks.iterdir())


@pytest.mark.parametrize("always", ["die", "raise"])
def test_a_stage_that_crashes_at_every_document_ends_the_run_soon_with_one_error(tmp_path, forked, always):
    start = time.monotonic()
    with pytest.raises(
        HeliostatError, match=r"^stages: 2\d documents crashed, more than 20 and more than one in 1,000: for example 'd"
    ) as e:
        curate(tmp_path, texts(1500), [{"stage": "fragile", "always": always}], pieces=30)
    assert e.value.exit_code == 1 and "\n" not in str(e.value)
    assert len(forked.started) < (120 if always == "die" else 20) and time.monotonic() - start < 60


@dataclass(frozen=True)
class Breaking(Given):
    """Reads parts with many documents. At one document, reading ends the process or raises an error."""

    how: Callable[[], None] = lambda: None

    def read(self, part: FilePart) -> Iterator[Document]:
        for i in range(100 if part.path == "d004" else 1):
            if part.path == "d004" and i == 70:
                self.how()
            yield Document(f"{part.path}#{i}", "three words each")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fault() -> None:
    raise RuntimeError("a bug of a reader")


@pytest.mark.parametrize(("how", "why"), [(killed, "WorkerCrashedError"), (fault, "RuntimeError: a bug of a reader")])
def test_a_file_that_cannot_be_read_costs_what_comes_after_in_it_and_says_so(tmp_path, forked, caplog, how, why):
    given = texts(200)
    found, made = curate(tmp_path, given, STAGES, source=Breaking(given, how=how))
    kept, gone = left(found, made), left_out(found, made)
    assert len(kept) == 199 + 70 and f"d004#{69}" in kept
    assert gone.keys() == {"d004"} and gone["d004"][:2] == ("read", "unread"), "not one document of many"
    assert gone["d004"][2].startswith(told := f"d004 after row 69 could not be read: {why}") and found.reasons == {"unread": 1}
    (line,) = (m for m in caplog.messages if "could not be read" in m)
    assert line.startswith(f"read: {told}") and ". The rest of this file or range is missing from the dataset. " in line


def test_work_that_was_recorded_without_etags_is_not_done_again(tmp_path, forked):
    """Versions before ETags named a store's read tasks by sizes and times."""
    given = Given(texts(20))
    parts = [[FilePart(id, len(text), 7) for id, text in given.texts.items()]]
    stages = [registry.parse(entry) for entry in STAGES]
    for etag, new in (("", 1), ("abc", 0)):
        made = Flow(Work(Location(str(tmp_path))))
        StageEngine(made, given, ["given"], 1 << 24).curate([[replace(p, etag=etag) for p in piece] for piece in parts], stages)
        assert made.done.get("read", 0) == new
    made = Flow(Work(Location(str(tmp_path))))
    later = [[replace(p, etag="abd", modified=8) for p in piece] for piece in parts]
    StageEngine(made, given, ["given"], 1 << 24).curate(later, stages)
    assert made.done.get("read", 0) == 1


def test_too_many_files_that_cannot_be_read_are_one_error_that_names_one(tmp_path, forked):
    class Unreadable(Given):
        def read(self, part: FilePart) -> Iterator[Document]:
            fault()
            yield from ()

    given = texts(60)
    with pytest.raises(HeliostatError, match=r"than one in 1,000: for example 'd\d+'\. Correct the stage or the input"):
        curate(tmp_path, given, STAGES, pieces=6, source=Unreadable(given))


def work(folder: Location, number: int, ran: str, bad: dict[int, str]) -> dict[str, Any]:
    Path(ran, f"{number}-{time.monotonic_ns()}").touch()
    if (how := bad.get(number)) == "die":
        killed()
    if how == "raise":
        fault()
    if how == "user":
        raise ConfigError("stages: 'x' is not a stage; name one")
    if how == "store":
        raise HeliostatError("the store failed")
    return {"number": number, "files": []}


def ran(folder: Path) -> Counter[int]:
    return Counter(int(p.name.partition("-")[0]) for p in folder.iterdir())


@pytest.mark.parametrize(
    ("how", "times", "error"), [("die", 8, "worker died"), ("raise", 3, "a bug of a reader"), ("store", 1, "the store")]
)
def test_other_tasks_finish_when_one_fails_and_the_next_start_resumes(tmp_path, forked, how, times, error):
    (tmp_path / "ran").mkdir()

    def tasks(bad: dict[int, str]) -> Iterator[Task]:
        yield from (Task(f"{i:032}", {"number": i, "ran": str(tmp_path / "ran"), "bad": bad}) for i in range(20))

    with pytest.raises(Exception, match=error):
        Flow(Work(Location(str(tmp_path / "work")))).all("some", work, tasks({2: how}))
    assert ran(tmp_path / "ran") == {i: times if i == 2 else 1 for i in range(20)}
    again = Flow(Work(Location(str(tmp_path / "work"))))
    assert [r["number"] for r in again.all("some", work, tasks({}))] == list(range(20))
    assert again.kept == {"some": 19} and again.done == {"some": 1}


def test_a_fault_of_many_tasks_ends_the_run_before_all_have_failed(tmp_path, forked):
    (tmp_path / "ran").mkdir()
    bad = dict.fromkeys(range(1000), "raise")
    tasks = (Task(f"{i:032}", {"number": i, "ran": str(tmp_path / "ran"), "bad": bad}) for i in range(1000))
    with pytest.raises(RuntimeError, match="a bug of a reader"):
        Flow(Work(Location(str(tmp_path / "work")))).all("some", work, tasks)
    assert len(ran(tmp_path / "ran")) <= 12


def test_what_a_person_must_change_is_an_error_at_once(tmp_path, forked):
    (tmp_path / "ran").mkdir()
    tasks = (Task(f"{i:032}", {"number": i, "ran": str(tmp_path / "ran"), "bad": {0: "user"}}) for i in range(1000))
    with pytest.raises(ConfigError, match=r"^stages: 'x' is not a stage; name one$"):
        Flow(Work(Location(str(tmp_path / "work")))).all("some", work, tasks)
    assert ran(tmp_path / "ran")[0] == 1 and len(ran(tmp_path / "ran")) <= 12


def test_tasks_request_fewer_cpus_when_the_node_is_gone_that_had_so_many(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(crew, "LOOK_S", 0.0)
    (tmp_path / "ran").mkdir()
    forked.cpus = [2, 8]
    made = Flow(Work(Location(str(tmp_path / "work"))))
    assert made.cpus_each(1) == 8
    forked.cpus = [2]
    (record,) = made.all("some", work, iter([Task("0" * 32, {"number": 0, "ran": str(tmp_path / "ran"), "bad": {}})]), cpus=8)
    assert record["number"] == 0 and forked.asked[-1]["num_cpus"] == 2


def test_a_task_that_dies_with_another_one_in_its_actor_is_not_given_up_when_that_one_finds_its_documents(tmp_path, forked):
    """Tasks wait in an actor for the one that ends its process, for any number of its documents that do so."""
    made = crew.Crew(Flow(Work(Location(str(tmp_path)))), TaskKind("read", flow.execute, print))
    made.size = 1
    deadly, other = (crew.Started(n, Task(f"{n:032}", {}, careful=True)) for n in range(2))
    for document in range(4):
        for again in range(3):
            note = made.work.note("read", deadly.task.key)
            taking = careful.Careful(deadly.trouble.care(note))
            taking.note(care.TaskPlace(document, -1, again > 0, f"d{document}" if again else "", "stage" if again else ""))
            made.later.clear()
            made.under_way = {"call": crew.Call([other], 1)} if document == 3 else {}
            for started in (other, deadly):
                made._judge(started, WorkerCrashedError())
    assert len(deadly.trouble.crashed) == 4 and not made.failed and other.trouble.count == 1


def test_the_bound_of_crashed_documents_grows_with_the_input():
    assert [care.most(n) for n in (0, 20_000, 1_000_000)] == [20, 20, 1000]
    assert tally.merge([]) == {}


def test_a_trace_does_not_take_a_document_that_crashed_through_the_stages_again(monkeypatch):
    """The document would end the command's process."""
    monkeypatch.setattr(trace, "read_again", lambda *given: pytest.fail("read again"))
    monkeypatch.setattr(trace.reasons, "made_by", lambda made: {"input": "in", "rules": {"columns": []}, "stages": STAGES})
    dropped = {"what": {"crashed": care.MEANING}}
    monkeypatch.setattr(trace.reasons, "funnel", lambda made: {"read": {}, "0 plain": {}, "1 fragile": dropped, "shard": {}})
    end = {"id": "a.txt", "stage": "1 fragile", "reason": "crashed", "detail": "it died", "measures": {}, "columns": {}}
    told = trace.trace(SimpleNamespace(kind="tokens", meta={}), end)
    assert [step["did"] for step in told["stages"]] == ["came through", "came through", "dropped"]
    assert told["end"]["what"] == care.MEANING and told["notes"] == [
        "heliostat doesn't run the stages again, because the document would crash this process too"
    ]


def test_documents_of_a_task_that_failed_permanently_are_not_counted_for_the_tasks_under_way(tmp_path, forked):
    """Otherwise too many crashed documents would hide the error of the task."""
    made = crew.Crew(Flow(Work(Location(str(tmp_path)))), TaskKind("read", flow.execute, print))
    started = crew.Started(0, Task("k" * 32, {}, careful=True))
    for _ in range(care.BLAMED):
        started.trouble.attempt = 1
        note = {"attempt": 1, "place": asdict(care.TaskPlace(0, -1, True, "d", "s"))}
        made.work.note("read", started.task.key).write(json.dumps(note).encode())
        made._judge(started, WorkerCrashedError())
    assert made.crashed == 1
    for _ in range(crew.TRIES):
        made._judge(started, ValueError("no"))
    assert len(made.failed) == 1 and made.crashed == 0
