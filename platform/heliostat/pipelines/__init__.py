"""Provides the pipelines that prepare data, named in a pipeline file as `pipeline: heliostat.pipelines:NAME`."""

from typing import TYPE_CHECKING

from heliostat import lazy

if TYPE_CHECKING:
    from heliostat.curation.images.pipeline import ImagePipeline
    from heliostat.curation.pairs.pipeline import PairPipeline
    from heliostat.curation.text.pipeline import TextPipeline

__all__ = ["ImagePipeline", "PairPipeline", "TextPipeline"]
__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "ImagePipeline": "heliostat.curation.images.pipeline",
        "PairPipeline": "heliostat.curation.pairs.pipeline",
        "TextPipeline": "heliostat.curation.text.pipeline",
    },
)
