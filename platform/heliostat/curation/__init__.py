"""Makes datasets from raw text and images: readers, stages, deduplication, shard builders, and provenance.

Start at `prepare`.
May import: `cluster`, `config`, `data`, `recipes`, `storage`, `tasks`.

A pipeline file selects a pipeline with `pipeline: heliostat.pipelines:NAME`. That is this package's earlier name.
"""

from typing import TYPE_CHECKING

from heliostat import extras

if TYPE_CHECKING:
    from heliostat.curation.conversations.pipeline import ConversationPipeline, PreferencePipeline
    from heliostat.curation.images.pipeline import ImagePipeline
    from heliostat.curation.pairs.pipeline import PairPipeline
    from heliostat.curation.references.pipeline import ReferencePipeline
    from heliostat.curation.text.pipeline import TextPipeline

__all__ = ["ConversationPipeline", "ImagePipeline", "PairPipeline", "PreferencePipeline", "ReferencePipeline", "TextPipeline"]
__getattr__, __dir__ = extras.lazy_names(
    __name__,
    {
        "ConversationPipeline": "heliostat.curation.conversations.pipeline",
        "ImagePipeline": "heliostat.curation.images.pipeline",
        "PairPipeline": "heliostat.curation.pairs.pipeline",
        "PreferencePipeline": "heliostat.curation.conversations.pipeline",
        "ReferencePipeline": "heliostat.curation.references.pipeline",
        "TextPipeline": "heliostat.curation.text.pipeline",
    },
)
