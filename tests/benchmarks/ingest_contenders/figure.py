"""Bars of the measured rates: a panel for each kind of sample and store, a group of bars a contender."""

from __future__ import annotations

from pathlib import Path
from statistics import median


def rates(found: dict[tuple[str, str, int, str], list[float]], labels: dict[str, str], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "heliostat"
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((kind, store) for kind, store, _, _ in found))
    counts = sorted({consumers for _, _, consumers, _ in found})
    plot, axes = plt.subplots(len(panels), 1, figsize=(7, 2.4 * len(panels)), squeeze=False, layout="constrained")
    for axis, (kind, store) in zip(axes[:, 0], panels, strict=True):
        names = [n for n in labels if any(key[:2] == (kind, store) and key[3] == n for key in found)]
        for i, consumers in enumerate(counts):
            values = [median(found.get((kind, store, consumers, n), [0.0])) for n in names]
            places = [j + (i - (len(counts) - 1) / 2) * 0.8 / len(counts) for j in range(len(names))]
            axis.barh(places, values, 0.8 / len(counts), label=f"{consumers} consumer{'s' if consumers > 1 else ''}")
        axis.set_yticks(range(len(names)), [labels[n] for n in names])
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
        axis.set_title(f"{kind}, {store}: rows/s", loc="left", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    plot.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
