"""Tests a pipeline whose stream loses blocks, fails, or ends early. Recorded tasks do the rest, and all counts stay the same."""

import queue
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from heliostat.curation import gpus, streaming
from heliostat.curation.engine import Curated, StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.registry import parse
from heliostat.curation.segment import LEFT_OUT
from heliostat.curation.stages.fix_text import FixText
from heliostat.curation.streamed import StreamForm, block
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import Work

from tests.unit.build_curation import Given, HereFlow
from tests.unit.test_streamed import STAGES, content, texts

PIECES, RUN_BYTES = 20, 1 << 11


class FailingStream(streaming.RunningStream):
    """Runs a stream's parts in this process. Loses some blocks, delivers some twice and all in any order, and has some errors.
    Ends after some tasks."""

    rng, ends_after = random.Random(), 0

    def __init__(self, flow: Flow, plan: StreamForm) -> None:
        self.flow, self.plan, self.reason = flow, plan, ""
        self.waiting, self.blocks, self.lasts = {}, {}, {}
        self.started = self.done = self.failed = 0
        self.writers, self.writes = ThreadPoolExecutor(1), deque()
        self.received, self.rows = queue.SimpleQueue(), list[dict[str, Any]]()

    def start(self, number: int, task: Task) -> bool:
        read, scorer, arguments, write = self.plan.operators(self.flow.work.spill, None)
        for blocks in read(pa.table({"id": [self.plan.sent(number, task)]})):
            for scored in scorer(*arguments)(blocks):
                for written in write(scored):
                    self.rows += written.to_pylist() * self.rng.choice([0, 1, 1, 1, 1, 2])
        if self.rng.random() < 0.2:
            self.rows += block(number, 0, True, [], [], '{"message": "failed", "final": false}').to_pylist()
        self.waiting[number] = task
        self.started += 1
        self.rng.shuffle(self.rows)
        return True

    def _put(self, item: object) -> bool:
        return True

    def finished(self, wait_s: float):
        self.reason = "ended" if self.started >= self.ends_after or not (wait_s == 0 or self.rows) else ""
        for row in [self.rows.pop() for _ in range(self.rng.randrange(len(self.rows) // 2, 1 + len(self.rows)))]:
            yield from self._take(row)

    def end(self) -> None:
        self.writers.shutdown()


def curated(folder, rng: random.Random) -> tuple[Curated, HereFlow, StageEngine]:
    given = texts(300)
    pieces = [[FilePart(id, len(text), 0) for id, text in list(given.items())[at::PIECES]] for at in range(PIECES)]
    engine = StageEngine(HereFlow(Work(Location(str(folder))), seed=rng.randrange(9)), Given(given), ["given"], 8 * RUN_BYTES, 7)
    return engine.curate(pieces, [parse(entry) for (entry,) in STAGES]), engine.flow, engine


def counts(made: tuple[Curated, HereFlow, StageEngine]) -> tuple[Any, ...]:
    """Returns all that a pipeline shows of its documents: the kept, the dropped, the counts, and the examples."""
    out, flow, engine = made
    rows = spill.joined(flow.work.spill, out.left_out, 0, spill.ALL, LEFT_OUT).sort_by("id").to_pylist()
    runs, reasons, tally = content(engine, out)
    return runs, reasons, tally, rows, out.examples, flow.passed, flow.crashed


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(1, 4))])
def test_a_stream_that_fails_gives_the_files_and_counts_of_recorded_tasks(tmp_path, monkeypatch, seed):
    """Nothing is lost or counted twice. A second run with the same work folder gives the same, too."""
    monkeypatch.setattr(FixText, "gpu", True)
    monkeypatch.setattr(gpus, "awaited", lambda flow, stages: 0)
    plain = counts(curated(tmp_path / "plain", random.Random(seed)))
    monkeypatch.setattr(gpus, "awaited", lambda flow, stages: 1)
    monkeypatch.setattr(streaming, "RunningStream", FailingStream)
    monkeypatch.setattr(FailingStream, "rng", random.Random(seed))
    for ends_after in ([6, 12, 99, 99][seed], 99):
        monkeypatch.setattr(FailingStream, "ends_after", ends_after)
        made = curated(tmp_path / "streamed", random.Random(seed))
        assert counts(made) == plain
        assert list((tmp_path / "streamed/done/stream").iterdir())
