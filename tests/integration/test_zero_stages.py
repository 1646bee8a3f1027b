"""Every ZeRO stage on one and two workers gives the losses of one plain process of torch, in process groups without Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from heliostat.data import manifest
from heliostat.data.dataset import plan
from heliostat.validation.check import check_job, load_job

from tests.golden import curves, data
from tests.integration import ranks
from tests.integration.conftest import tiny_job
from tests.integration.reference import plain_losses

STAGES, WORKERS = (0, 1, 2, 3), (1, 2)
MASKED = "data.document_mask=true"
PLAYED = [f"train.steps={curves.STEPS}", f"evaluate.every={curves.STEPS}", f"checkpoint.every={curves.STEPS}"]


def packed(path: Path) -> list[str]:
    """The settings of short documents that lie beside the job; nearly every sample holds the end of one."""
    source = json.dumps([{"path": str(path.with_name("documents"))}])
    return [f"train.steps={curves.STEPS}", "evaluate=null", "data.window=64", f"data.sources={source}"]


def grid(group: Any, everyone: Any, path: str) -> Iterator[dict[str, Any]]:
    """In every rank: the job's curve at each stage, by the worker's own step; and of packed documents that are masked."""
    for stage, given in [*((stage, PLAYED) for stage in STAGES), (2, [*packed(Path(path)), MASKED])]:
        settings = [*given, f"train.zero.stage={stage}", f"workers.count={dist.get_world_size()}"]
        job, _ = check_job(load_job(Path(path), settings))
        losses, _ = curves.Steps(job, plan(job, [manifest.read(location) for location in job.sources])).curve()
        if dist.get_rank() == 0:
            yield {"stage": stage, "masked": given is not PLAYED, "losses": losses}


@pytest.fixture(scope="module")
def played(tmp_path_factory, corpus, tracking) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("grid")
    path = folder / "tiny.json"
    path.write_text(json.dumps(tiny_job(corpus, tracking, folder)))
    data.tokens(folder / "documents")
    return path, ranks.run(f"{__name__}:grid", WORKERS, str(path))


@pytest.mark.ci
def test_every_zero_stage_and_worker_count_gives_the_plain_loops_losses(played) -> None:
    """Of whole runs, `finished` is compared with the plain loop, and others with it."""
    path, told = played
    expected = plain_losses(path, PLAYED)
    assert expected[-1] < expected[0] - 0.3  # it learns, in so few steps
    found = {(row["stage"], row["workers"]): row["losses"] for row in told if not row["masked"]}
    assert set(found) == {(stage, workers) for stage in STAGES for workers in WORKERS}
    for case, losses in found.items():
        assert losses == pytest.approx(expected, abs=1e-4), case


@pytest.mark.ci
def test_packed_documents_that_do_not_see_each_other_train_the_same_on_any_workers(played) -> None:
    """Micro-batches then hold different numbers of loss terms; the step's loss is still their mean over the global batch."""
    path, told = played
    expected = plain_losses(path, [*packed(path), MASKED])
    found = {row["workers"]: row["losses"] for row in told if row["masked"]}
    assert set(found) == set(WORKERS)
    assert all(losses == pytest.approx(expected, abs=1e-4) for losses in found.values())
    assert expected != pytest.approx(plain_losses(path, packed(path)), abs=1e-2)  # documents that are seen are learnt from
