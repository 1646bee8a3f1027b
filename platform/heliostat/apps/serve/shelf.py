"""Finds passages in an index, and writes the prompt from which a model answers a question with these passages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from heliostat.apps.search import answering
from heliostat.apps.search.reranking import Reranker, best
from heliostat.apps.search.search import Passage, SearchIndex
from heliostat.apps.serve.asks import Search
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location
from heliostat.web.refusals import Refusal

log = logging.getLogger(__name__)


class Shelf:
    """Opens an index for searches and for prompts with its passages.

    Raises ConfigError if the index has embeddings and the index's embedder is missing.
    """

    def __init__(self, index: str, embedder: str | None, reranker: str | None = None) -> None:
        self.index = SearchIndex(Location(index), Path(embedder) if embedder else None)
        if "dense" in self.index.modes:
            self.index.embedder  # noqa: B018 (resolves its folder, and compares it with the index's record)
        self.reranker = Reranker(Path(reranker)) if reranker else None

    async def search(self, request: Search) -> list[Passage]:
        """Returns passages, each with the columns of its document.

        Raises Refusal if the question is empty or too long, the index doesn't support the mode, or a part of the index is
        missing.
        """
        return await asyncio.to_thread(self._search, request)

    def _search(self, request: Search) -> list[Passage]:
        if not request.question.strip():
            raise Refusal(400, "the question is empty", None, "invalid_value")
        mode = request.mode or self.index.modes[0]
        if mode not in self.index.modes:
            said = f"mode: {mode!r}: the index has no embeddings. Use {', '.join(self.index.modes)}"
            raise Refusal(400, said, "mode", "invalid_value")
        try:
            passages = best(self.index, self.reranker, request.question, mode, request.top)
            return [{**passage, "columns": self.index.columns(passage["document"])} for passage in passages]
        except ConfigError as e:
            raise Refusal(400, str(e), None, "invalid_value") from e
        except DataError as e:
            log.error("%s", e)
            said = "a part of the served index is missing, or the index was replaced more than a day ago. Restart the endpoint"
            raise Refusal(503, said, None, "index_gone") from e

    async def prompt(self, request: Search, room: int | None, count: Callable[[str], int]) -> tuple[str, list[Passage]]:
        """Returns a prompt that contains the question and the passages found for this question. Also returns these passages as
        sources.

        `room`: maximum tokens of the prompt; None means no limit. `used` of a source: how much of the passage is in the prompt
        (`whole`, `part`, or `no`). Raises Refusal if the search finds nothing, or the question doesn't fit.
        """
        if room is not None and room < 1:
            said = f"max_tokens: leaves no room for the question. Lower max_tokens by at least {1 - room:,}"
            raise Refusal(400, said, "max_tokens", "context_length_exceeded")
        passages = await self.search(request)
        if not passages:
            raise Refusal(
                404, "no passage of the index contains a word of the question. Use other words", "messages", "no_passage"
            )
        try:
            written = await asyncio.to_thread(answering.prompt, request.question, passages, room, count)
        except ConfigError as e:
            raise Refusal(400, str(e), "messages", "context_length_exceeded") from e
        used = ["whole"] * written.used + ["no"] * (len(passages) - written.used)
        if written.cut:
            used[written.used - 1] = "part"
        return written.text, [{**passage, "used": how} for passage, how in zip(passages, used, strict=True)]
