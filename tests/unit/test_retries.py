"""Tests retries: a temporary failure is retried within its budget, with waits that double. A permanent one isn't."""

import random
from typing import NoReturn

import pytest
from heliostat.storage import retries
from heliostat.storage.retries import Backoff, FailedAttempts, retry


class Clock:
    """Provides a clock that advances only by sleeping and by the action itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, took: float = 0.0) -> None:
        self.now, self.took, self.waits = 0.0, took, list[float]()
        monkeypatch.setattr(retries.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retries.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def failing(self, times: int):
        left = [times]

        def act() -> str:
            self.now += self.took
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(f"{left[0]} to come")
            return "done"

        return act


class GivenUpError(Exception):
    pass


def give_up(failure: FailedAttempts) -> NoReturn:
    raise GivenUpError(failure.count, failure.seconds) from failure.error


def passing(error: Exception) -> None:
    pass


def test_waits_double_up_to_the_longest(monkeypatch):
    clock, told = Clock(monkeypatch), []
    made = retry(clock.failing(5), 60.0, Backoff(0.5, 3.0), passing, give_up, lambda f, wait: told.append((f.count, wait)))
    assert made == "done" and clock.waits == [0.5, 1.0, 2.0, 3.0, 3.0] and told == list(enumerate(clock.waits, 1))
    assert Backoff(1.0, 60.0).wait(10_000) == 60.0


def test_waits_vary_by_the_jitter_and_no_more():
    waits = {Backoff(1.0, 8.0, jitter=0.5).wait(1) for _ in range(200)}
    assert len(waits) > 100 and min(waits) >= 0.5 and max(waits) <= 1.5


@pytest.mark.parametrize("took", [0.0, 4.0])
def test_no_attempt_begins_that_would_end_beyond_the_budget(monkeypatch, took):
    """Assumes that it takes as long as the last attempt. The error has the number and time of the attempts, and the last failure.
    While an attempt fits, the retries continue."""
    clock = Clock(monkeypatch, took)
    with pytest.raises(GivenUpError) as error:
        retry(clock.failing(100), 20.0, Backoff(1.0, 8.0), passing, give_up)
    count, seconds = error.value.args
    assert seconds == clock.now <= 20.0 and isinstance(error.value.__cause__, OSError)
    assert clock.now + 1.0 + took > 20.0 and count == len(clock.waits) + 1


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_used_up_to_its_end_whatever_the_jitter(monkeypatch, seed):
    """A store that answers again shortly before the end of the budget still gets a request."""
    random.seed(seed)
    clock = Clock(monkeypatch)
    with pytest.raises(GivenUpError):
        retry(clock.failing(100), 5.0, Backoff(0.2, 8.0, jitter=0.5), passing, give_up)
    assert 5.0 - 0.1 < clock.now <= 5.0


def test_a_budget_of_nothing_is_one_attempt(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(GivenUpError):
        retry(clock.failing(1), 0.0, Backoff(1.0, 8.0), passing, give_up)
    assert not clock.waits


def test_what_would_fail_again_is_raised_at_once(monkeypatch):
    clock = Clock(monkeypatch)

    def judge(error: Exception) -> None:
        raise PermissionError("no") from error

    with pytest.raises(PermissionError):
        retry(clock.failing(1), 60.0, Backoff(1.0, 8.0), judge, give_up)
    assert not clock.waits


def test_a_person_who_interrupts_is_heard_at_once(monkeypatch):
    """Ctrl-C isn't a failure."""

    def act() -> None:
        raise KeyboardInterrupt

    clock = Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        retry(act, 60.0, Backoff(1.0, 8.0), passing, give_up)
    assert not clock.waits


@pytest.mark.parametrize("before", [None, "17"])
def test_a_changed_budget_ends_with_its_block(monkeypatch, before):
    """Also if the block fails: later code of the process has the budget that the user set."""
    monkeypatch.delenv(retries.BUDGET, raising=False)
    if before:
        monkeypatch.setenv(retries.BUDGET, before)
    usual = retries.retry_budget()
    with pytest.raises(OSError, match="down"), retries.limited(3):
        assert retries.retry_budget() == 3
        raise OSError("down")
    assert retries.retry_budget() == usual == float(before or 60)
