"""Tests that a stream of any length starts at once and holds little, because its windows are numbered while they are fetched."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
from heliostat.data import stream
from ray.data.datasource import ReadTask

pytestmark = pytest.mark.usefixtures("ray_session")


STANDS_AT = 10


class Noting(stream.Windows):
    """Records its progress as the size of a note."""

    def __init__(self, count: int, note: Path) -> None:
        super().__init__(count, lambda: range(count))
        self.note = note

    def get_name(self) -> str:
        return "Windows"

    def get_read_tasks(self, *arguments: Any, **options: Any) -> list[ReadTask]:
        (task,) = super().get_read_tasks(*arguments, **options)
        note = self.note

        def blocks() -> Iterator[Any]:
            with note.open("ab", buffering=0) as file:
                for block in task():
                    file.write(b".")
                    yield block

        return [ReadTask(blocks, task.metadata)]


def standing(note: Path, still_s: float = 2.0) -> int:
    """Returns the number of windows when no new one has arrived for so long."""
    deadline, seen, since = time.monotonic() + 60, 0, time.monotonic()
    while (now := time.monotonic()) < deadline and (seen < stream.AHEAD or now - since < still_s):
        if (size := note.stat().st_size) != seen:
            seen, since = size, now
        time.sleep(0.1)
    return seen


@pytest.mark.ci
def test_windows_are_numbered_in_order_and_shortly_before_they_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While fetching pauses, so does numbering."""
    made, go_on = tmp_path / "made", tmp_path / "go-on"
    monkeypatch.setattr(stream, "Windows", lambda count, numbers: Noting(count, made))

    def fetch(batch: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while batch["id"][0] == STANDS_AT and not go_on.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return batch

    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        million = stream.numbered(1_000_000, lambda: range(1_000_000), context)
        stage = million.map_batches(fetch, batch_size=1, compute=ray.data.TaskPoolStrategy(size=1))
    parts = stream.split(stage, 1)
    try:
        with closing(iter(parts[0].iter_batches(batch_size=1, prefetch_batches=1))) as rows:
            for number in range(STANDS_AT // 2):  # not all that are fetched: the consumer is a few ahead itself
                assert next(rows)["id"] == number
            before = standing(made)
            assert before >= stream.AHEAD
            time.sleep(6)  # some eighty come in this time if nothing holds them back
            assert made.stat().st_size - before < 20
            go_on.touch()
            for number in range(STANDS_AT // 2, 2 * stream.AHEAD):
                assert next(rows)["id"] == number
    finally:
        stream.end(parts)
