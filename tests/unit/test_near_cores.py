"""Tests the CPU cores of a worker with a GPU: those that Linux lists for the device, among those that the worker may use."""

import os

import pytest
from heliostat.engine import process_group

GPU = 0, 0xDC, 0  # on the PCI bus


@pytest.fixture
def told(tmp_path):
    def tell(ranges: str):
        (tmp_path / "0000:dc:00.0").mkdir(exist_ok=True)
        (tmp_path / "0000:dc:00.0/local_cpulist").write_text(f"{ranges}\n")
        return tmp_path

    return tell


@pytest.fixture(autouse=True)
def restored():
    before = os.sched_getaffinity(0)
    process_group._allowed.cache_clear()
    yield
    os.sched_setaffinity(0, before)
    process_group._allowed.cache_clear()


@pytest.mark.parametrize(("ranges", "cores"), [("0-3,8-11", {0, 1, 2, 3, 8, 9, 10, 11}), ("5", {5}), ("", set())])
def test_cores_are_read_as_linux_lists_them(told, ranges, cores):
    assert process_group.near(*GPU, told(ranges)) == cores


def test_a_worker_stays_on_those_that_it_may_use(told):
    first = min(os.sched_getaffinity(0))
    assert process_group.bind_near(*GPU, told(f"{first},4000-4001")) == {first} == os.sched_getaffinity(0)


def test_another_gpu_in_the_next_attempt_is_found_from_what_the_process_had_at_first(told):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("this machine has one core")
    assert process_group.bind_near(*GPU, told(str(cores[0]))) == {cores[0]}
    assert process_group.bind_near(*GPU, told(str(cores[1]))) == {cores[1]} == os.sched_getaffinity(0)


def test_nothing_happens_where_nothing_is_known_or_allowed(told, tmp_path):
    before = os.sched_getaffinity(0)
    assert process_group.bind_near(*GPU, tmp_path / "no-such-bus") == set()
    assert process_group.bind_near(*GPU, told("4000-4001")) == set()
    assert os.sched_getaffinity(0) == before
