"""Compares the plan with published runs, by hand: prints the tables of docs/benchmarks/plan.md, counts models, fits constants.

python -m tests.benchmarks.plan_published            # every run, measured and planned, and the errors
python -m tests.benchmarks.plan_published --count    # counts the operations of the table's models again (two minutes)
python -m tests.benchmarks.plan_published --fit      # fits the constants, and fits them to all sources except each one in turn
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from tests.unit import published

HOPPER = ("H100", "H200", "B200")  # planned with the same shares of their own peaks
# what is fitted, by keys in prices.yaml and in runs.yaml's kernels, with the least and the most that can be
CONSTANTS = [
    ([("efficiency", "A100", "matmul")], 0.4, 0.95),
    ([("efficiency", "A100", "attention")], 0.2, 0.65),
    ([("efficiency", "A100", "convolution")], 0.1, 0.9),
    ([("efficiency", "A100", "memory")], 0.4, 0.95),
    ([("efficiency", d, "matmul") for d in HOPPER], 0.4, 0.95),
    ([("efficiency", d, "attention") for d in HOPPER], 0.15, 0.65),
    ([("efficiency", d, "memory") for d in HOPPER], 0.4, 0.95),
    ([("efficiency", "other", "fused")], 0.1, 1.0),
    ([("efficiency", "other", "launch")], 2e-6, 3e-5),
    ([("efficiency", "other", "fp8")], 0.3, 0.95),
    ([("network", "overlap")], 0.5, 1.0),
    ([("network", "hop")], 3e-6, 4e-5),
    ([("kernels", "triton A100"), ("kernels", "triton H100")], 0.2, 1.0),
    ([("kernels", "flash2 H100"), ("kernels", "flash2 H200")], 0.3, 1.0),
]


def at(prices: dict[str, Any], values: Any) -> dict[str, Any]:
    """Returns the price table with other values of the fitted constants."""
    made = copy.deepcopy(prices)
    for (paths, _, _), value in zip(CONSTANTS, values, strict=True):
        for *path, last in paths:
            target = made
            for key in path:
                target = target[key]
            target[last] = float(value)
    return made


def fit(prices: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Minimizes the softened absolute errors of the logarithm. All sources have the same weight, regardless of their number of
    runs."""
    often: dict[str, int] = {}
    for run in runs:
        often[run["source"]] = often.get(run["source"], 0) + 1
    weights = np.array([often[run["source"]] ** -0.25 for run in runs])
    low, high = (np.array([bounds[n] for bounds in CONSTANTS]) for n in (1, 2))

    def residuals(shares: Any) -> Any:
        table = at(prices, low + (high - low) * shares)
        wrong = np.array([np.log1p(published.error(run, table)) for run in runs])
        return np.concatenate([weights * wrong, 0.02 * (shares - 0.5)])  # what no run says stays in the middle

    found = least_squares(residuals, np.full(len(CONSTANTS), 0.5), bounds=(0, 1), loss="soft_l1", f_scale=0.1).x
    return at(prices, low + (high - low) * found)


def errors(prices: dict[str, Any], runs: list[dict[str, Any]]) -> list[float]:
    return [published.error(run, prices) for run in runs]


def line(name: str, found: list[float]) -> str:
    sizes = np.abs(found)
    return f"| {name} | {len(found)} | {np.median(sizes):.1%} | {sizes.max():.1%} |"


def of(source: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["source"] == source]


def show(prices: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    print("\n| source | model | length | device | workers | measured | planned | error |\n|---|---|---|---|---|---|---|---|")
    for run in runs:
        said, name = published.planned(run, prices), run["device"].partition(" ")[0]
        more = [word for word, key in (("compiled", "compile"), ("fp8", "fp8")) if run.get(key)]
        more += [f"{key} {run[key]}" for key in ("tensor", "expert") if key in run]
        print(
            f"| {run['source']} | {', '.join([run['model'], *more])} | {run.get('length', '')} | {name} | "
            f"{run['workers']} | {run['measured']:,.0f} | {said:,.0f} | {said / run['measured'] - 1:+.0%} |"
        )
    print("\n| source | runs | median error | worst |\n|---|---|---|---|")
    for source in dict.fromkeys(run["source"] for run in runs):
        print(line(source, errors(prices, of(source, runs))))
    print(line("all", errors(prices, runs)))


def left_out(prices: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Prints each source's errors under a fit to all the others."""
    print("\n| left out | runs | median error | worst |\n|---|---|---|---|")
    together: list[float] = []
    for source in dict.fromkeys(run["source"] for run in runs):
        mine = of(source, runs)
        found = errors(fit(prices, [run for run in runs if run not in mine]), mine)
        together += found
        print(line(source, found))
    print(line("all", together))


def count() -> None:
    runs = {published.key(run): run for run in [*published.RUNS, *({"model": name} for name in published.FORWARD)]}
    found = {key: json.dumps(published.count(run["model"], run.get("length"))) for key, run in sorted(runs.items())}
    published.COUNTED.write_text("{\n" + ",\n".join(f'  "{k}": {v}' for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    if "--count" in sys.argv:
        count()
    table = published.table()
    if "--fit" in sys.argv:
        table = fit(table, published.FITTED)
        for (path, *_), low, high in CONSTANTS:
            value: Any = table
            for key in path:
                value = value[key]
            print(f"{'.'.join(path)} {value:.3g} of {low:g} to {high:g}")
        left_out(table, published.FITTED)
    show(table, published.FITTED)
    show(table, published.HELD_OUT)
