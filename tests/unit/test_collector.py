"""Tests that Python's garbage collector runs only between steps: objects in cycles stay until it is called, and are freed
then."""

import gc
import weakref

import pytest
from heliostat.training.worker import collector
from heliostat.training.worker.context import Due


def pause(due: bool) -> None:
    """Calls the hook as after a step: it collects new objects, or all objects if a save is due."""
    due_then = Due(last=False, reports=True, evaluates=False, saves=due, keeps=False, holds=False)
    collector.Collector().on_save(collector.EVERY, due_then)


class Circle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def runs():
    """Counts the collections."""
    found: list[int] = []

    def count(phase, info):
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(count)
    yield found
    gc.callbacks.remove(count)


def test_nothing_is_collected_inside_but_when_called_for(runs):
    with collector.held_off():
        circles = [Circle() for _ in range(5_000)]
        last = weakref.ref(circles[-1])
        del circles
        assert not runs and last() is not None
        pause(due=False)
        assert runs == [1] and last() is None
    assert gc.isenabled()


def test_what_is_old_goes_with_all(runs):
    with collector.held_off():
        circle = Circle()
        gone = weakref.ref(circle)
        pause(due=False)
        pause(due=False)  # it has moved to the oldest generation
        del circle
        pause(due=False)
        assert gone() is not None
        pause(due=True)
        assert gone() is None


def test_a_failure_inside_leaves_the_collector_as_it_was():
    with pytest.raises(ValueError, match="a step"), collector.held_off():
        raise ValueError("a step")
    assert gc.isenabled()
    gc.disable()
    try:
        with collector.held_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
