"""Trains small text-to-image models with one algorithm changed, and scores their pictures of held-out combinations.

    python -m tests.benchmarks.image_ablation DATA RESULTS [--seeds 1 2 3] [--share 0 1] [--minutes 600] [--variants NAME ...]
    python -m tests.benchmarks.image_ablation DATA RESULTS --table

DATA has the datasets of `pipelines/drawings.yaml` (see `DATASETS`). RESULTS is a JSON Lines file: the program appends a line per
result, and skips runs that are in this file. So you can stop it, and start several with `--share NUMBER COUNT`.

A run is one process in fp32 with heliostat's engine, on an eighth of the subjects. Scores come from two pictures per held-out
combination. The error is that of the velocity on the held-out pictures, at uniform times and with the seed's noise. So it
compares variants whose losses have different weights. Seconds are CPU seconds of training steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from heliostat.config.schedules import factor
from heliostat.data import manifest
from heliostat.data.chunks import Chunks
from heliostat.engine import deepspeed_engine, ema
from heliostat.recipes.images.held_out import labeled
from heliostat.recipes.images.picture_judge import LabeledPictures, PictureJudge
from heliostat.storage.locations import Location
from heliostat.validation import check

from tests.benchmarks import harness
from tests.gpu import setting

JOB = harness.ROOT / "jobs/drawings.yaml"
TRAIN, HELD, SMALL, FEATURES, CAPTIONS = DATASETS = (
    "drawings", "drawings-held-out", "drawings-16", "drawings-features", "drawings-captions"
)  # fmt: skip
SUBJECTS, BATCH, PER_COMBINATION = 8, 16, 2  # every eighth subject
CLEAR = 3  # seeds
GOLDEN = 0.6180339887498949
LENGTHS = (0.05, 0.1, 0.2)  # of averages
CANVAS = {"block_out_channels": [32, 64], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
          "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 64, "time_embedding_dim": 128}  # fmt: skip
SD3 = {"arch": "sd3", "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "patch_size": 1,
       "pos_embed_max_size": 8}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Describes a run. `network`: canvas or sd3. `settings`: of the job. `first`: the dataset of the first half of the steps."""

    network: str = "canvas"
    settings: tuple[str, ...] = ()
    dataset: str = TRAIN
    first: str | None = None


@dataclass(frozen=True)
class Scores:
    """Contains the scores of a run, or of another way to sample from it (`view`)."""

    variant: str
    seed: int
    view: str
    error: float
    top1: float
    top5: float
    style: float
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.view}" if self.view else self.variant


def _sd3(*settings: str, **more: Any) -> Variant:
    return Variant("sd3", settings, **more)


BASES = ("canvas", "sd3")
VARIANTS: dict[str, Variant] = {
    "canvas": Variant(settings=(f"train.ema={{decay: 0.97, lengths: {list(LENGTHS)}}}",)),
    "velocity": Variant(settings=("model.objective={prediction: flow, timesteps: logit_normal, timestep_mean: 0.5}",)),
    "uniform times": Variant(settings=("model.objective={prediction: x, time_floor: 0.5}",)),
    "shift 2": Variant(settings=("model.objective.shift=2.0",)),
    "min-SNR 5": Variant(settings=("model.objective.min_snr=5.0",)),
    "contrastive": Variant(settings=("model.contrastive={weight: 0.05}",)),
    "near noise, 4 candidates": Variant(settings=("model.immiscible={candidates: 4}",)),
    "near noise, groups of 16": Variant(settings=("model.immiscible={group: 16}",)),
    "no caption dropping": Variant(settings=("model.caption_dropout=0.0", "model.samples.guidance=1.0")),
    "captions mixed with the style alone": Variant(
        settings=('model.captions=[{text: "{caption}", weight: 3}, {text: "{style}"}]',), dataset=CAPTIONS
    ),
    "Muon only for matrices": Variant(settings=("model.orthogonal_filters=false",)),
    "no canvas": Variant(settings=("model.backbone.arch=unet",)),
    "sd3": _sd3(),
    "sd3, QK norm": _sd3("model.backbone.qk_norm=rms_norm"),
    "sd3, TREAD": _sd3("model.tread={from: 2, to: 3, share: 0.5}"),
    "sd3, REPA": _sd3("model.repa={layer: 2, weight: 0.5, width: 256}", dataset=FEATURES),
    "sd3, progressive resolution": _sd3(first=SMALL),
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "guidance 1": {"guidance": 1.0},
    "guidance 2": {"guidance": 2.0},
    "guidance 5": {"guidance": 5.0},
    "guidance 5, rescale 0.7": {"guidance": 5.0, "guidance_rescale": 0.7},
    "guidance 5, times 0.2 to 0.9": {"guidance": 5.0, "guidance_interval": (0.2, 0.9)},
}


class Pictures:
    """Reads the datasets of `data`, with the chosen subjects only."""

    def __init__(self, data: Path) -> None:
        self.data = data
        names = sorted(set(self._rows(TRAIN)["label"].to_pylist()))
        self.subjects = pa.array(names[::SUBJECTS])
        self._tables: dict[str, pa.Table] = {}

    def _rows(self, name: str) -> pa.Table:
        source = manifest.read(Location(str(self.data / name)))
        chunks = Chunks([source], None)
        return pa.concat_tables([chunks.read(0, chunk) for chunk in range(source.chunks.num_rows)])

    def table(self, name: str) -> pa.Table:
        if name not in self._tables:
            rows = self._rows(name)
            self._tables[name] = rows.filter(pc.is_in(rows["label"], self.subjects)).sort_by("id")
        return self._tables[name]

    @cached_property
    def judge(self) -> PictureJudge:
        """Returns a judge of all subjects, so that guessing reaches 1 / 153."""
        return PictureJudge(labeled([manifest.read(Location(str(self.data / TRAIN)))]))

    @cached_property
    def real(self) -> LabeledPictures:
        from heliostat.recipes.images.decoding import decoded

        rows = self.table(HELD)
        columns = [rows[name].to_pylist() * PER_COMBINATION for name in ("image", "caption", "label", "style")]
        return LabeledPictures(decoded(columns[0]), *columns[1:])


def checked(pictures: Pictures, variant: Variant, steps: int, seed: int) -> Any:
    text, whiten = pictures.data.parent / "models/all-MiniLM-L6-v2", str(variant.network == "canvas").lower()
    usual = [f"data.path={pictures.data / variant.dataset}", f"model.samples.held_out={pictures.data / HELD}",
             f"model.text={{pretrained: {text}, length: 32, pooling: mean, whiten: {whiten}}}",
             "model.patch=4", "model.samples.steps=8", "mlflow.register=null", "workers.count=1", "train.zero.stage=1",
             "data.virtual_ranks=1", f"train.micro_batch_size={BATCH}", f"train.global_batch_size={BATCH}",
             f"train.steps={steps}", f"train.schedule.warmup_steps={steps // 10}", f"train.seed={seed}", f"data.seed={seed}",
             "train.ema.decay=0.97", f"evaluate.every={steps}", f"checkpoint.every={steps}"]  # fmt: skip
    if variant.network == "sd3":
        usual += [f"model.backbone={SD3}", "model.orthogonal_filters=false"]
    else:
        usual += [f"model.backbone.{key}={value}" for key, value in CANVAS.items()]
    return check.check(check.load_job(JOB, [*usual, *variant.settings]))


def rows_of_steps(count: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the rows of each step: epochs in random order, one after another."""
    generator = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // count)
    order = np.concatenate([generator.permutation(count) for _ in range(epochs)])
    yield from order[: steps * BATCH].reshape(steps, BATCH)


def train(made: Any, pictures: Pictures, variant: Variant) -> tuple[Any, Any, float]:
    """Returns the engine, the averages of the weights, and the CPU seconds of a step."""
    recipe, settings = made.recipe, made.job.train
    engine = deepspeed_engine.build_engine(made.job, recipe)
    averages = ema.of(made.job, engine)
    engine.train()
    began = time.process_time()
    tables = [pictures.table(name) for name in (variant.first or variant.dataset, variant.dataset)]
    for step, rows in enumerate(rows_of_steps(len(tables[1]), settings.steps, settings.seed)):
        deepspeed_engine.set_lr(engine, settings.optimizer.lr * factor(settings.schedule, step, settings.steps))
        batch = recipe.batch(tables[2 * step >= settings.steps].take(pa.array(rows)), step * BATCH + np.arange(BATCH))
        loss = recipe.loss(engine, batch)
        engine.backward(sum((part.weight * part.value for part in loss.parts.values()), loss.sum / BATCH))
        engine.step()
        averages.update(step + 1)
    return engine, averages, (time.process_time() - began) / settings.steps


@torch.no_grad()
def velocity_error(recipe: Any, usual: Any, model: Any, content: pa.Table) -> float:
    """Computes the mean squared error of the velocity on rows, at times that cover [0, 1] evenly. `usual`: the recipe of the
    base, which needs no other columns."""
    batch = usual._completed(usual.batch(content, np.arange(len(content))), training=False)
    t = torch.remainder((batch["key"] + 0.5) * GOLDEN, 1.0).float()
    noisy = recipe.process.noisy(batch["image"], batch["noise"], t)
    velocity = recipe.process.velocity(recipe._predicted(model, batch, t), noisy, t)
    return float((velocity - (batch["noise"] - batch["image"])).square().mean())


def accuracy(recipe: Any, model: Any, pictures: Pictures, changes: dict[str, Any]) -> dict[str, float]:
    gallery = recipe.gallery()
    gallery.prompts, gallery.samples = pictures.real.captions, gallery.samples.model_copy(update=changes)
    with torch.no_grad():
        drawn = gallery.draw(model, "cpu", list(range(len(gallery.prompts))))
    return pictures.judge.accuracy(pictures.real, np.stack(drawn))


def run(pictures: Pictures, name: str, steps: int, seed: int) -> Iterator[Scores]:
    """Trains a variant. Yields its scores; for the canvas, also the scores of other averages and of other guidance."""
    made, usual = (checked(pictures, VARIANTS[one], steps, seed) for one in (name, VARIANTS[name].network))
    torch.manual_seed(seed)
    engine, averages, seconds = train(made, pictures, VARIANTS[name])
    engine.eval()
    views: list[tuple[str, str | None, dict[str, Any]]] = [("", ema.EMA, {})]
    if name == "canvas":
        views += [("no average", None, {})]
        views += [(f"average of length {kind[4:].lstrip('0')} / 1,000", kind, {}) for kind in averages._all if kind != ema.EMA]
        views += [(view, ema.EMA, changes) for view, changes in SAMPLING.items()]
    for view, kind, changes in views:
        averages._averages = averages._all[kind or ema.EMA]
        with averages.applied() if kind else nullcontext():
            error = velocity_error(made.recipe, usual.recipe, engine.module, pictures.table(HELD))
            yield Scores(name, seed, view, error, **accuracy(made.recipe, engine.module, pictures, changes), seconds=seconds)


def known(file: Path) -> list[Scores]:
    return [Scores(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def table(results: list[Scores]) -> None:
    """Prints the mean of each score, and the mean of the differences to the same seed of the base, with their range."""
    by_name: dict[str, dict[int, Scores]] = {}
    for one in results:
        by_name.setdefault(one.name, {})[one.seed] = one
    harness.head("variant", "seeds", "error of the velocity", "top-1", "top-5", "style", "CPU seconds per step")
    for name, runs in by_name.items():
        base = by_name.get(VARIANTS[next(iter(runs.values())).variant].network, {})
        seeds = sorted(set(runs) & set(base))
        if not seeds:
            continue
        cells = [cell([getattr(runs[s], key) for s in seeds], [getattr(base[s], key) for s in seeds], name in BASES)
                 for key in ("error", "top1", "top5", "style")]  # fmt: skip
        harness.row(name, len(seeds), *cells, f"{mean(runs[s].seconds for s in seeds):.3f}")


def cell(values: list[float], base: list[float], is_base: bool) -> str:
    """Formats the mean of a score, and the range of its differences to the base (for the base: of its values). In bold if there
    are CLEAR seeds or more, and the mean difference is larger than this range."""
    differences = values if is_base else [a - b for a, b in zip(values, base, strict=True)]
    low, high = min(differences), max(differences)
    clear = not is_base and len(values) >= CLEAR and abs(mean(differences)) > high - low
    sign = "" if is_base else "+"
    text = f"{mean(values):.3f}" + (f" ({low:{sign}.3f} to {high:{sign}.3f})" if len(values) > 1 else "")
    return f"**{text}**" if clear else text


def main() -> None:
    options = harness.arguments(__doc__, data=Path, results=Path, steps=100, seeds=[1, 2, 3], share=[0, 1],
                                minutes=600.0, variants=[*VARIANTS], table=False)  # fmt: skip
    if not options.table:
        torch.set_num_threads(1)
        setting.start()
        pictures, began = Pictures(options.data), time.monotonic()
        done = {(one.variant, one.seed) for one in known(options.results)}
        cells = [(seed, name) for seed in options.seeds for name in options.variants]
        for seed, name in cells[options.share[0] :: options.share[1]]:
            if (name, seed) in done or time.monotonic() - began > 60 * options.minutes:
                continue
            scored = [json.dumps(asdict(one)) for one in run(pictures, name, options.steps, seed)]
            with options.results.open("a") as file:
                file.write("\n".join(scored) + "\n")
            print(scored[0], flush=True)
    table(known(options.results))


if __name__ == "__main__":
    main()
