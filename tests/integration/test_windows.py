"""A stream of any length starts at once and holds little, because its windows are numbered as they are fetched."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
from heliostat.data import stream, windows
from ray.data.datasource import ReadTask

pytestmark = pytest.mark.usefixtures("ray_session")


class Noting(windows.Windows):
    """Notes how far it is."""

    def __init__(self, count: int, note: Path) -> None:
        super().__init__(count)
        self.note = note

    def get_name(self) -> str:
        return "Windows"

    def get_read_tasks(self, *arguments: Any, **options: Any) -> list[ReadTask]:
        (task,) = super().get_read_tasks(*arguments, **options)
        note = self.note

        def blocks() -> Iterator[Any]:
            for number, block in enumerate(task()):
                note.write_text(str(number))
                yield block

        return [ReadTask(blocks, task.metadata)]


def test_windows_are_numbered_in_order_and_shortly_before_they_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, fetched = tmp_path / "made", tmp_path / "fetched"
    monkeypatch.setattr(windows, "Windows", lambda count: Noting(count, made))

    def fetch(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.05)
        fetched.write_text(str(batch["id"][0]))
        return batch

    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        million = windows.numbered(1_000_000, context)
        stage = million.map_batches(fetch, batch_size=1, compute=ray.data.TaskPoolStrategy(size=1))
    parts = stream.split(stage, 1)
    try:
        with closing(iter(parts[0].iter_batches(batch_size=1, prefetch_batches=1))) as rows:
            for number in range(130):
                assert next(rows)["id"] == number
                if number > 100:  # the first are made while Ray Data does not yet count them
                    assert int(made.read_text()) - int(fetched.read_text()) <= windows.AHEAD + 16
    finally:
        stream.end(parts)
