"""Answers many requests at a time with one model. In each step, a thread computes one token of every request. If the engine is
vLLM, vLLM computes the tokens instead.

Each request has its own random generator. So the other requests in a batch change only the order of floating-point sums.

The memory limits how many rows are computed together, because the tokens of each row take space in the KV cache. Rows of similar
length share a group, so that a long prompt doesn't pad another row's cache. If memory still runs out, the longest row of the
group fails, and the engine computes the other rows again from their tokens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import psutil
import torch
import transformers

from heliostat.apps.serve import adapters as lora
from heliostat.apps.serve.adapters import Adapters
from heliostat.apps.serve.group import RowBatch
from heliostat.apps.serve.row import Deliver, Row, Telling, ending
from heliostat.errors import ConfigError
from heliostat.inference import sampling
from heliostat.inference.batch.engines import Embed, Input, LoadedModel, pads_hold
from heliostat.recipes.text.infilling import Infilling
from heliostat.text import brief

log = logging.getLogger(__name__)

SHARE = 0.4  # share of the free memory that the tokens of all rows may use: padding may double their size
SHORT = 64  # tokens: all lengths below this count as similar
NO_MEMORY = ("can't allocate memory", "out of memory")  # texts in torch's error messages, on a CPU or from a library


class ServingEngine:
    """Generates answers in its own thread, one token of each row per step, and embeds texts between two steps."""

    def __init__(self, loaded: LoadedModel, batch: int, adapters: Adapters | None = None) -> None:
        self.loaded, self.batch, self.adapters = loaded, batch, adapters
        self.embed = Embed(loaded, batch)
        writes = loaded.writes
        self.mixes = writes and pads_hold(self.embed)
        self.infilling = Infilling.of(loaded.tokenizer) if writes else None
        self.telling = Telling(loaded.tokenizer, ending(loaded, self.infilling) if writes else ())
        self.waiting: deque[Row] = deque()
        self.texts: deque[tuple[Sequence[str], Deliver]] = deque()
        self.groups: list[tuple[RowBatch, list[Row]]] = []
        self.memory = SHARE * _free(loaded.model.device)
        self.place_bytes: float | None = None  # bytes of one token in the cache; unknown before the first row
        self.work = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def require_alive(self) -> None:
        """Raises RuntimeError if the thread has ended."""
        if not self.thread.is_alive():
            raise RuntimeError("the engine's thread has ended. Read the log for the error")

    def begin(self, rows: Sequence[Row]) -> None:
        """Queues rows. The engine starts a row when the batch and the memory have room for it."""
        with self.work:
            self.waiting.extend(rows)
            self.work.notify()

    def embedded(self, texts: Sequence[str], deliver: Deliver) -> None:
        """Queues texts to embed. `deliver` is called once, with an item that contains `answers` or `failed`."""
        with self.work:
            self.texts.append((texts, deliver))
            self.work.notify()

    def _run(self) -> None:
        while True:
            with self.work:
                self.work.wait_for(lambda: self.waiting or self.texts or self.groups)
                texts = list(self.texts)
                self.texts.clear()
                new = self._admitted()
            with torch.inference_mode():
                if texts:
                    self._embed(texts)
                if new:
                    self._begin(new)
                for one in list(self.groups):
                    self._step(one)

    def _admitted(self) -> list[Row]:
        """Takes waiting rows of similar length from the queue, as many as fit into the batch and the memory.

        If padding would change this model's answers, all of these rows have the same length. A row that needs more memory than is
        free waits, and so do all later rows. The waiting row starts when enough memory is free, or when no other row is running.
        """
        under_way = [row for _, rows in self.groups for row in rows]
        room, places = self.batch - len(under_way), sum(map(_places, under_way))
        taken, left = list[Row](), deque[Row]()
        while self.waiting and room > len(taken):
            row = self.waiting.popleft()
            if row.over:
                continue
            places += _places(row)
            if (under_way or taken) and not self._has_memory(places):
                left.append(row)
                break
            if taken and not (_near if self.mixes else int.__eq__)(_length(row), _length(taken[0])):
                places -= _places(row)
                left.append(row)
                continue
            taken.append(row)
        self.waiting.extendleft(reversed(left))
        return taken

    def _has_memory(self, places: int) -> bool:
        return self.place_bytes is not None and places * self.place_bytes <= self.memory

    def _begin(self, rows: list[Row]) -> None:
        try:
            prompts, names = [row.prompt + row.tokens for row in rows], [row.adapter for row in rows]
            group = RowBatch(self.loaded.model, prompts, self.loaded.pad, names, self.adapters)
        except Exception as e:  # noqa: BLE001 (a model can raise anything; the other rows continue)
            if len(rows) == 1:
                self._fail(rows, e)
                return
            for row in rows:
                self._begin([row])
            return
        self.place_bytes = max(self.place_bytes or 0.0, group.place_bytes)
        for one, others in self.groups:
            if self.mixes and group.plain and one.plain and _near(group.width, one.width):
                try:
                    one.join(group)
                except Exception as e:  # noqa: BLE001 (a model can raise anything; the groups stay separate)
                    log.warning(
                        "computing the new requests in a separate batch, because the running batch can't include them (%s: %s)",
                        type(e).__name__,
                        brief(e),
                    )
                    break
                others.extend(rows)
                return
        self.groups.append((group, rows))

    def _step(self, one: tuple[RowBatch, list[Row]]) -> None:
        """Draws the next token of each row of a group, and keeps the rows that haven't ended."""
        group, rows = one
        try:
            tokens = sampling.choose(group.logits, [row.draw for row in rows])
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if not row.over:
                    chosen = None if row.logprobs is None else sampling.logprobs(group.logits[place], token, row.logprobs)
                    self.telling.take(row, token, chosen)
            open_ = [place for place, row in enumerate(rows) if not row.over]
            if not open_:
                self.groups.remove(one)
                return
            if group.plain and len(open_) < len(rows):
                group.keep(open_)
                rows[:], tokens = [rows[place] for place in open_], [tokens[place] for place in open_]
            group.step(tokens)
        except Exception as e:  # noqa: BLE001 (a model can raise anything)
            self.groups.remove(one)
            failed = [row for row in rows if not row.over]
            if _no_memory(e) and failed:
                longest = max(failed, key=_length)
                failed.remove(longest)
                with self.work:
                    self.waiting.extendleft(reversed(failed))
                failed = [longest]
            self._fail(failed, e)

    def _embed(self, waiting: list[tuple[Sequence[str], Deliver]]) -> None:
        """Embeds the texts of several requests in one batch. If the batch fails, embeds the texts of each request separately."""
        try:
            vectors = iter(self.embed([Input(text, 0) for texts, _ in waiting for text in texts]))
            for texts, deliver in waiting:
                deliver({"answers": [next(vectors) for _ in texts]})
        except Exception as e:  # noqa: BLE001 (a model can raise anything)
            if len(waiting) == 1:
                waiting[0][1]({"failed": f"{type(e).__name__}: {brief(e)}"})
                return
            for one in waiting:
                self._embed([one])

    def _fail(self, rows: list[Row], error: Exception) -> None:
        log.error("%d requests failed (%s: %s)", len(rows), type(error).__name__, brief(error))
        for row in rows:
            row.fail(f"{type(error).__name__}: {brief(error)}")


def _length(row: Row) -> int:
    return len(row.prompt) + len(row.tokens)


def _places(row: Row) -> int:
    """Returns the maximum number of KV cache positions that a row needs: one per token of the prompt and the answer."""
    return len(row.prompt) + row.most


def _near(one: int, other: int) -> bool:
    """Returns whether rows of these lengths may share a group. In a group, padding at most doubles a row's size."""
    return max(one, other) <= 2 * max(min(one, other), SHORT)


def _free(device: torch.device) -> int:
    """Returns the free bytes of memory on the model's device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _no_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in NO_MEMORY)


class VllmEngine:
    """Generates answers with vLLM, which forms the batches, in the caller's event loop. It embeds no texts."""

    def __init__(self, folder: Path, batch: int, adapters: dict[str, str]) -> None:
        from heliostat.inference.vllm_engine import VllmStream

        self.loaded = LoadedModel(folder, weights=False)
        self.infilling = Infilling.of(self.loaded.tokenizer)
        self.telling = Telling(self.loaded.tokenizer, ending(self.loaded, self.infilling))
        known = {name: (place, lora.require(name, Path(place))["r"]) for name, place in adapters.items()}
        _require_fit(self.loaded.config, adapters)
        self.stream = VllmStream(folder, self.loaded, batch, known)
        self.tasks = set[asyncio.Task[None]]()

    def require_alive(self) -> None:
        """Raises vLLM's error if vLLM has died."""
        if self.stream.llm.errored:
            raise self.stream.llm.dead_error

    def begin(self, rows: Sequence[Row]) -> None:
        """Starts a task for each row, which generates the row's answer."""
        for row in rows:
            row.task = task = asyncio.get_running_loop().create_task(self._follow(row))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _follow(self, row: Row) -> None:
        """Reads tokens from vLLM until the answer ends, or the client leaves. If vLLM dies, ends this process."""
        tokens = self.stream.tokens(row.prompt, row.most, row.draw, self.telling.ends, row.logprobs, row.adapter)
        try:
            async with aclosing(tokens):
                async for token, chosen in tokens:
                    if not row.over:
                        self.telling.take(row, token, chosen)
                    if row.over:
                        return
        except Exception as e:  # noqa: BLE001 (vLLM can raise anything; the other rows continue)
            log.error("a request failed (%s: %s)", type(e).__name__, brief(e))
            if self.stream.llm.errored:
                log.critical("vLLM has died, so this replica stops. Other replicas answer the requests")
                os._exit(1)
            row.fail(f"{type(e).__name__}: {brief(e)}")


def _require_fit(config: transformers.PretrainedConfig, adapters: dict[str, str]) -> None:
    """Raises ConfigError if an adapter doesn't fit the model's shapes. vLLM would silently ignore the matrices that don't
    fit."""
    if adapters:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        for name, place in adapters.items():
            if lora.require(name, Path(place)).get("use_dora"):
                raise ConfigError(f"--adapter: {name}: {place}: vLLM doesn't support DoRA adapters. Use --engine transformers")
            lora.read(name, Path(place), model)
