"""Tests what happens to a run when an attempt ends: which errors are retried, how often, and on how many workers; and what counts
as a spike."""

import math
import random

import pytest
from heliostat import errors
from heliostat.cluster.capacity import missing, room, starved
from heliostat.config import spec
from heliostat.config.spikes import SpikeDetector
from heliostat.errors import CheckpointError, ConfigError, CorruptCheckpointError, StorageError, TrainingError, WorkerError
from heliostat.training.driver.recovery import Budget, choose, classify
from heliostat.training.driver.watchdog import stalled

from tests.unit.build_job import job


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.ConfigError("x"), "final"),
        (errors.DataError("x"), "final"),
        (errors.NonFiniteError("x"), "final"),
        (errors.AccessError("x"), "refused"),
        (errors.CheckpointError("x"), "final"),
        (errors.CorruptCheckpointError("x", 5), "corrupt"),
        (errors.LossSpikeError("x", 5), "spike"),
        (errors.PlacementError("x"), "queued"),
        (errors.StorageError("x"), "failure"),
        (errors.StalledError("x"), "failure"),
        (errors.WorkerError("x"), "failure"),
        (errors.TrainingError("x"), "failure"),
    ],
)
def test_what_would_come_again_is_final(error, kind):
    """A store's rejection is a StorageError, and a corrupt checkpoint a CheckpointError, but each is handled separately."""
    assert classify(error) == kind


def test_failures_in_a_row_wait_longer_and_longer_and_then_end_the_run():
    budget = Budget(spec.Retries(max=5, backoff=1.0, backoff_max=6.0))
    assert [budget.spend(TrainingError(str(i)), 100) for i in range(5)] == [0.0, 1.0, 2.0, 4.0, 6.0]
    with pytest.raises(TrainingError, match=r"^5\. Giving up after 5 retries without a new checkpoint$"):
        budget.spend(TrainingError("5"), 100)


def test_a_new_checkpoint_begins_a_new_row():
    """A run of months survives any number of failures, as long as it makes progress between them."""
    budget = Budget(spec.Retries(max=1, backoff=1.0))
    assert [budget.spend(TrainingError("node lost"), step) for step in range(0, 5000, 100)] == [0.0] * 50


def test_no_retries_means_none():
    with pytest.raises(StorageError, match="Giving up after 0 retries"):
        Budget(spec.Retries(max=0)).spend(StorageError("down"), 0)


def test_the_same_error_of_a_workers_own_code_is_tried_once_more_only():
    """A bug in a recipe fails at the same place each time. A worker may die there by chance."""
    budget = Budget(spec.Retries(max=10))
    budget.spend(WorkerError("TypeError: 'int'"), 40)
    with pytest.raises(WorkerError, match=r"TypeError: 'int'\. This error occurred twice"):
        budget.spend(WorkerError("TypeError: 'int'"), 40)
    for _ in range(3):
        budget.spend(TrainingError("worker died"), 40)


def test_as_many_workers_as_there_is_room_for():
    rng = random.Random(1)
    for _ in range(500):
        allowed, space = sorted(rng.sample(range(1, 65), rng.randint(1, 8))), rng.randint(0, 70)
        found = choose(allowed, space)
        assert found in allowed and (found <= space or found == min(allowed))
        assert not [n for n in allowed if found < n <= space]


def test_worker_counts_divide_the_lanes_into_whole_micro_batches():
    made = job(**{"train.global_batch_size": 24, "train.micro_batch_size": 2, "workers.count": [1, 12]})
    assert made.worker_counts() == [1, 2, 3, 4, 6, 12]
    for n in made.worker_counts():
        fixed = made.on(n)
        assert fixed.accumulation * n * 2 == 24 and fixed.worker_counts() == [n]
    few = job(**{"train.global_batch_size": 24, "train.micro_batch_size": 2, "data.virtual_ranks": 4, "workers.count": [1, 8]})
    assert few.worker_counts() == [1, 2, 4]


@pytest.mark.parametrize("count", [[4, 1], [0, 2], [1], [1, 2, 3], "four", 0, -1, True, [1.0, 2.0]])
def test_a_count_is_a_number_or_a_range(count):
    with pytest.raises(ConfigError, match=r"workers\.count: expected a number of workers, or \[least, most\]"):
        job(**{"workers.count": count})


def test_a_range_without_a_divisor_of_the_lanes_is_refused_with_the_nearest():
    message = r"workers\.count: no number from 5 to 7 divides the 4 virtual ranks into complete micro-batches\. Use 4"
    with pytest.raises(ConfigError, match=message):
        job(**{"train.global_batch_size": 8, "train.micro_batch_size": 2, "workers.count": [5, 7]})


def test_room_is_counted_node_by_node_and_leaves_the_data_tasks_a_cpu():
    """Two halves of a worker on two nodes don't make a worker. Resources of the run's own workers are free for their
    successors."""
    workers = spec.Workers(cpus=2.0, gpus=1.0)
    assert room(workers, {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 8, "GPU": 1}}, {}) == 3
    assert room(workers, {"a": {"CPU": 1, "GPU": 8}, "b": {"CPU": 1}}, {}) == 0
    assert room(workers, {"a": {"CPU": 1}, "b": {"CPU": 8}}, {"a": 1, "b": 2}) == 3
    assert room(spec.Workers(cpus=1.0), {"a": {"CPU": 4}}, {}) == 3
    assert room(spec.Workers(cpus=1.5), {"a": {"CPU": 2}, "b": {"CPU": 2}}, {}) == 1  # a data task does not span nodes
    assert room(spec.Workers(cpus=1.5), {"a": {"CPU": 2}, "b": {"CPU": 2}, "c": {"CPU": 1}}, {}) == 2
    assert room(spec.Workers(cpus=1.5), {"a": {"CPU": 2}, "b": {"CPU": 2}}, {}, apart=True) == 2
    assert starved(spec.Workers(cpus=1.5), {"a": 2, "b": 2}, {"a": 1, "b": 1})
    assert not starved(spec.Workers(cpus=1.5), {"a": 2, "b": 2.5}, {"a": 1, "b": 1})
    assert room(spec.Workers(cpus=1.0, placement="strict_spread"), {"a": {"CPU": 4}, "b": {"CPU": 4}}, {}) == 2


def test_what_is_missing_is_said_in_numbers_with_what_others_hold():
    workers, nodes = spec.Workers(cpus=2.0, gpus=1.0), {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 8, "GPU": 2}}
    said = missing(workers, 4, nodes, {"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 8.0}})
    assert said == (
        "no room for 4 workers of 2 CPUs and 1 GPUs, and 1 CPU for reading the data: the 2 nodes that can hold such workers have "
        "16 CPUs and 4 GPUs, of which other jobs use 6 CPUs and 3 GPUs. There is room for 1 workers now, and for 4 workers when "
        "the other jobs have ended; waiting"
    )
    assert missing(workers, 5, nodes, nodes, apart=True).endswith(
        "for 4 workers now, and for 4 workers when the other jobs have ended; waiting for more nodes. To start earlier, "
        "lower workers.count or workers.cpus"
    )
    assert "no living node with the labels pool=x can hold 1 workers" in missing(spec.Workers(labels={"pool": "x"}), 1, {}, {})


def pulse(moved: float, at: float) -> dict:
    return {"progress": 0, "moved": moved, "at": at}


def test_a_stall_is_when_nobody_gets_on_or_somebody_is_silent():
    """Workers wait for each other, so one that makes progress is enough. A frozen worker is silent while the others wait for
    it."""
    assert stalled({}, 2, now=50, limit=60, since=0) is None
    assert stalled({}, 2, now=70, limit=60, since=0) == "no worker made progress for 70 s"
    assert stalled({0: pulse(10, 100), 1: pulse(95, 100)}, 2, now=100, limit=60, since=0) is None
    assert stalled({0: pulse(10, 100), 1: pulse(30, 100)}, 2, now=100, limit=60, since=0) == "no worker made progress for 70 s"
    silent = "no heartbeat from worker 1 for 60 s"
    assert stalled({0: pulse(95, 100), 1: pulse(30, 30)}, 2, now=100, limit=60, since=0) == silent
    assert stalled({0: pulse(95, 100)}, 2, now=100, limit=60, since=0) == silent
    assert stalled({0: pulse(95, 100)}, 2, now=100, limit=60, since=50) is None


@pytest.mark.parametrize("seed", range(8))
def test_a_spike_is_found_and_nothing_else(seed):
    """On a falling, noisy curve, only the raised steps are spikes, and a spike doesn't hide the next one."""
    rng = random.Random(seed)
    losses = [2 + 6 * math.exp(-i / 40) + rng.gauss(0, 0.05) for i in range(400)]
    raised = set(rng.sample(range(150, 400), 6))
    detector = SpikeDetector(spec.Spike(window=50, threshold=8))
    found = {i for i, x in enumerate(losses) if detector.excess(x + 4 if i in raised else x)}
    assert found == raised


def test_nan_is_a_spike_from_the_first_step_and_a_constant_loss_is_none():
    detector = SpikeDetector(spec.Spike(window=8))
    assert all(detector.excess(x) for x in (math.nan, math.inf))
    assert not any(detector.excess(1.0 + 1e-6 * (i % 2)) for i in range(100))


def test_errors_keep_what_the_driver_must_know_when_they_travel():
    import pickle

    for error in (CorruptCheckpointError("torn", 5), errors.LossSpikeError("high", 7)):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert (again.step, str(again), type(again)) == (error.step, str(error), type(error))
    refused = pickle.loads(pickle.dumps(errors.AccessError("no", "s3://b/k", "node")))  # noqa: S301
    assert (str(refused), refused.place, refused.node) == ("no", "s3://b/k", "node")
    assert isinstance(CorruptCheckpointError("x", 1), CheckpointError)
