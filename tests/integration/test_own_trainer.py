"""Tests the exact stream in a TorchTrainer outside heliostat: the same samples for any number of workers, and receipts that
pass."""

from __future__ import annotations

import heliostat
import pytest
import ray
from heliostat.errors import ConfigError

from jobs.examples import own_trainer


class Idle:
    """Holds CPUs."""

    def there(self) -> bool:
        return True


pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.ci
def test_another_number_of_workers_goes_on_with_the_same_samples_and_the_receipts_verify(corpus, tmp_path):
    """Two workers train up to step 6, then one up to step 12: the receipts equal those of the plan, which doesn't depend on
    workers.

    The two workers have all CPUs, as under a bare `ray.init()` on a machine of two cores, so reading must not wait for a CPU.
    """
    others = ray.remote(num_cpus=ray.cluster_resources()["CPU"] - 2)(Idle).remote()
    ray.get(others.there.remote())
    try:
        first = own_trainer.run(corpus, tmp_path, workers=2, steps=6, every=3)
    finally:
        ray.kill(others)
    went_on = own_trainer.run(corpus, tmp_path, workers=1, steps=12, every=3)
    assert (first["steps"], went_on["steps"], first["replaced"], went_on["replaced"]) == (6, 12, 0, 0)
    assert went_on["loss"] < first["loss"]
    run = heliostat.Run(tmp_path / "stream")
    assert [(r.first, r.end) for r in run.receipts()] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert run.receipts()[1].chain == first["chain"] and run.receipts()[3].chain == went_on["chain"]
    report = run.verify()
    assert report["ok"] and (report["steps"], report["samples"]) == (12, 12 * 16) and report["lost"] == report["repeated"] == 0
    with pytest.raises(ConfigError, match=r"has a data plan for other samples(.|\n)*data\.seed"):
        heliostat.datasets({"sources": [{"path": corpus}], "sequence_length": 64, "virtual_ranks": 4, "seed": 1}, steps=12,
                           global_batch_size=16, folder=str(tmp_path / "stream"))  # fmt: skip
