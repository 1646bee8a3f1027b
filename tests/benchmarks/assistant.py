"""Draws the figure of docs/tutorials/assistant.md: held-out accuracy of the base and of both models, and the losses of both runs.

    python -m tests.benchmarks.assistant --mlflow sqlite:///.heliostat/mlflow.db [--figure docs/images/assistant.svg]

Run it in the tutorial's folder, after the tutorial. It reads base.json, sft.json, and dpo.json, the results of `heliostat model
benchmark`.
"""

import json
from pathlib import Path
from typing import Any

import mlflow

from tests.benchmarks import harness

MODELS = {"base.json": "SmolLM2-135M", "sft.json": "after SFT", "dpo.json": "after DPO"}


def losses(client: mlflow.MlflowClient, run_id: str, metric: str) -> tuple[list[int], list[float]]:
    """Returns the steps and the values of a metric of a run."""
    points = client.get_metric_history(run_id, metric)
    return [p.step for p in points], [p.value for p in points]


def draw(results: dict[str, dict[str, Any]], curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "heliostat"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    rows = [result["tasks"][0] for result in results.values()]
    scores = [row["score"] for row in rows]
    errors = [[row["score"] - row["low"] for row in rows], [row["high"] - row["score"] for row in rows]]
    bars = axes[0].bar(list(results), scores, yerr=errors, capsize=6, color=["#8c959f", "#1f77b4", "#d1495b"])
    axes[0].bar_label(bars, [f"{score:.0%}" for score in scores], label_type="center", color="white")
    axes[0].set(ylim=(0, 1), ylabel="held-out exercises solved")
    axes[0].set_title(f"accuracy, 95 % intervals (n = {rows[0]['examples']})", fontsize=9)
    for axis, (title, (steps, values)), color in zip(axes[1:], curves.items(), ("#1f77b4", "#d1495b"), strict=True):
        axis.plot(steps, values, color=color)
        axis.set(xlabel="step", ylim=(0, None))
        axis.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    options = harness.arguments(
        __doc__, mlflow="sqlite:///.heliostat/mlflow.db", figure={"type": Path, "default": Path("docs/images/assistant.svg")}
    )
    results = {name: json.loads(Path(file).read_text()) for file, name in MODELS.items()}
    client = mlflow.MlflowClient(tracking_uri=options.mlflow)
    sft, dpo = (results[MODELS[file]]["model"]["run_id"] for file in ("sft.json", "dpo.json"))
    curves = {
        "SFT: loss, nats per trained token": losses(client, sft, "train/loss"),
        "DPO: loss": losses(client, dpo, "train/loss"),
    }
    draw(results, curves, options.figure)
    print("| model | score | 95 % |\n|---|---:|---|")
    for name, result in results.items():
        row = result["tasks"][0]
        print(f"| {name} | {row['score']:.3f} | {row['low']:.2f} to {row['high']:.2f} |")


if __name__ == "__main__":
    main()
