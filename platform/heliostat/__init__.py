"""Trains at scale, distributed, on Ray: heliostat as a Python library. `heliostat --help` shows the same as commands.

    job = heliostat.load_job("jobs/quickstart.yaml", {"train.steps": 100})
    run = heliostat.train(job)
    print(run.losses()[100], run.verify()["ok"])

docs/python-api.md describes every name. Importing heliostat imports nothing else: each name brings what it needs when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from heliostat.api.functions import Checked as Checked
    from heliostat.api.functions import ExactStream as ExactStream
    from heliostat.api.functions import Generated as Generated
    from heliostat.api.functions import Job as Job
    from heliostat.api.functions import Run as Run
    from heliostat.api.functions import check as check
    from heliostat.api.functions import datasets as datasets
    from heliostat.api.functions import generate as generate
    from heliostat.api.functions import load_job as load_job
    from heliostat.api.functions import prepare as prepare
    from heliostat.api.functions import train as train

__all__ = ["Checked", "ExactStream", "Generated", "Job", "Run", "check", "datasets", "generate", "load_job", "prepare", "train"]
MODULES = ("check", "train")  # are of this name too, and are called as the function (`callable_module`)


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"heliostat.{name}")
    if name in __all__:
        return getattr(importlib.import_module("heliostat.api"), name)
    raise AttributeError(f"module 'heliostat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
