"""Scores generated images by comparing them with real images of the datasets, in the features of frozen models.

Held-out images show how good generated images could be: FID, KID, CMMD, precision, recall, density, coverage, and the CLIP score.
Training images show memorization. Compare only values with the same extractor and the same numbers of images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from heliostat.data.dataset import Dataset
from heliostat.data.order import SamplePlaces
from heliostat.errors import ConfigError
from heliostat.recipes import intervals
from heliostat.recipes.comparing import Arrays, Numbered, WorkerPart
from heliostat.recipes.images import distances, extractors, neighbors
from heliostat.recipes.images.config import Samples
from heliostat.recipes.images.grids import grid, png
from heliostat.recipes.intervals import Estimate

log = logging.getLogger(__name__)

HELD_OUT, TRAINING = "held_out", "training"  # sets of real images
PIXELS = 16  # side of the thumbnails in which distances of pixels are measured
SHOWN = 8  # generated images in the picture of nearest training images

Decode = Callable[[pa.Table, torch.device | str], list[np.ndarray]]  # rows of a dataset -> uint8 images
WITH_FEATURES = ("kid", "precision", "recall", "density", "coverage", "memorized", "memorized_pixels")
WITH_CLIP = ("cmmd", "clip_score")


def require(samples: Samples) -> None:
    """Raises ConfigError if a model for comparing images is missing. Loads no weights."""
    if samples.features:
        extractors.require(samples.features.extractor)
    if samples.clip:
        extractors.require_clip(samples.clip.pretrained)


def of_export(samples: dict[str, Any]) -> dict[str, Any]:
    """Removes the keys of `samples` whose scores an exported model can't have here, each with a warning: `features` and `clip` if
    this machine doesn't have their models, and `held_out`, whose judge learns from the training dataset."""
    out = dict(samples)
    if out.pop("held_out", None):
        log.warning("model.samples.held_out: left out, because its scores need the training dataset. See the scores of the run")
    for key in ("features", "clip"):
        if out.get(key):
            try:
                require(Samples.model_validate({key: out[key]}))
            except ConfigError as e:
                log.warning("%s. The scores of model.samples.%s are left out", e, key)
                del out[key]
    return out


def sets(samples: Samples) -> tuple[str, ...]:
    """Returns the names of the sets of real images that a job compares its images with."""
    return (HELD_OUT, TRAINING) if samples.features else (HELD_OUT,) if samples.clip else ()


def names(samples: Samples) -> tuple[str, ...]:
    """Returns the names of all scores that `ImageQuality.compare` can return, with the bounds of intervals."""
    estimated: list[str] = []
    counted = ["real_images", "generated_images"] if sets(samples) else []
    if samples.features:
        estimated += WITH_FEATURES
        estimated += ["fid"] if samples.features.small_fid or _enough(samples) else []
        counted.append("training_images")
    if samples.clip:
        estimated += WITH_CLIP
        counted.append("clip_score_real")
    return tuple(f"{name}{bound}" for name in estimated for bound in ("", "_low", "_high")) + tuple(counted)


def _enough(samples: Samples) -> bool:
    """Checks whether a job generates enough images for FID. Returns True if the number of features is unknown."""
    assert samples.features
    width = extractors.width(samples.features.extractor)
    return width is None or len(samples.prompts) * samples.per_prompt >= width


class ImageQuality:
    def __init__(self, samples: Samples, prompt_of: Callable[[int], str], decode: Decode) -> None:
        """Prepares the comparison. The first use loads the models.

        `prompt_of`: returns the prompt of a generated image. `decode`: converts rows of a dataset to images.
        """
        self.samples, self.prompt_of, self.decode = samples, prompt_of, decode
        self.limits = [part.images for part in (samples.features, samples.clip) if part]
        self._sides: dict[str, distances.RealSide] = {}
        self._warned = set[str]()

    @cached_property
    def extractor(self) -> extractors.Extractor | None:
        return extractors.load(self.samples.features.extractor) if self.samples.features else None

    @cached_property
    def clip(self) -> extractors.ClipModel | None:
        return extractors.ClipModel(self.samples.clip.pretrained) if self.samples.clip else None

    # features, on every worker ---------------------------------------------------------------------------------------

    def real_features(self, name: str, dataset: Dataset, worker: WorkerPart) -> list[Numbered]:
        """Computes the features of a worker's part of the held-out or training images. Leaves out images that can't be read."""
        places = self.places(dataset, name)
        mine = np.array_split(np.arange(len(places)), worker.parts)[worker.number]
        out: list[Numbered] = []
        with extractors.on(worker.device, *self._models()):
            for numbers, content in _read(dataset, places, mine):
                for first in range(0, len(numbers), extractors.AT_ONCE):
                    rows = slice(first, first + extractors.AT_ONCE)
                    part = content.slice(first, extractors.AT_ONCE)
                    captions = [text or "" for text in part["caption"].to_pylist()] if "caption" in part.column_names else None
                    arrays = self._arrays(self.decode(part, worker.device), captions, with_clip=name == HELD_OUT)
                    out.append((numbers[rows], {**arrays, "number": numbers[rows]}))
                    worker.progressed()
        return out

    def drawn_features(self, drawn: Mapping[int, np.ndarray], worker: WorkerPart) -> list[Numbered]:
        """Computes the features of a worker's generated images."""
        numbers, out = sorted(drawn), list[Numbered]()
        with extractors.on(worker.device, *self._models()):
            for first in range(0, len(numbers), extractors.AT_ONCE):
                some = numbers[first : first + extractors.AT_ONCE]
                prompts = [self.prompt_of(n) for n in some]
                out.append((np.array(some), self._arrays([drawn[n] for n in some], prompts, with_clip=True)))
                worker.progressed()
        return out

    def places(self, dataset: Dataset, name: str) -> SamplePlaces:
        """Chooses the first held-out or training images of each dataset, in proportion to the datasets' sizes. Shards are in the
        order of hashes, so these images are a random sample that needs few reads."""
        limit = self.samples.features.images if name == TRAINING and self.samples.features else max(self.limits)
        splits = dataset.order.splits
        per_chunk = [split.train if name == TRAINING else split.held for split in splits]
        parts = []
        for source, count in enumerate(shares([int(n.sum()) for n in per_chunk], limit)):
            ends = np.cumsum(per_chunk[source])
            chunk = np.searchsorted(ends, np.arange(count), side="right")
            within = np.arange(count) - (ends[chunk] - per_chunk[source][chunk])
            rows = splits[source].train_rows if name == TRAINING else splits[source].held_rows
            parts.append((np.full(count, source, np.int16), chunk.astype(np.int32), rows(chunk, within)))
        sources, chunks, row = (np.concatenate(x) for x in zip(*parts, strict=True))
        return SamplePlaces(np.arange(len(row)), sources, np.zeros(len(row), np.int32), chunks, row)

    def _models(self) -> list[Any]:
        return [one.model for one in (self.extractor, self.clip) if one is not None]

    def _arrays(self, pictures: list[np.ndarray], captions: list[str] | None, with_clip: bool) -> Arrays:
        out: Arrays = {}
        if self.extractor:
            out |= {"features": self.extractor(pictures), "pixels": extractors.thumbnails(pictures, PIXELS)}
        if self.clip and with_clip:
            out["clip"] = self.clip(pictures)
            if captions is not None:
                texts, cut = self.clip.captions(captions)
                out |= {"cosine": (out["clip"] * texts).sum(1), "cut": cut}
        return out

    # scores, on the first worker -------------------------------------------------------------------------------------

    def compare(
        self, pictures: list[np.ndarray], drawn: Arrays, real: Mapping[str, Arrays], dataset: Dataset, worker: WorkerPart
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        """Computes all scores, and the picture `nearest`: generated images next to their nearest training images."""
        held_out, training, images = real[HELD_OUT], real.get(TRAINING, {}), dict[str, bytes]()
        if not held_out:
            self._warn("no held-out image can be read, so generated images aren't compared with real images")
            return {}, images
        counts = {"real_images": len(held_out["number"]), "generated_images": len(pictures)}
        estimates: dict[str, Estimate] = {}
        if self.samples.features:
            estimates |= self._distances(drawn["features"], held_out["features"], self.samples.features.small_fid, worker)
            estimates |= neighbors.manifold(held_out["features"], drawn["features"], worker.progressed)
            counts["training_images"] = len(training.get("number", ()))
            if training:
                near = {space: neighbors.nearest(drawn[space], training[space], worker.progressed) for space in
                        ("features", "pixels")}  # fmt: skip
                estimates |= self._memorized(near, held_out, training, worker)
                images["nearest"] = png(self._nearest(pictures, near, training["number"], dataset, worker))
        scores = {key: value for name, one in estimates.items() for key, value in one.named(name).items()}
        if self.samples.clip:
            scores |= self._clip_scores(drawn, held_out, worker)
        return scores | {name: float(count) for name, count in counts.items()}, images

    def _distances(self, drawn: np.ndarray, real: np.ndarray, small_fid: bool, worker: WorkerPart) -> dict[str, Estimate]:
        out: dict[str, Estimate] = {}
        least, width = min(len(drawn), len(real)), drawn.shape[1]
        count = f"{len(drawn):,} generated and {len(real):,} real images"
        if least < 2:
            self._warn(f"KID needs at least two images of each kind, but there are {count}. Generate more images")
            return out
        out["kid"] = self._side("kid", real, distances.polynomial, worker).mmd(drawn, worker.progressed)
        if least >= width or small_fid:
            out["fid"] = distances.fid_estimate(drawn, real, worker.progressed)
        else:
            self._warn(f"FID isn't computed, because {count} are fewer than the {width:,} features, and FID would be much too "
                "large. Generate more images, or set model.samples.features.small_fid: true")  # fmt: skip
        if least <= neighbors.K_DENSITY:
            self._warn(f"precision, recall, density, or coverage are left out, because {count} are too few")
        return out

    def _memorized(
        self, near: dict[str, neighbors.Nearest], held_out: Arrays, training: Arrays, worker: WorkerPart
    ) -> dict[str, Estimate]:
        out = {}
        for space, name in (("features", "memorized"), ("pixels", "memorized_pixels")):
            usual = neighbors.nearest(held_out[space], training[space], worker.progressed).distance
            out[name] = neighbors.memorized(near[space].distance, usual)
        return out

    def _clip_scores(self, drawn: Arrays, held_out: Arrays, worker: WorkerPart) -> dict[str, float]:
        scores: dict[str, float] = {}
        if min(len(drawn["clip"]), len(held_out["clip"])) >= 2:
            side = self._side("cmmd", distances.of_length_one(held_out["clip"]), distances.gaussian, worker)
            mmd = side.mmd(distances.of_length_one(drawn["clip"]), worker.progressed)
            scores |= distances.scaled(mmd).named("cmmd")
        scores |= intervals.mean(drawn["cosine"]).named("clip_score")
        for which, arrays in (("prompts", drawn), ("held-out captions", held_out)):
            if "cut" in arrays and (cut := int(arrays["cut"].sum())):
                self._warn(f"{cut:,} {which} are longer than the CLIP model's maximum. The CLIP score uses their beginnings")
        return scores | ({"clip_score_real": float(held_out["cosine"].mean())} if "cosine" in held_out else {})

    def _side(self, name: str, real: np.ndarray, kernel: distances.Kernel, worker: WorkerPart) -> distances.RealSide:
        if name not in self._sides:
            self._sides[name] = distances.RealSide(real, kernel, worker.progressed)
        return self._sides[name]

    def _nearest(
        self, pictures: list[np.ndarray], near: dict[str, neighbors.Nearest], numbers: np.ndarray, dataset: Dataset,
        worker: WorkerPart,
    ) -> np.ndarray:  # fmt: skip
        """Arranges the generated images that are closest to a training image in rows: the generated image, the nearest training
        image by features, and the nearest training image by pixels."""
        closest = np.argsort(near["features"].distance, kind="stable")[:SHOWN]
        chosen = np.unique([numbers[near[space].index[n]] for space in near for n in closest])
        places, training = self.places(dataset, TRAINING), dict[int, np.ndarray]()
        for places_read, content in _read(dataset, places, chosen):
            training |= dict(zip(places_read.tolist(), self.decode(content, worker.device), strict=True))
        shown = []
        for n in closest:
            shown.append(pictures[n])
            shown += [_fitted(training[int(numbers[near[space].index[n]])], pictures[n]) for space in ("features", "pixels")]
        return grid(shown, 3)

    def _warn(self, text: str) -> None:
        """Logs a warning once per command."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("model.samples: %s", text)


def _read(dataset: Dataset, places: SamplePlaces, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Reads rows, one row group after another. Yields the numbers of the rows that can be read, and these rows. `numbers`: the
    rows' indices in `places`, in ascending order."""
    source, chunk = places.source[numbers], places.chunk[numbers]
    edges = np.flatnonzero((np.diff(source) != 0) | (np.diff(chunk) != 0)) + 1
    for some in np.split(numbers, edges) if len(numbers) else []:
        gathered = dataset.gather(SamplePlaces(*(values[some] for values in vars(places).values())))
        good = np.setdiff1d(np.arange(len(some)), list(gathered.faults))
        if gathered.faults:
            log.warning("%s. The scores leave out %d images", next(iter(gathered.faults.values())), len(gathered.faults))
        if len(good):
            yield some[good], gathered.content.take(pa.array(good))


def _fitted(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Resizes an image to the size of another image."""
    if image.shape == like.shape:
        return image
    shown = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).convert("L" if like.shape[2] == 1 else "RGB")
    return np.asarray(shown.resize((like.shape[1], like.shape[0]))).reshape(like.shape)


def shares(rows: list[int], limit: int) -> list[int]:
    """Divides `limit` images among the datasets in proportion to their sizes.

    If the datasets have fewer images in total, uses all images. The images that remain after rounding down come from the first
    datasets. Returns the number of images per dataset.
    """
    total = max(1, sum(rows))
    taken = [n * min(limit, total) // total for n in rows]
    for i, n in enumerate(rows):
        taken[i] += min(n - taken[i], min(limit, total) - sum(taken))
    return taken
