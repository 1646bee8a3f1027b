"""Tests heliostat's errors: they can be sent between processes, and each has its exit code."""

import inspect
import pickle

import pytest
from heliostat import errors
from heliostat.errors import HeliostatError

ALL_ERRORS = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, HeliostatError)]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_errors_survive_the_trip_from_a_worker(kind):
    """Class, message, exit code, and the facts for the driver are the same after pickling."""
    more = len(inspect.signature(kind.__init__).parameters) - 2 if "__init__" in vars(kind) else 0  # besides self and message
    error = kind("line: fix\n  line 2", *range(more))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (
        type(again) is kind
        and vars(again) == vars(error)
        and str(again) == "line: fix\n  line 2"
        and again.exit_code == kind.exit_code
    )


def test_bad_input_exits_with_2_a_stopped_run_with_130_and_everything_else_with_1():
    """Scripts rely on these exit codes: 2 means that a person must change something first, for example a missing place."""
    assert {e.__name__ for e in ALL_ERRORS if e.exit_code == 2} == {
        "AccessError",
        "ConfigError",
        "MissingDataError",
        "MissingExtraError",
    }
    assert {e.__name__ for e in ALL_ERRORS if e.exit_code == 130} == {"StoppedError", "LimitError"}
    assert {e.exit_code for e in ALL_ERRORS} == {1, 2, 130} and len(ALL_ERRORS) >= 8
