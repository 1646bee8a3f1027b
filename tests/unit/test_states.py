"""A run changes its state in one place, along one table, and says what it is at."""

import logging

import pytest
from heliostat.training.driver.run import ENDS
from heliostat.training.driver.states import FOLLOWING, RunState, States

S = RunState
COURSES = [
    [S.RUNNING, S.FINALIZING, S.FINISHED],
    [S.RUNNING, S.RECOVERING, S.RECOVERING, S.RUNNING, S.RESIZING, S.RUNNING, S.RECOVERING, S.RESIZING, S.FINALIZING, S.STOPPED],
    [S.RECOVERING, S.FAILED],  # before the first step
    [S.FINALIZING, S.FAILED],  # of a run whose steps were all done
    [S.FINISHED],  # of one that has only metrics to log
]


def at(state: RunState) -> States:
    states = States("r")
    states.now = state
    return states


@pytest.mark.parametrize("course", COURSES)
def test_a_run_may_take_these_courses(course, caplog):
    states = States("r")
    assert states.now is S.STARTING
    with caplog.at_level(logging.DEBUG, "heliostat"):
        for state in course:
            states.stepped() if state is S.RUNNING else states.to(state)
            assert states.now is state
    assert [r.getMessage().split()[-1] for r in caplog.records] == course


@pytest.mark.parametrize("present", S)
@pytest.mark.parametrize("following", S)
def test_what_the_table_lacks_is_an_error_and_leaves_the_state(present, following):
    states = at(present)
    if following in FOLLOWING[present]:
        states.to(following)
        assert states.now is following
        return
    with pytest.raises(RuntimeError, match=rf"^run r: {following} can't follow {present}$"):
        states.to(following)
    assert states.now is present


def test_every_state_is_reached_and_ends_lead_nowhere_else():
    assert set.union(*map(set, FOLLOWING.values())) == set(S) - {S.STARTING} and set(FOLLOWING) == set(S)
    assert {state for state, following in FOLLOWING.items() if not following} == set(ENDS)


def test_steps_of_a_run_that_makes_them_change_nothing():
    states = at(S.RUNNING)
    states.stepped()
    assert states.now is S.RUNNING
