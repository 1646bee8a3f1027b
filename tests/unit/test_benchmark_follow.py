"""Tests a run whose checkpoints are scored as they appear: each saved checkpoint is scored, or the reason is reported."""

from types import SimpleNamespace
from typing import Any

from heliostat.checkpoint import layout
from heliostat.evaluation import shown
from heliostat.evaluation.follow import Followed, summary
from heliostat.storage import run_folder
from heliostat.storage.locations import Location


def test_a_checkpoint_that_came_and_went_between_two_looks_is_counted(tmp_path):
    """The run's receipts show such a checkpoint. For those after the newest checkpoint, the save itself was interrupted."""
    run, told = Location(str(tmp_path)), list[int]()
    for step in (100, 150, 200, 300, 400, 500):
        run_folder.receipt(run, step).write(b"{}")
    layout.folder(run, 400).join("shard-00000-of-00001.safetensors").write(b"cut")
    suite: Any = SimpleNamespace(suite=SimpleNamespace(name="s"))  # asked for no score
    followed = Followed(run, suite, lambda step, _: told.append(step), every=100)
    followed.follow(poll_s=0.01)
    made = summary(followed)
    assert list(made["removed"]) == ["100", "200", "300"] and list(made["incomplete"]) == ["400", "500"] and not told
    assert shown.missed(made) == [
        "3 steps, from 100 to 300: not scored: retention removed its checkpoint before it was scored",
        "2 steps, from 400 to 500: not scored: its checkpoint is incomplete, and its writer is gone",
    ]
