"""Holds the plan to published runs, by hand: prints the table of docs/plan.md, counts the models again, fits the efficiencies.

python -m tests.benchmarks.plan_published            # every run, measured and planned, and the errors
python -m tests.benchmarks.plan_published --count    # counts the operations of the table's models again (two minutes)
python -m tests.benchmarks.plan_published --fit      # fits prices.yaml's efficiencies, and to all but each source in turn
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import numpy as np
from heliostat.plan import hardware
from scipy.optimize import least_squares

from tests.unit import published

# what is fitted: (keys in prices.yaml, least, most)
FITTED = [
    (("efficiency", "A100", "matmul"), 0.4, 0.95),
    (("efficiency", "A100", "attention"), 0.2, 0.9),
    (("efficiency", "A100", "convolution"), 0.1, 0.9),
    (("efficiency", "A100", "memory"), 0.4, 0.95),
    (("efficiency", "H100", "matmul"), 0.4, 0.95),
    (("efficiency", "H100", "attention"), 0.15, 0.9),
    (("efficiency", "H100", "memory"), 0.4, 0.95),
    (("efficiency", "other", "fused"), 0.1, 1.0),
    (("network", "overlap"), 0.5, 0.95),
]


def at(prices: dict[str, Any], values: Any) -> dict[str, Any]:
    """The price table with other values of what is fitted."""
    made = copy.deepcopy(prices)
    for (path, _, _), value in zip(FITTED, values, strict=True):
        target = made
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = float(value)
    return made


def fit(prices: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Least absolute errors of the logarithm, softened; a run of a source with many counts as one of a source with few."""
    often: dict[str, int] = {}
    for run in runs:
        often[run["source"]] = often.get(run["source"], 0) + 1
    weights = np.array([often[run["source"]] ** -0.25 for run in runs])
    start = [0.5 * (low + high) for _, low, high in FITTED]

    def residuals(values: Any) -> Any:
        errors = np.array([np.log1p(published.error(run, at(prices, values))) for run in runs])
        held = 0.02 * (values - start) / start  # what no run says stays in the middle
        return np.concatenate([weights * errors, held])

    bounds = ([low for _, low, _ in FITTED], [high for _, _, high in FITTED])
    return at(prices, least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1).x)


def errors(prices: dict[str, Any], runs: list[dict[str, Any]]) -> list[float]:
    return [published.error(run, prices) for run in runs]


def line(name: str, found: list[float]) -> str:
    sizes = np.abs(found)
    return f"| {name} | {len(found)} | {np.median(sizes):.1%} | {sizes.max():.1%} |"


def show(prices: dict[str, Any]) -> None:
    print("| source | model | length | device | workers | measured | planned | error |\n|---|---|---|---|---|---|---|---|")
    for run in published.RUNS:
        said, name = published.planned(run, prices), run["device"].partition(" of ")[0]
        model = run["model"] + (", compiled" if run.get("compile") else "")
        print(
            f"| {run['source']} | {model} | {run.get('length', '')} | {name} | "
            f"{run['workers']} | {run['measured']:,.0f} | {said:,.0f} | {said / run['measured'] - 1:+.0%} |"
        )
    print("\n| source | runs | median error | worst |\n|---|---|---|---|")
    sources = list(dict.fromkeys(run["source"] for run in published.RUNS))
    for source in sources:
        print(line(source, errors(prices, [r for r in published.RUNS if r["source"] == source])))
    print(line("all", errors(prices, published.RUNS)))


def held_out(prices: dict[str, Any]) -> None:
    """Each source's errors under a fit to all the others."""
    print("\n| left out | runs | median error | worst |\n|---|---|---|---|")
    together: list[float] = []
    for source in dict.fromkeys(run["source"] for run in published.RUNS):
        rest = [r for r in published.RUNS if r["source"] != source]
        left = errors(fit(prices, rest), [r for r in published.RUNS if r["source"] == source])
        together += left
        print(line(source, left))
    print(line("all", together))


def count() -> None:
    runs = {published.key(run): run for run in published.RUNS}
    found = {key: json.dumps(published.count(run["model"], run.get("length"))) for key, run in sorted(runs.items())}
    published.COUNTED.write_text("{\n" + ",\n".join(f'  "{k}": {v}' for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    if "--count" in sys.argv:
        count()
    table = hardware.table()
    if "--fit" in sys.argv:
        table = fit(table, published.RUNS)
        for path, _, _ in FITTED:
            value: Any = table
            for key in path:
                value = value[key]
            print(".".join(path), round(value, 3))
        held_out(table)
    show(table)
