"""Runs tests of many random cases, each drawn from a seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def every_seed(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls a test with each `seed` below `count`, in one test, because as many tests of pytest would take longer than the test
    itself.

    A failure's note has the seed. Fixtures are created once for all seeds.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(**fixtures: Any) -> None:
            for seed in range(count):
                try:
                    test(seed=seed, **fixtures)
                except BaseException as e:
                    e.add_note(f"seed {seed}")
                    raise

        signature = inspect.signature(test)
        others = [parameter for name, parameter in signature.parameters.items() if name != "seed"]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.__dict__.update(test.__dict__)
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate
