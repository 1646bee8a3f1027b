"""Recognizes the subject and the style of small pictures, from the real pictures of a dataset.

- Subject: the label of the nearest real picture, by the correlation of their edges. Each picture is compared at nine positions,
  which are one pixel apart, as if the real pictures were augmented by shifts. Colors don't count.
- Style: a support vector machine on the histogram of colors. It trains on each real picture three times: as it is, with noise,
  and blurred with noise. Generated pictures have a little noise, which people don't see, and some are less sharp.

Both are deterministic, and take seconds for some thousand pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heliostat.errors import ConfigError

LEVELS = 6  # per color channel of the histogram
SHIFTS = (-1, 0, 1)  # pixels
NOISE = 6.0  # standard deviation of the noise, of 255
TOP = 5


@dataclass(frozen=True)
class LabeledPictures:
    """Contains pictures, uint8 [n, height, width, channels], with the caption, the subject, and the style of each picture."""

    pictures: np.ndarray
    captions: list[str]
    subjects: list[str]
    styles: list[str]


class PictureJudge:
    def __init__(self, known: LabeledPictures) -> None:
        """Learns from real pictures. Raises ConfigError if they have no labels, or fewer than two styles."""
        from sklearn.svm import SVC

        if not all(known.subjects) or len(set(known.styles)) < 2:
            raise ConfigError(
                "model.samples.held_out: needs datasets with labels and at least two styles. "
                "Prepare the datasets from drawings:openmoji"
            )
        self.subjects = sorted(set(known.subjects))
        self._subject = np.array([self.subjects.index(one) for one in known.subjects])
        self._edges = edges(known.pictures)
        copies = (known.pictures, noisy(known.pictures), noisy(blurred(known.pictures)))
        colors = np.concatenate([histograms(one) for one in copies])
        self._styles = SVC(C=10.0, gamma="scale").fit(colors, known.styles * len(copies))

    def ranked(self, pictures: np.ndarray) -> list[list[str]]:
        """Ranks the TOP most likely subjects of each picture."""
        best = np.full((len(pictures), len(self._edges)), -1.0, np.float32)
        for rows in SHIFTS:
            for columns in SHIFTS:
                np.maximum(best, edges(shifted(pictures, rows, columns)) @ self._edges.T, out=best)
        by_subject = np.full((len(pictures), len(self.subjects)), -1.0, np.float32)
        for subject in range(len(self.subjects)):
            by_subject[:, subject] = best[:, self._subject == subject].max(1)
        order = np.argsort(-by_subject, axis=1, kind="stable")[:, :TOP]
        return [[self.subjects[i] for i in row] for row in order]

    def styles(self, pictures: np.ndarray) -> list[str]:
        """Recognizes the style of each picture."""
        predicted: list[str] = self._styles.predict(histograms(pictures)).tolist()
        return predicted

    def accuracy(self, wanted: LabeledPictures, pictures: np.ndarray) -> dict[str, float]:
        """Returns the shares of pictures whose subject is the most likely (`top1`) or one of the five most likely (`top5`), and
        whose style is right (`style`). `wanted`: the subject and style of each picture."""
        ranked = self.ranked(pictures)
        return {
            "top1": float(np.mean([one[0] == subject for one, subject in zip(ranked, wanted.subjects, strict=True)])),
            "top5": float(np.mean([subject in one for one, subject in zip(ranked, wanted.subjects, strict=True)])),
            "style": float(np.mean([a == b for a, b in zip(self.styles(pictures), wanted.styles, strict=True)])),
        }


def edges(pictures: np.ndarray) -> np.ndarray:
    """Returns the strength of the edges in pictures, smoothed, as unit vectors with mean zero, float32 [n, height * width]."""
    gray = pictures.astype(np.float32).mean(-1)
    down, right = np.zeros_like(gray), np.zeros_like(gray)
    down[:, :-1], right[:, :, :-1] = np.diff(gray, axis=1), np.diff(gray, axis=2)
    strength = smoothed(np.sqrt(down**2 + right**2)).reshape(len(gray), -1)
    strength -= strength.mean(1, keepdims=True)
    return strength / np.maximum(np.linalg.norm(strength, axis=1, keepdims=True), 1e-6)


def histograms(pictures: np.ndarray) -> np.ndarray:
    """Returns the square roots of the shares of colors, float32 [n, LEVELS^channels]."""
    levels = pictures.astype(np.int64) * LEVELS // 256
    flat = levels.reshape(len(pictures), -1, pictures.shape[-1])
    codes = flat @ LEVELS ** np.arange(pictures.shape[-1])
    counts = np.stack([np.bincount(row, minlength=LEVELS ** pictures.shape[-1]) for row in codes])
    return np.sqrt(counts / codes.shape[1]).astype(np.float32)


def noisy(pictures: np.ndarray) -> np.ndarray:
    """Adds normal noise of NOISE to pictures. Returns uint8."""
    noise = np.random.Generator(np.random.Philox(0)).normal(0, NOISE, pictures.shape)
    return (pictures + noise).round().clip(0, 255).astype(np.uint8)


def blurred(pictures: np.ndarray) -> np.ndarray:
    """Averages each pixel with its eight neighbors. Returns float32."""
    return np.moveaxis(np.stack([smoothed(pictures[..., c].astype(np.float32)) for c in range(pictures.shape[-1])]), 0, -1)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Averages each value with its eight neighbors, float32 [n, height, width]. Values outside are those of the border."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)), "edge")
    height, width = values.shape[1:]
    windows = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray(np.mean(windows, axis=0))


def shifted(pictures: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Shifts pictures by at most one pixel. New pixels are those of the border."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    height, width = pictures.shape[1:3]
    return padded[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]
