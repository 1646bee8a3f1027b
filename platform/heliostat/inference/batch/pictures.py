"""Reads the images of a batch inference like the image pipeline, but doesn't require captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from heliostat.curation import pieces
from heliostat.curation.images import planning, sources
from heliostat.curation.images.sources import ImageColumns, ImageLimits
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import DocumentSource
from heliostat.curation.stage import Document, Dropped, Picture
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow


@dataclass(frozen=True)
class Pictures:
    """Lists the files of an image input, and divides these files into pieces (`planning.parts`)."""

    input: str
    column: str
    keep: tuple[str, ...]

    @property
    def columns(self) -> ImageColumns:
        return ImageColumns(image=self.column, others=self.keep)

    @property
    def identity(self) -> dict[str, object]:
        return vars(self.columns)

    def listing(self) -> list[InputFile]:
        return sources.listing(self.input)

    def pieces(self, flow: Flow, files: list[InputFile]) -> Iterator[list[FilePart]]:
        target = flow.work.begin(pieces.size(sum(f.bytes for f in files)))
        yield from ([part] for part in planning.parts(flow, self.input, files, self.columns, ImageLimits.file, target))

    def source(self, flow: Flow) -> DocumentSource:
        return PictureSource(self.input, self.columns, flow.work.spill)


@dataclass(frozen=True)
class PictureSource:
    """Reads the images of one piece of the input."""

    by_text: ClassVar[bool] = False

    input: str
    columns: ImageColumns
    spill: Location

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        for raw in sources.read(self.input, planning.task_of(self.spill, part), self.columns):
            if isinstance(raw, Dropped):
                yield raw
            elif raw.image is None:
                yield Dropped(raw.id, "no_image")
            else:
                yield Document(raw.id, raw.caption or "", raw.columns, Picture(raw.image))

    def finish(self, document: Document) -> Document | Dropped:
        return document
