"""Tests that between two optimizer steps, the host reads nothing from the device: each read would wait for all queued work."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from heliostat.data.dataset import plan
from heliostat.data.manifest import read as read_manifest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden import curves, data
from tests.integration import ranks

CASES = [curves.Case("causal_lm", precision, stage, 1) for precision, stages in curves.STAGES.items() for stage in stages]
# optimizers count their steps in tensors of the CPU, also on a GPU; masks are read on a CPU alone (`recipes.text.masks`)
OF_THE_HOST = ("/torch/optim/", "/transformers/masking_utils.py")


class Reads(TorchDispatchMode):
    """Records the places where a tensor's value becomes a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero"):
            stack = traceback.extract_stack()
            if not any(part in frame.filename for frame in stack for part in OF_THE_HOST):
                frame = next(f for f in reversed(stack[:-1]) if "/torch/" not in f.filename)
                self.places.append(f"{frame.filename}:{frame.lineno}: {frame.line}")
        return func(*args, **(kwargs or {}))


def played(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Yields the reads in the third step of each case, and its norm."""
    for case in CASES:
        job = curves.job_of(case, Path(folder))
        steps = curves.Steps(job, plan(job, [read_manifest(location) for location in job.sources]))
        samples = steps.dealt()
        for step in range(2):
            steps.step(step, steps.prepare(step, samples.next_step()))
        batches = steps.prepare(2, samples.next_step())
        with Reads() as reads:
            steps.step(2, batches)
        yield {"case": f"{case.file} {case.name}", "reads": reads.places, "norms": steps.norms}


@pytest.mark.ci
def test_a_step_reads_nothing(tmp_path: Path) -> None:
    data.build(tmp_path)
    found = ranks.run(f"{__name__}:played", (1,), str(tmp_path), deadline_s=300)
    assert len(found) == len(CASES) and {row["case"]: row["reads"] for row in found if row["reads"]} == {}
    assert all(len(row["norms"]) == 3 and min(row["norms"]) > 0 for row in found)
