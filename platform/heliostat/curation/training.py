"""Trains a quality classifier from two folders of examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from heliostat import extras
from heliostat.curation import linear, readers, registry
from heliostat.curation.pdf import is_pdf
from heliostat.curation.stage import Dropped, Work
from heliostat.errors import ConfigError


def train(
    good: Path, bad: Path, to: Path, ngrams: int = 2, bits: int = 18, chars: int = 10_000, held_out: float = 0.2
) -> linear.TrainingReport:
    """Trains a classifier on the documents of two folders, writes the classifier to a third folder, and returns the report on
    the training.

    The report has precision and recall on held-out documents, and the number of unreadable documents, by reason. ConfigError if a
    folder has too few documents, or if the output folder isn't empty.
    """
    others = sorted({p.name for p in to.iterdir()} - {linear.ABOUT, linear.WEIGHTS}) if to.is_dir() else []
    if others or to.is_file():
        raise ConfigError(f"--out: {str(to)!r} {f'contains {others[0]!r}' if others else 'is a file'}. Pass a new folder")
    extras.require("curation", "sklearn", "scipy", what="training a classifier")
    left_out = dict[str, int]()
    texts = [list(_texts(folder, left_out)) for folder in (good, bad)]
    scorer, report = linear.train(texts[0], texts[1], ngrams=ngrams, bits=bits, chars=chars, held_out=held_out)
    report["left_out"] = left_out
    scorer.save(to, report)
    return report


def _texts(folder: Path, left_out: dict[str, int]) -> Iterator[str]:
    """Yields the texts of a folder's files of known kinds; pages and PDFs use the stages' defaults."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    if not paths:
        raise ConfigError(f"{str(folder)!r} contains no files. Pass a folder with examples")
    opened = dict[str, Work]()  # created for the first document of a kind, because they need more packages than texts
    for path in paths:
        with path.open("rb") as stream:
            for item in readers.read(str(path), stream, readers.Limits()):
                if not isinstance(item, Dropped) and isinstance(item.text, bytes):
                    stage = "pdf" if is_pdf(item.text) else "extract"
                    if stage not in opened:
                        opened[stage] = registry.parse({"stage": stage}).open()
                    (document,) = opened[stage]([item])
                    item = document.document or Dropped(item.id, document.reason)
                if isinstance(item, Dropped):
                    left_out[item.reason] = left_out.get(item.reason, 0) + 1
                else:
                    assert isinstance(item.text, str)
                    yield item.text
