"""Tests a pipeline's progress display: tasks, documents, MB/s, and an ETA from the finished tasks."""

import io
import logging
from types import SimpleNamespace

import pytest
from heliostat.curation import prepare
from heliostat.curation.watching import PipelineWatch
from heliostat.storage.locations import Location
from heliostat.tasks.flow import BATCH, Task
from heliostat.tasks.progress import Progress
from heliostat.tasks.work import Work
from rich.console import Console

from tests.unit.build_curation import HereFlow, curate


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(progress: Progress, clock: Clock, seconds: float) -> str:
    lines = []
    progress.show = lambda kind, line: lines.append(line)
    clock.now += seconds
    progress.done("read", {"runs": [["a", 100, 5]]}, 3_000_000)
    return lines[-1]


def test_a_line_says_what_is_done_and_when_the_rest_will_be():
    """The ETA depends on bytes: one of five tasks is twice as large as the others."""
    clock = Clock()
    progress = Progress(clock=clock)
    progress.found("read", [{"runs": [["old", 50, 1]]}], [3_000_000] * 4 + [6_000_000], whole=False)
    assert told(progress, clock, 2) == "read 2/6+ tasks  150 documents  1.5 MB/s  1 of them done before"
    progress.found("read", [], [], whole=True)
    assert told(progress, clock, 2) == "read 3/6 tasks  250 documents  1.5 MB/s  ETA 8 s  1 of them done before"
    assert told(progress, clock, 2).endswith("1.5 MB/s  ETA 6 s  1 of them done before")


def test_tasks_that_read_nothing_are_estimated_by_their_number():
    clock = Clock()
    progress = Progress(clock=clock)
    progress.found("ends", [], [0, 0, 0], whole=True)
    lines = []
    progress.show = lambda kind, line: lines.append(line)
    clock.now = 3
    progress.done("ends", {"shards": [{"documents": 7}]}, 0)
    progress.done("ends", {}, 0)
    assert lines == ["ends 1/3 tasks  7 documents  ETA 6 s", "ends 2/3 tasks  7 documents  ETA 2 s"]


def test_every_task_of_a_pipeline_is_counted(tmp_path):
    texts = {f"{i}.txt": f"a document of some words, the number {i}" for i in range(40)}
    stages = [{"stage": "length", "min_words": 3}, {"stage": "minhash"}, {"stage": "length", "max_words": 900}]
    lines = dict[str, list[str]]()
    progress = Progress(lambda kind, line: lines.setdefault(kind, []).append(line))
    _, here = curate(tmp_path / "work", texts, stages, progress=progress)
    assert set(lines) == set(here.done) and all(k.done == k.total == here.done[name] for name, k in progress.kinds.items())
    assert lines["read"][-1].startswith("read 5/5 tasks  40 documents") and progress.kinds["read"].left_bytes == 0
    again = Progress()
    curate(tmp_path / "work", texts, stages, progress=again)
    assert all(k.kept == k.total and not k.done for k in again.kinds.values())


def test_the_total_of_very_many_tasks_is_open_until_they_are_all_looked_up(tmp_path):
    here = HereFlow(Work(Location(str(tmp_path))))
    for tasks, whole in ((2 * BATCH, [False, False, True]), (1, [True]), (0, [True])):
        seen = list[bool]()
        here.progress = Progress()
        here.progress.found = lambda kind, kept, todo, whole, seen=seen: seen.append(whole)  # type: ignore[method-assign]
        assert len(list(here._looked_up("read", (Task(str(i), {}) for i in range(tasks)), lambda r: True))) == tasks
        assert seen == whole


def shown(console: Console, quiet: bool, caplog) -> list[str]:
    clock = Clock()
    with caplog.at_level(logging.INFO, "heliostat"), PipelineWatch(console, "preparing \x1b[2Jx", quiet, clock) as watch:
        for clock.now in (1.0, 16.0, 17.0, 40.0):
            watch.show("read", f"at {clock.now:.0f}")
    return [record.getMessage() for record in caplog.records]


def test_where_there_is_no_terminal_a_line_is_logged_now_and_then(caplog):
    out = io.StringIO()
    lines = shown(Console(file=out), False, caplog)
    assert [line.rpartition(": ")[2] for line in lines] == ["at 16", "at 40"] and "\x1b" not in lines[0] and not out.getvalue()


def test_a_terminal_shows_one_live_line_and_no_log(caplog):
    out = io.StringIO()
    assert shown(Console(file=out, force_terminal=True, width=80), False, caplog) == []
    assert "at 40" in out.getvalue() and "\x1b[2J" not in out.getvalue()


def test_a_long_line_is_cut_at_the_end_of_the_terminal():
    """The live line stays one line, and the least important values are cut."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with PipelineWatch(console, "preparing fineweb", quiet=False) as watch:
        watch.show("read", "read 2/9 tasks  99 documents  0.1 MB/s  ETA 4 min 3 s  1 of them done before")
    assert "ETA 4 min 3 s  1 …" in out.getvalue()


def test_json_shows_nothing(caplog):
    out = io.StringIO()
    assert shown(Console(file=out, force_terminal=True), True, caplog) == [] and not out.getvalue()


@pytest.mark.parametrize(("cores", "cpus"), [(64, 64), (2, 4), (None, 4)])
def test_a_private_ray_has_all_cpus_of_the_machine(monkeypatch, cores, cpus):
    """A machine with few CPUs has four logical ones, because tasks often wait for storage."""
    counts = list[int]()
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(prepare, "connect", lambda cpus: counts.append(cpus))
    monkeypatch.setattr(prepare.private_ray, "ahead", lambda *given: None)
    prepare._start_ray(SimpleNamespace(ray_data=False))
    assert counts == [cpus]
