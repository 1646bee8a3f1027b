"""Tests the lines in which `data trace`, `data forget`, and `run lineage` count: one sample, one step, one worker, or no step."""

from typing import Any, cast

import pytest
from heliostat.cli import curation
from heliostat.tracking import lineage_lines
from heliostat.tracking.lineage import Lineage


def outline(start_step: int, reached: int, workers: int) -> dict[str, Any]:
    ended = {"restart": False, "reason": "", "outcome": "finished"}
    return {"start_step": start_step, "reached": reached, "workers": workers, **ended}


def test_an_attempt_that_only_exported_the_model_shows_no_steps() -> None:
    lists: dict[str, Any] = {
        key: [] for key in ("code", "changes", "nodes", "tokenizers", "checkpoints", "exports", "models", "parents")
    }
    run: dict[str, Any] = {
        **lists, "run_id": "0a", "name": "sft", "status": "FINISHED", "reason": "", "sweep": None, "reproduces": None,
        "recipe": "heliostat.recipes:SFT", "job": {"seed": "0", "data_seed": "0"}, "data": {"segments": [], "replaced_count": 0},
        "attempts": [outline(0, 59, 2), outline(59, 60, 1), outline(60, 60, 2)],
    }  # fmt: skip
    shown = [text for _, text in lineage_lines.lines(cast(Lineage, {"model": None, "run": run}))]
    assert [text for text in shown if text.startswith("attempt")] == [
        "attempt 1 (command): steps 1 to 59 on 2 workers, finished",
        "attempt 2 (command): steps 60 to 60 on 1 worker, finished",
        "attempt 3 (command): no step on 2 workers, finished",
    ]


@pytest.mark.parametrize(
    ("steps", "shown"),
    [([], "no sample in this run"), ([49], "1 sample in step 49"), ([2, 49], "2 samples in steps 2, 49")],
)
def test_samples_and_steps_are_counted_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, steps: list[int], shown: str
) -> None:
    monkeypatch.setattr(curation.out, "quiet", False)  # an earlier test's --json sets it
    place = {"lane": 0, "place": 1, "epoch": 0, "row_group": 0, "row": 2}
    samples = [{"step": step, **place} for step in steps]
    run = {"name": "sft", "run_id": "0a", "steps": steps, "samples": samples, "models": ["models:/sft/1"],
           "inherited": [], "fault": "", "unsure": 0, "outdated": [], "status": "FINISHED", "exports": []}  # fmt: skip
    curation._print_runs({"runs": [run], "shard": {}})
    assert capsys.readouterr().out.startswith(f"  run sft (0a): {shown}; models:/sft/1\n")
