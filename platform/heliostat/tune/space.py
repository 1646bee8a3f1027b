"""Defines the search space: the job keys that a sweep varies, and the values of each. All functions are pure.

    train.optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
    train.optimizer.weight_decay: {choice: [0.0, 0.1]}
    train.schedule.decay_fraction: {uniform: [0.1, 0.4], when: {train.schedule.name: wsd}}

A trial's values depend only on the seed and the trial's number. Bounds are inclusive. If a key's `when` isn't true, the key keeps
the job's value. `when` may use only earlier keys of the space.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from heliostat.schema import Float, Strict

Range = Annotated[list[Float], Field(min_length=2, max_length=2)]
Steps = Annotated[list[Float], Field(min_length=3, max_length=3)]
Whole = Annotated[list[int], Field(min_length=2, max_length=2)]
WholeSteps = Annotated[list[int], Field(min_length=3, max_length=3)]
Values = Annotated[list[object], Field(min_length=1)]
Params = dict[str, object]

ALL = 4096  # maximum corners to check; in a larger space, only the corners of each pair of keys are checked


class Domain(Strict):
    """Describes the values of one key: exactly one distribution, and optionally a condition (`when`)."""

    uniform: Range | None = None
    """`[low, high]`: any number between them."""
    loguniform: Range | None = None
    """`[low, high]`: any number between them, on a logarithmic scale. `low` is above 0."""
    quniform: Steps | None = None
    """`[low, high, step]`: `low` plus a multiple of `step`, up to `high`."""
    qloguniform: Steps | None = None
    """`[low, high, step]`: `low` plus a multiple of `step`, up to `high`, drawn on a logarithmic scale."""
    randint: Whole | None = None
    """`[low, high]`: any integer, both bounds included."""
    qrandint: WholeSteps | None = None
    """`[low, high, step]`: `low` plus a multiple of `step`, as integers."""
    choice: Values | None = None
    """One of these values, which may be mappings."""
    grid: Values | None = None
    """Values for `searcher: {name: grid}`: each combination of them is one trial."""
    when: Params = {}
    """The key varies only if an earlier key of the space has this value, or one of a list of values: `{train.schedule.name:
    wsd}`."""

    @property
    def kind(self) -> str:
        return next(k for k in KINDS if getattr(self, k) is not None)

    @property
    def values(self) -> list[object]:
        """Returns the bounds or the choices of this key, exactly as in the sweep's file."""
        return getattr(self, self.kind)

    @property
    def numbers(self) -> list[float]:
        """Returns a numeric distribution's bounds, and its step if it has one; empty for a list of values."""
        return [*(self.uniform or self.loguniform or self.quniform or self.qloguniform or self.randint or self.qrandint or ())]

    @property
    def listed(self) -> bool:
        return self.kind in ("choice", "grid")

    @model_validator(mode="after")
    def _sound(self) -> Domain:
        kinds = [k for k in KINDS if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"set exactly one of {', '.join(KINDS)}; {'found ' + ' and '.join(kinds) if kinds else 'found none'}"
            )
        values, numbers = self.values, self.numbers
        if self.listed:
            if any(v in values[:i] for i, v in enumerate(values)):
                raise ValueError(f"{self.kind} {values} contains a value twice. Remove one of the two")
        elif numbers[0] >= numbers[1]:
            raise ValueError(f"{self.kind} {values} is an empty range. The first number must be below the second")
        elif "log" in self.kind and numbers[0] <= 0:
            raise ValueError(f"{self.kind} {values} must have a lower bound above 0")
        elif len(numbers) == 3 and not 0 < numbers[2] <= numbers[1] - numbers[0]:
            raise ValueError(f"{self.kind} {values}: the step must be above 0, and fit between the bounds")
        return self


KINDS = tuple(k for k in Domain.model_fields if k != "when")
Space = dict[str, Domain]


def faults(space: Space) -> list[str]:
    """Lists the errors in the space's conditions, one line each."""
    lines, before = [], list[str]()
    for key, domain in space.items():
        for other, wanted in domain.when.items():
            if other not in before:
                lines.append(f"space.{key}.when: {other!r} must be an earlier key of the space")
            elif space[other].listed and not set(map(repr, _listed(wanted))) & set(map(repr, space[other].values)):
                lines.append(f"space.{key}.when: {other} never has the value {wanted!r}. Its values are {space[other].values}")
        before.append(key)
    return lines


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def holds(domain: Domain, params: Params) -> bool:
    """Returns whether a key's condition is true for the values of the earlier keys."""
    return all(other in params and params[other] in _listed(wanted) for other, wanted in domain.when.items())


# choosing ------------------------------------------------------------------------------------------------------------


def draw(space: Space, seed: int, number: int) -> Params:
    """Draws the parameters of a random trial. These parameters depend only on the space, the seed, and the trial's number."""
    rng, params = np.random.default_rng([seed, number]), Params()
    for key, domain in space.items():
        value = sample(domain, rng)  # drawn even if it isn't used, so that a condition doesn't change later keys' values
        if holds(domain, params):
            params[key] = value
    return params


def sample(domain: Domain, rng: np.random.Generator) -> object:
    if domain.listed:
        return domain.values[int(rng.integers(len(domain.values)))]
    low, high = domain.numbers[:2]
    if whole := domain.randint or domain.qrandint:
        number = int(rng.integers(whole[0], whole[1] + 1))
        return fit(domain, number) if domain.qrandint else number
    if "log" in domain.kind:
        return fit(domain, math.exp(rng.uniform(math.log(low), math.log(high))))
    return fit(domain, float(rng.uniform(low, high)))


def fit(domain: Domain, value: float) -> float:
    """Rounds a number to the nearest value of the domain."""
    low, high, *step = domain.numbers
    if step:
        count = math.floor((high - low) / step[0] + 1e-9)
        value = low + min(count, max(0, round((value - low) / step[0]))) * step[0]
        value = float(f"{value:.12g}") if isinstance(value, float) else value  # so that 0.1 + 2 * 0.1 is 0.3
    value = min(high, max(low, value))
    return round(value) if domain.kind in ("randint", "qrandint") else float(value)


def number(value: object) -> float:
    """Returns `value` as a float. Asserts that the value is a number."""
    assert isinstance(value, int | float)
    return value


def grid(space: Space) -> list[Params]:
    """Lists every combination of the listed values once. From one combination to the next, the last key's value changes first."""
    return _combinations(space, {key: domain.values for key, domain in space.items()})


def _combinations(space: Space, values: dict[str, list[object]]) -> list[Params]:
    points = [Params()]
    for key, domain in space.items():
        points = [p | chosen for p in points for chosen in ([{key: v} for v in values[key]] if holds(domain, p) else [{}])]
    return points


# checking ------------------------------------------------------------------------------------------------------------


def extremes(domain: Domain) -> list[object]:
    """Lists the domain's two bounds, or all values of a listed domain."""
    return list(domain.values) if domain.listed else [fit(domain, bound) for bound in domain.numbers[:2]]


def corners(space: Space) -> list[Params]:
    """Lists the combinations of all domains' extremes. If there are more than ALL, only two keys vary at a time, and the other
    keys have their first value."""
    edges = {key: extremes(domain) for key, domain in space.items()}
    if math.prod(len(e) for e in edges.values()) <= ALL:
        return _combinations(space, edges)
    points: dict[str, Params] = {}
    for pair in itertools.combinations(edges, 2):
        some = {key: values if key in pair else values[:1] for key, values in edges.items()}
        points |= {repr(p): p for p in _combinations(space, some)}
    return list(points.values())


# population based training -------------------------------------------------------------------------------------------


def explore(space: Space, params: Params, rng: np.random.Generator, resample: float) -> Params:
    """Perturbs `params`. Each value is drawn again with probability `resample`. Otherwise a number is multiplied by 0.8 or 1.2,
    and a listed value is replaced by its neighbor in the list."""
    new = dict(params)
    for key in params:
        domain = space[key]
        if rng.random() < resample:
            new[key] = sample(domain, rng)
        elif domain.listed:
            place = domain.values.index(params[key]) + int(rng.choice([-1, 1]))
            new[key] = domain.values[min(len(domain.values) - 1, max(0, place))]
        else:
            new[key] = fit(domain, number(params[key]) * float(rng.choice([0.8, 1.2])))
    return new
