"""Defines the sections `mlflow` and `card` of the job file: where a run is recorded, and what people are told of its model."""

from __future__ import annotations

from pydantic import Field

from heliostat.config.fields import Experiment, Name
from heliostat.schema import Strict


class Mlflow(Strict):
    uri: str
    """The tracking store: `sqlite:///FILE`, or `http://HOST:PORT`. It never holds a password."""
    experiment: Experiment
    """Of the run: up to 250 characters; no part between slashes is empty, `.` or `..`."""
    register_as: Name | None = Field(default=None, alias="register")
    """Name of the registered model that the run makes a version of. Unset: the model is logged, and not registered."""
    alias: Name | None = None
    """That the new version gets, as `candidate`."""


class Card(Strict):
    """Holds what people must know of the model, its model card, which travels with it."""

    license: Name | None = None
    """SPDX identifier, as `Apache-2.0`. Unset: the parent model's, or `unknown`."""
    summary: str = ""
    """What the model is."""
    intended_use: str = ""
    """What it is for."""
    limitations: str = ""
    """What it is not for, and where it fails."""
