"""Provides the pipelines that prepare data, named in a pipeline file as `pipeline: heliostat.pipelines:NAME`."""

from typing import TYPE_CHECKING

from heliostat import lazy

if TYPE_CHECKING:
    from heliostat.pipelines.images.pipeline import ImagePipeline
    from heliostat.pipelines.pairs.pipeline import PairPipeline
    from heliostat.pipelines.text.pipeline import TextPipeline

__all__ = ["ImagePipeline", "PairPipeline", "TextPipeline"]
__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "ImagePipeline": "heliostat.pipelines.images.pipeline",
        "PairPipeline": "heliostat.pipelines.pairs.pipeline",
        "TextPipeline": "heliostat.pipelines.text.pipeline",
    },
)
