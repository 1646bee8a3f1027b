"""Tests exact, elastic data in whole runs: after any kill, resize, or damage, every step trains on the right samples."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from heliostat.data import manifest
from heliostat.data.index import index
from heliostat.errors import ConfigError, DataError, HeliostatError
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train

from tests.integration import strikes
from tests.integration.conftest import curve
from tests.integration.paced import PACED_PLAIN
from tests.integration.strikes import STEPS, run_folder, saved

pytestmark = pytest.mark.usefixtures("ray_session")


def settings(workers: int, **changes: Any) -> list[str]:
    return strikes.settings(**{"workers.count": workers, "checkpoint.every": 5, **changes})


def train_and_kill(path: Path, after: int, options: list[str]) -> None:
    """Trains until a checkpoint of step `after` or later exists, then kills every worker at once."""
    folder = run_folder(path)
    thread = strikes.when((lambda: saved(folder) >= after, lambda: strikes.kill(*strikes.workers())))
    with pytest.raises(HeliostatError):
        train(path, options, resume=True)
    thread.join(5)


def test_a_run_killed_and_resized_again_and_again_trains_on_the_same_samples(job_file, tracking, unbroken):
    """1 worker, killed; 2, killed; 4, killed; 1 to the end: the curve equals the unbroken run's, and the receipts pass."""
    path = job_file("broken")
    for workers, after in ((1, 8), (2, 21), (4, 33)):
        train_and_kill(path, after, settings(workers, **PACED_PLAIN, **{"retries.max": 0}))
    result = train(path, settings(1), resume=True)
    got = curve(tracking, result["run_id"])
    assert len(got) == STEPS and got == pytest.approx(unbroken[1], abs=1e-5)
    report = verify(run_folder(path))
    assert report["ok"] and (report["steps"], report["samples"]) == (STEPS, STEPS * 8)
    assert report["lost"] == report["repeated"] == report["replaced"] == 0 and report["first_difference"] is None
    assert receipts(path) == receipts(unbroken[0])


def receipts(path: Path) -> str:
    return json.loads(run_folder(path).join("receipts", f"step-{STEPS:08d}.json").read())["chain"]


@pytest.fixture
def own_corpus(corpus, tmp_path) -> Path:
    """Copies the corpus, so that a test may damage it."""
    return Path(shutil.copytree(corpus, tmp_path / "own"))


def damage(folder: Path, group: int) -> None:
    """Flips a bit in a row group's page."""
    file = sorted((folder / "shards").rglob("*.parquet"))[0]
    column = pq.ParquetFile(file).metadata.row_group(group).column(0)
    raw = bytearray(file.read_bytes())
    raw[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 1
    file.write_bytes(bytes(raw))


@pytest.mark.ci
def test_a_damaged_chunk_is_replaced_listed_and_verified_or_stops_the_run(own_corpus, job_file):
    """With `replace`, the run ends, the quarantine names the samples, and verify agrees for any number of workers. A budget below
    that stops the run."""
    damage(own_corpus, 0)
    source = {"data.sources": [{"path": str(own_corpus)}], "train.steps": 40, "checkpoint.every": 20}
    path = job_file("damaged")
    with pytest.raises(DataError, match=r"data\.max_bad_fraction: replaced \d+ bad samples by step \d+, more than 1e-06"):
        train(path, settings(2, **source, **{"data.max_bad_fraction": 1e-6}))
    train(path, settings(2, **source, **{"data.max_bad_fraction": 0.5}), overwrite=True)
    entries = [json.loads(line) for name, _ in run_folder(path).join("quarantine").files()
               for line in run_folder(path).join("quarantine", name).read().splitlines()]  # fmt: skip
    report = verify(run_folder(path))
    assert entries and report["ok"] and report["replaced"] == len(entries) and report["lost"] == report["repeated"] == 0
    for entry in entries:
        assert entry["row_group"] == 0 and entry["shard"].startswith("shards/") and "cannot be read" in entry["reason"]
        assert entry["replaced_by"]["row_group"] != 0 or entry["replaced_by"]["shard"] != entry["shard"]
    with pytest.raises(DataError, match=r"row group 0: cannot be read .*data\.on_bad_sample to 'replace'"):
        train(job_file("strict"), settings(1, **source, **{"data.on_bad_sample": "fail"}))


@pytest.mark.ci
def test_a_curriculum_over_two_sources_and_a_change_of_data_are_followed_to_the_step(own_corpus, corpus, job_file, tracking):
    """A source with a cap starts at step 13. More shards are then rejected, and accepted as a segment. All of it passes."""
    location = Location(str(own_corpus))
    shards = sorted((own_corpus / "shards").rglob("*.parquet"))
    later = own_corpus / "later.parquet"
    table = pq.read_table(shards[-1])
    pq.write_table(table.slice(0, len(table) // 2), later, write_page_checksum=True)
    sources = [{"path": corpus, "weight": 1}, {"path": str(own_corpus), "weight": 0, "max_epochs": 0.1}]
    options = {"data.sources": sources, "data.mix_schedule": [{"step": 13, "weights": [1, 3]}], "data.memory_limit": "256MiB"}
    path = job_file("curriculum")
    train(path, settings(2, **options, **{"train.steps": 30, "evaluate.every": 30}))
    digest = manifest.read(location).digest
    later.rename(own_corpus / "shards" / "zz.parquet")
    assert index(location).digest != digest
    resumed = train(path, settings(4, **options, **{"train.steps": 45, "evaluate.every": 45}), resume=True)
    assert len(curve(tracking, resumed["run_id"])) == 45
    assert verify(run_folder(path))["ok"]  # on the version that it started with
    options["data.sources"] = [{"path": corpus, "weight": 1}, {"path": str(own_corpus), "weight": 1}]
    options["data.mix_schedule"] = []
    with pytest.raises(ConfigError, match=r"samples would change on resume(.|\n)*allow-data-change(.|\n)*weights"):
        train(path, settings(1, **options), resume=True)
    result = train(path, settings(1, **options), resume=True, allow_data_change=True)
    report = verify(run_folder(path))
    assert report["ok"] and report["steps"] == STEPS and report["lost"] == report["repeated"] == 0
    assert [name for name, _ in run_folder(path).join("segments").files()] == ["step-00000000.json", "step-00000045.json"]
    given = curve_of(tracking, result["run_id"], "train/data/corpus.1/samples")
    assert given[10] == 0 and 0 < given[30] <= 0.1 * 2**20 and given[STEPS] > 0


def curve_of(tracking: str, run_id: str, metric: str) -> dict[int, float]:
    from mlflow import MlflowClient

    return {m.step: m.value for m in MlflowClient(tracking_uri=tracking).get_metric_history(run_id, metric)}
