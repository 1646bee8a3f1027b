"""Answers prompts and chats with a language model. Embeds texts with the language model or with an embedder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from heliostat.apps.serve.adapters import Adapters, require_base
from heliostat.apps.serve.asks import Ask, Item, Messages
from heliostat.apps.serve.engine import ServingEngine, VllmEngine
from heliostat.apps.serve.row import Deliver, Row, Stopping
from heliostat.errors import ConfigError
from heliostat.inference.batch.engines import LoadedModel
from heliostat.inference.sampling import Draw
from heliostat.recipes.text import chat, infilling
from heliostat.recipes.text.generator import EMPTY, prompt_tokens
from heliostat.web.refusals import Refusal


class Writer:
    """Loads a model into one of the engines, and answers requests with this model."""

    def __init__(self, folder: Path, batch: int, adapters: dict[str, str] | None = None, engine: str = "transformers") -> None:
        self.engine: ServingEngine | VllmEngine
        for name, place in (adapters or {}).items():
            require_base(name, Path(place), folder)
        if engine == "vllm":
            self.engine = VllmEngine(folder, batch, adapters or {})
        else:
            loaded = LoadedModel(folder)
            self.engine = ServingEngine(loaded, batch, Adapters(loaded.model, adapters) if adapters else None)

    def require_alive(self) -> None:
        """Raises the engine's error if the engine no longer answers."""
        self.engine.require_alive()

    def count(self, text: str) -> int:
        """Returns the number of tokens of a prompt."""
        return len(self._prompt(text, ""))

    def room(self, ask: Ask) -> int | None:
        """Returns how many tokens a prompt may have so that the requested answer still fits; None means no limit."""
        longest = self.engine.loaded.longest
        return None if longest is None else longest - (ask.most or 1)

    async def stream(self, ask: Ask) -> AsyncGenerator[Item]:
        """Yields pieces (`index`, `piece`) of the answers to all prompts, as the model generates them.

        Raises Refusal if a prompt is invalid, or the model fails.
        """
        rows, pieces = await asyncio.to_thread(self._rows, ask, asyncio.get_running_loop())
        self.engine.begin(rows)
        try:
            left = len(rows)
            while left:
                index, piece = await pieces.get()
                if "failed" in piece:
                    raise Refusal(500, f"the model failed: {piece['failed']}")
                left -= "finish" in piece
                yield {"index": index, "piece": piece}
        finally:
            for row in rows:  # ends the rows if the client has left
                row.leave()

    async def embed(self, texts: list[str]) -> list[Item]:
        """Embeds texts; returns for each text its `embedding` and its number of `tokens`. Raises Refusal if a text can't be
        embedded."""
        if isinstance(self.engine, VllmEngine):
            said = "model: embeddings aren't supported with vLLM. Start with --engine transformers"
            raise Refusal(400, said, "model", "unsupported_by_model")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Item] = loop.create_future()

        def settle(item: Item) -> None:
            if not future.done():
                future.set_result(item)

        def deliver(item: Item) -> None:
            loop.call_soon_threadsafe(settle, item)

        self.engine.embedded(texts, deliver)
        item = await future
        if "failed" in item:
            raise Refusal(500, f"the model failed: {item['failed']}")
        for number, answer in enumerate(item["answers"]):
            if answer.bad:
                raise Refusal(500 if answer.bad == "failed" else 400, f"input.{number}: {answer.detail}", "input")
            if answer.values["truncated"]:
                said = (
                    f"input.{number}: the text has more than {self.engine.loaded.longest} tokens, the "
                    "model's maximum. Send a shorter text"
                )
                raise Refusal(400, said, "input", "context_length_exceeded")
        values = [answer.values for answer in item["answers"]]
        return [{"embedding": v["embedding"].tolist(), "tokens": v["tokens"]} for v in values]

    def _rows(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> tuple[list[Row], asyncio.Queue[tuple[int, Item]]]:
        """Returns a row for each prompt, and the queue that gets the pieces of all rows.

        Raises Refusal if a prompt is empty or invalid, or if prompt and answer exceed the model's maximum length.
        """
        pieces: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()

        def deliver(index: int) -> Deliver:
            return lambda piece: _put(loop, pieces, (index, piece))

        encoded = (
            [self._chat(ask.messages)] if ask.messages is not None else [self._prompt(p, ask.suffix) for p in ask.prompts or []]
        )
        where = "prompt" if ask.messages is None else "messages"
        return [
            Row(tokens, self._most(ask, tokens, where), Draw(ask.temperature, ask.top_p, seed), Stopping(ask.stops), deliver(i),
                ask.logprobs, ask.adapter)
            for i, (tokens, seed) in enumerate(zip(encoded, ask.seeds, strict=True))
        ], pieces  # fmt: skip

    def _prompt(self, text: str | list[int], suffix: str) -> list[int]:
        if not isinstance(text, str):
            return self._tokens(text, suffix)
        if suffix:
            if self.engine.infilling is None:
                raise Refusal(400, f"suffix: {infilling.NONE}", "suffix", "no_fill_in_the_middle")
            return self.engine.infilling.prompt(text, suffix)
        if not (tokens := prompt_tokens(self.engine.loaded.tokenizer, text)):
            raise Refusal(400, f"prompt: {EMPTY}", "prompt")
        return tokens

    def _tokens(self, tokens: list[int], suffix: str) -> list[int]:
        """Returns a prompt's token ids unchanged; raises Refusal if a token id isn't in the model's vocabulary."""
        if suffix:
            raise Refusal(400, "suffix: needs prompts that are text, not tokens", "suffix", "invalid_value")
        most = self.engine.loaded.config.get_text_config().vocab_size
        if unknown := [token for token in tokens if token >= most]:
            raise Refusal(
                400,
                f"prompt: token {unknown[0]} isn't in the model's vocabulary, which has {most} tokens",
                "prompt",
                "invalid_value",
            )
        return tokens

    def _chat(self, messages: Messages) -> list[int]:
        tokenizer = self.engine.loaded.tokenizer
        if not tokenizer.chat_template:
            raise Refusal(
                400,
                "the model's tokenizer has no chat template. Send the request to /v1/completions",
                "messages",
                "no_chat_template",
            )
        try:
            return chat.encode(tokenizer, messages)
        except ConfigError as e:
            raise Refusal(400, f"messages: {e}", "messages") from e

    def _most(self, ask: Ask, tokens: list[int], where: str) -> int:
        """Returns the maximum number of new tokens; raises Refusal if prompt and answer exceed the model's maximum length."""
        longest = self.engine.loaded.longest
        room = ask.limit if longest is None else longest - len(tokens)
        wanted = min(room, ask.limit) if ask.most is None else ask.most
        if wanted < 1 or wanted > room:
            said = (
                f"{where}: {len(tokens)} tokens and {max(wanted, 1)} tokens for the answer are together more than the model's "
                f"maximum of {longest}"
            )
            raise Refusal(400, said, where, "context_length_exceeded")
        return wanted


def _put(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[tuple[int, Item]], item: tuple[int, Item]) -> None:
    """Puts a piece into a queue of the event loop, from the engine's thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, item)
