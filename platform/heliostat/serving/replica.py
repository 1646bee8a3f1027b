"""Answers what the front asks, with one version of the model: a replica of Ray Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.serving.refusals import Refusal

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Ask:
    """Holds what is asked of a replica: prompts, or a chat's messages; the i-th prompt has the i-th seed.

    `most`: new tokens, None for as many as there is room for up to `limit`.
    """

    prompts: list[str] | None
    messages: Messages | None
    most: int | None
    limit: int
    temperature: float
    top_p: float
    seeds: list[int]
    stops: list[str]
    logprobs: int | None = None
    suffix: str = ""


class Replica:
    """Loads the model, and answers."""

    def __init__(self, folder: str, batch: int) -> None:
        from heliostat.inference.batch.engines import Loaded
        from heliostat.serving.confined import confine
        from heliostat.serving.engine import Engine

        confine()
        self.engine = Engine(Loaded(Path(folder)), batch)

    def check_health(self) -> None:
        """Raises if the engine's thread has ended: Ray Serve puts another replica in the place of this one."""
        if not self.engine.thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    async def answer(self, ask: Ask) -> dict[str, Any]:
        """Answers all prompts: `answers`, or `refused`."""
        made: list[dict[str, Any]] = [{"text": "", "logprobs": None} for _ in ask.seeds]
        async for item in self.stream(ask):
            if "piece" not in item:
                return item
            _add(made[item["index"]], item["piece"])
        return {"answers": made}

    async def stream(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """Yields pieces (`index`, `piece`) of the answers to all prompts as they come; or one item, `refused`."""
        try:
            rows, pieces = await asyncio.to_thread(self._rows, ask, asyncio.get_running_loop())
        except Refusal as e:
            yield {"refused": e.args}
            return
        self.engine.begin(rows)
        try:
            left = len(rows)
            while left:
                index, piece = await pieces.get()
                if "failed" in piece:
                    yield {"refused": (500, f"the model failed: {piece['failed']}")}
                    return
                left -= "finish" in piece
                yield {"index": index, "piece": piece}
        finally:
            for row in rows:  # those that nobody waits for any more
                row.over = True

    async def embed(self, texts: list[str]) -> dict[str, Any]:
        """Embeds texts: `answers`, or `refused`."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[dict[str, Any]] = loop.create_future()

        def settle(made: dict[str, Any]) -> None:
            if not found.done():
                found.set_result(made)

        def deliver(made: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(settle, made)

        self.engine.embedded(texts, deliver)
        made = await found
        if "failed" in made:
            return {"refused": (500, f"the model failed: {made['failed']}")}
        for number, answer in enumerate(made["answers"]):
            if answer.bad:
                status = 500 if answer.bad == "failed" else 400
                return {"refused": (status, f"input.{number}: {answer.detail}", "input")}
            if answer.values["truncated"]:
                said = f"input.{number}: is longer than the {self.engine.loaded.longest} tokens that the model takes"
                return {"refused": (400, said, "input", "context_length_exceeded")}
        values = [answer.values for answer in made["answers"]]
        return {"answers": [{"embedding": v["embedding"].tolist(), "tokens": v["tokens"]} for v in values]}

    def _rows(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> tuple[list[Any], asyncio.Queue]:
        """Makes rows of the prompts' tokens; Refusal if there is none, or no room for them."""
        from heliostat.serving.engine import Row
        from heliostat.serving.sampling import Draw
        from heliostat.serving.stopping import Stopping

        pieces: asyncio.Queue = asyncio.Queue()

        def deliver(index: int) -> Callable[[dict[str, Any]], None]:
            return lambda piece: _put(loop, pieces, (index, piece))

        encoded = (
            [self._chat(ask.messages)] if ask.messages is not None else [self._prompt(p, ask.suffix) for p in ask.prompts or []]
        )
        where = "prompt" if ask.messages is None else "messages"
        return [
            Row(tokens, self._most(ask, tokens, where), Draw(ask.temperature, ask.top_p, seed), Stopping(ask.stops), deliver(i),
                ask.logprobs)
            for i, (tokens, seed) in enumerate(zip(encoded, ask.seeds, strict=True))
        ], pieces  # fmt: skip

    def _prompt(self, text: str, suffix: str) -> list[int]:
        if suffix:
            if self.engine.infilling is None:
                from heliostat.recipes.text import infilling

                raise Refusal(400, f"suffix: {infilling.NONE}", "suffix", "no_fill_in_the_middle")
            return self.engine.infilling.prompt(text, suffix)
        tokenizer = self.engine.loaded.tokenizer
        if not (tokens := tokenizer(text or tokenizer.bos_token or "", verbose=False)["input_ids"]):
            raise Refusal(400, "prompt: is empty, and the tokenizer has no token that begins a document", "prompt")
        return tokens

    def _chat(self, messages: Messages) -> list[int]:
        tokenizer = self.engine.loaded.tokenizer
        if not tokenizer.chat_template:
            raise Refusal(400, "the model's tokenizer has no chat template; ask /v1/completions", "messages", "no_chat_template")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # whatever the template raises: it is of the model's maker
            raise Refusal(400, f"messages: the model's chat template refuses them: {str(e)[:200]}", "messages") from e
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _most(self, ask: Ask, tokens: list[int], where: str) -> int:
        """Returns how many tokens an answer may have; Refusal if the model has no room for them."""
        longest = self.engine.loaded.longest
        room = ask.limit if longest is None else longest - len(tokens)
        wanted = min(room, ask.limit) if ask.most is None else ask.most
        if wanted < 1 or wanted > room:
            said = f"{where}: {len(tokens)} tokens, and {max(wanted, 1)} for the answer: the model takes {longest} together"
            raise Refusal(400, said, where, "context_length_exceeded")
        return wanted


def _put(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue, item: tuple[int, dict[str, Any]]) -> None:
    """Puts a piece into a queue, from the engine's thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, item)


def _add(made: dict[str, Any], piece: dict[str, Any]) -> None:
    """Adds a piece to what came before it."""
    text, told, new = made["text"] + piece["text"], made["logprobs"], piece["logprobs"]
    if told and new:
        new = {name: told[name] + new[name] if told[name] is not None else None for name in told}
    made.update(piece, text=text, logprobs=new or told)
