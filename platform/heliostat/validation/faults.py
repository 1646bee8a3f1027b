"""Collects faults, so that one round reports all problems of a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from heliostat.errors import ConfigError, HeliostatError


class Faults:
    """Collects the errors of checks that don't depend on each other. In a condition, a `Faults` object is true if there are
    errors."""

    def __init__(self) -> None:
        self._errors: list[HeliostatError] = []

    def __bool__(self) -> bool:
        return bool(self._errors)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Runs a check, and keeps the error that the check raises."""
        try:
            yield
        except HeliostatError as e:
            self._errors.append(e)

    def add(self, error: HeliostatError) -> None:
        """Adds an error."""
        self._errors.append(error)

    @property
    def error(self) -> HeliostatError:
        """Returns the error if there is one, or an error that lists all errors. The returned error is a ConfigError if a person
        must change something first."""
        if len(self._errors) == 1:
            return self._errors[0]
        kind = ConfigError if any(e.exit_code == 2 for e in self._errors) else HeliostatError
        return kind("\n  ".join(dict.fromkeys(map(str, self._errors))))

    @property
    def lines(self) -> list[str]:
        """Lists all faults, one line each."""
        return [line.strip() for e in self._errors for line in str(e).split("\n")]
