"""Returns to a fixture the cases of its grid that the selected tests need, so that no others run.

A case is `kept` for `make test`, or left to CI (`make test-ci`), whose marks are `pytest.mark.ci`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def kept(cases: Iterable[Any], *few: Any) -> list[Any]:
    """Returns the cases as parameters, all except these few with the mark of CI."""
    return [case if case in few else pytest.param(case, marks=pytest.mark.ci) for case in cases]


def asked(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """Returns the values of a parameter in the selected tests of the fixture's module, in order."""
    mine = (item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path)
    given = (item.callspec.params for item in mine if hasattr(item, "callspec"))
    return list(dict.fromkeys(params[parameter] for params in given if parameter in params))
