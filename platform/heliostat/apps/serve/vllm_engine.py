"""Answers requests with vLLM on a GPU, which makes the batches: rows come and go as with the other engine."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from heliostat.apps.serve import adapters as lora
from heliostat.apps.serve.row import Deliver, Row, Telling, ending
from heliostat.errors import HeliostatError
from heliostat.inference import vllm_terms
from heliostat.inference.batch.vllm_engine import Described
from heliostat.recipes.text.infilling import Infilling
from heliostat.text import brief

if TYPE_CHECKING:
    from vllm import TokensPrompt
    from vllm.logprobs import Logprob

log = logging.getLogger(__name__)


class VllmEngine:
    """Answers rows in the event loop that asks; embeds nothing."""

    embeds = False

    def __init__(self, folder: Path, batch: int, adapters: dict[str, str]) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        self.loaded = Described(folder)
        self.infilling = Infilling.of(self.loaded.tokenizer)
        self.telling = Telling(self.loaded.tokenizer, ending(self.loaded, self.infilling))
        ranks = [lora.require(name, Path(place))["r"] for name, place in adapters.items()]
        _require_fit(self.loaded.config, adapters)
        asked = vllm_terms.engine(folder, self.loaded.config, self.loaded.longest, batch, ranks)
        self.params = vllm.SamplingParams
        self.adapters = {name: LoRARequest(name, i, place) for i, (name, place) in enumerate(adapters.items(), 1)}
        self.llm = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**asked))
        self.loaded.longest = self.llm.model_config.max_model_len
        self.tasks = set[asyncio.Task[None]]()

    def require_alive(self) -> None:
        """Raises if vLLM has died."""
        if self.llm.errored:
            raise self.llm.dead_error

    def begin(self, rows: Sequence[Row]) -> None:
        """Takes rows; each is followed to its end."""
        for row in rows:
            row.task = task = asyncio.get_running_loop().create_task(self._follow(row))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def embedded(self, texts: Sequence[str], deliver: Deliver) -> None:
        """Embeds nothing."""
        raise NotImplementedError

    async def _follow(self, row: Row) -> None:
        try:
            await self._answer(row)
        except Exception as e:  # noqa: BLE001 (whatever vLLM raises: the others go on)
            log.error("a request failed (%s: %s)", type(e).__name__, brief(e))
            if self.llm.errored:
                log.critical("vLLM has died, and this replica ends: another one answers")
                os._exit(1)
            row.fail(f"{type(e).__name__}: {brief(e)}")

    async def _answer(self, row: Row) -> None:
        """Draws tokens until the answer is over, or nobody waits for it."""
        draw, sent, said = row.draw, 0, None
        asked = vllm_terms.sampling(row.most, draw.temperature, draw.top_p, draw.seed, self.telling.ends, row.logprobs)
        adapter = self.adapters[row.adapter] if row.adapter else None
        prompt: TokensPrompt = {"prompt_token_ids": row.prompt}
        outputs = self.llm.generate(prompt, self.params(**asked), uuid.uuid4().hex, lora_request=adapter)
        async with aclosing(outputs):
            async for out in outputs:
                written = out.outputs[0]  # all tokens so far
                for place in range(sent, len(written.token_ids)):
                    if row.over:
                        return
                    self._take(row, written.token_ids[place], written.logprobs[place] if row.logprobs is not None else None)
                sent, said = len(written.token_ids), written.finish_reason
                if row.over:
                    return
        raise HeliostatError(f"vLLM ended the answer before its end ({said})")

    def _take(self, row: Row, token: int, at: Mapping[int, Logprob] | None) -> None:
        chosen = None if row.logprobs is None or at is None else vllm_terms.probabilities(at, token, row.logprobs)
        self.telling.take(row, token, chosen)


def _require_fit(config: transformers.PretrainedConfig, adapters: dict[str, str]) -> None:
    """Holds adapters against the model's shapes, for vLLM leaves out silently what does not fit; ConfigError of such a one."""
    if adapters:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        for name, place in adapters.items():
            lora.read(name, Path(place), model)
