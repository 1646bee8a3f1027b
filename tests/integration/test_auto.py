"""Tests that a job with the fastest parallelism configuration trains in it, records it, and resumes in it."""

import heliostat
import pytest
from heliostat.errors import ConfigError
from heliostat.plan import auto, layouts

ASKED = {"train.parallel": "auto", "train.log_every": 1, "train.steps": 8}


@pytest.mark.ci
@pytest.mark.usefixtures("ray_session")
def test_a_run_trains_in_the_layout_that_the_plan_finds_and_resumes_in_it(job_file):
    path = job_file("auto")
    wanted = heliostat.load_job(path, {**ASKED, "train.stop_after": 4})
    layout = layouts.of(auto.settled(wanted)).settings()
    assert layout["train.micro_batch_size"] != wanted.train.micro_batch_size, "or this would show nothing"
    first = heliostat.train(wanted)
    assert layouts.of(first.job).settings() == layout and not first.job.train.parallel.auto
    assert max(first.losses()) == 4
    whole = heliostat.train(heliostat.load_job(path, ASKED), resume=True)
    assert layouts.of(whole.job).settings() == layout and max(whole.losses()) == 8
    assert whole.verify()["ok"]
    with pytest.raises(ConfigError, match="already has checkpoints up to step 8"):
        heliostat.train(heliostat.load_job(path, ASKED))
