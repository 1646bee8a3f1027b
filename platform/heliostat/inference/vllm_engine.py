"""Answers with vLLM on a GPU: batches of texts, and requests that come and go.

Tokens go in and tokens come out: prompts, chat templates, ends, stop strings and texts are the same code with either engine. An
answer's noise is vLLM's own, of the input's seed; a reported probability is the model's, before temperature and `top_p`.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from heliostat.errors import ConfigError, HeliostatError
from heliostat.inference.batch.engines import Answer, BatchEngine, Chat, Continue, Embed, Input, LoadedModel, Score
from heliostat.inference.sampling import MOST_LOGPROBS, WRITES, Chosen, Draw
from heliostat.recipes.text.generator import Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput, TokensPrompt
    from vllm.logprobs import Logprob

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, for which it has kernels
os.environ["VLLM_NO_USAGE_STATS"] = "1"  # before it is imported: it would tell its makers of the machine and the model


def architectures() -> Collection[str]:
    """Lists the architectures of models that vLLM has."""
    from vllm import ModelRegistry

    return ModelRegistry.get_supported_archs()


def engine_options(
    folder: Path, config: PretrainedConfig, longest: int | None, batch: int, ranks: Sequence[int] = ()
) -> dict[str, object]:
    """Returns what the engine of a folder's model is made with: weights in their own precision, no code and no sampling of the
    folder's. `ranks`: of the adapters that it is to hold."""
    adapters = {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": rank(max(ranks))} if ranks else {}
    return {
        "model": str(folder.absolute()), "dtype": str(config.dtype or "float32").removeprefix("torch."), "max_model_len": longest,
        "max_num_seqs": batch, "trust_remote_code": False, "generation_config": "vllm", "max_logprobs": MOST_LOGPROBS,
        "logprobs_mode": "raw_logprobs", "disable_log_stats": True, **adapters,
    }  # fmt: skip


def rank(most: int) -> int:
    """Returns the least rank of its kernels that adapters of this rank fit; ConfigError if there is none."""
    if most > RANKS[-1]:
        raise ConfigError(f"--adapter: vLLM supports adapters up to rank {RANKS[-1]}, not {most}. Use --engine transformers")
    return next(one for one in RANKS if one >= most)


def sampling(
    most: int, temperature: float, top_p: float, seed: int, ends: Iterable[int], logprobs: int | None = None
) -> dict[str, object]:
    """Returns the keys of `SamplingParams` by which `most` tokens are drawn, each draw of this seed alone; none but `ends`
    end them."""
    return {
        "max_tokens": most, "temperature": temperature, "top_p": top_p, "seed": seed % 2**63, "stop_token_ids": sorted(ends),
        "ignore_eos": True, "logprobs": logprobs, "detokenize": False,
    }  # fmt: skip


def scoring() -> dict[str, object]:
    """Returns the keys of `SamplingParams` by which a prompt's tokens are scored; one token is drawn, for there is no less."""
    return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}


def nats(tokens: Sequence[int], scored: Sequence[Mapping[int, Logprob] | None]) -> float:
    """Adds up the negative log-likelihoods of a prompt's tokens behind the first; ValueError if one is missing."""
    if len(scored) != len(tokens):
        raise ValueError(f"vLLM scored {len(scored)} of {len(tokens)} tokens")
    known = [at[token].logprob for token, at in zip(tokens[1:], scored[1:], strict=True) if at is not None and token in at]
    if len(known) != len(tokens) - 1:
        raise ValueError(f"vLLM scored {len(known)} of {len(tokens) - 1} tokens")
    return -math.fsum(known)


def probabilities(at: Mapping[int, Logprob], token: int, most: int) -> Chosen:
    """Returns the logarithm of the chosen token's probability, and the `most` likeliest, as the endpoint tells them."""
    best = sorted(((other, one.logprob) for other, one in at.items()), key=lambda pair: (-pair[1], pair[0]))
    return {"chosen": at[token].logprob, "best": best[:most]}


class VllmStream:
    """Draws the tokens of prompts that come and go, in the event loop that asks. `adapters`: folders and ranks, by name."""

    def __init__(self, folder: Path, loaded: LoadedModel, batch: int, adapters: Mapping[str, tuple[str, int]]) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        options = engine_options(folder, loaded.config, loaded.longest, batch, [rank for _, rank in adapters.values()])
        self.adapters = {name: LoRARequest(name, i, place) for i, (name, (place, _)) in enumerate(adapters.items(), 1)}
        self.params = vllm.SamplingParams
        self.llm = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**options))
        loaded.longest = self.llm.model_config.max_model_len

    async def tokens(
        self, prompt: list[int], most: int, draw: Draw, ends: Collection[int], logprobs: int | None, adapter: str | None
    ) -> AsyncGenerator[tuple[int, Chosen | None]]:
        """Yields the tokens of an answer as they come, each with its log probabilities where these are asked for.

        HeliostatError if vLLM gives no more before one of `ends` or the last of `most` tokens was taken.
        """
        params = self.params(**sampling(most, draw.temperature, draw.top_p, draw.seed, ends, logprobs))
        prompt_tokens: TokensPrompt = {"prompt_token_ids": prompt}
        lora = self.adapters[adapter] if adapter else None
        sent, said = 0, None
        async with aclosing(self.llm.generate(prompt_tokens, params, uuid.uuid4().hex, lora_request=lora)) as outputs:
            async for out in outputs:
                written = out.outputs[0]  # all tokens so far
                for place in range(sent, len(written.token_ids)):
                    token, at = written.token_ids[place], written.logprobs[place] if logprobs is not None else None
                    yield token, None if logprobs is None or at is None else probabilities(at, token, logprobs)
                sent, said = len(written.token_ids), written.finish_reason
        raise HeliostatError(f"vLLM stopped the answer before its end ({said})")


class OnVllm:
    """Puts an engine's answers on vLLM, which makes batches of its own of all inputs of a piece."""

    loaded: LoadedModel
    longest: int | None
    batch: int

    def __init__(self, folder: Path, batch: int, *more: dict[str, object]) -> None:
        import vllm

        super().__init__(LoadedModel(folder, weights=False), batch, *more)  # type: ignore[call-arg]
        self.llm = vllm.LLM(**engine_options(folder, self.loaded.config, self.longest, batch), **self.kind())
        self.longest = self.loaded.longest = self.llm.model_config.max_model_len

    def kind(self) -> dict[str, object]:
        """Returns what vLLM is made with next to what all engines have."""
        return {}

    def rows(self, longest: int) -> int:
        return 1 << 30

    def apart(self, one: int, other: int) -> bool:
        return False

    def run(self, tokens: Sequence[list[int]], samplings: Sequence[dict[str, object]]) -> list[RequestOutput]:
        """Returns what vLLM says of each prompt."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": one} for one in tokens]
        return self.llm.generate(prompts, [SamplingParams(**one) for one in samplings], use_tqdm=False)


class Written(OnVllm):
    sampling: Sampling
    ends: list[int]
    read: Callable[[list[int]], Answer]

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        s = self.sampling
        samplings = [sampling(s.max_tokens, s.temperature, s.top_p, one.seed, self.ends) for one in inputs]
        return [self.read(list(out.outputs[0].token_ids)) for out in self.run(tokens, samplings)]


class VllmContinue(Written, Continue):
    """Continues prompts."""


class VllmChat(Written, Chat):
    """Answers chats."""


class VllmScore(OnVllm, Score):
    """Scores texts; one of as many tokens as the model takes loses its last, for vLLM draws a token behind each."""

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [row if self.longest is None else row[: self.longest - 1] for row in tokens]
        scores = [nats(row, out.prompt_logprobs) for row, out in zip(cut, self.run(cut, [scoring()] * len(cut)), strict=True)]
        return [self.read(*row) for row in zip(scores, cut, tokens, inputs, strict=True)]


class VllmEmbed(OnVllm, Embed):
    """Embeds texts."""

    def kind(self) -> dict[str, object]:
        from vllm.config import PoolerConfig

        pooler = PoolerConfig(seq_pooling_type=self.loaded.pooling.upper(), use_activation=True)  # of length 1
        return {"runner": "pooling", "convert": "embed", "pooler_config": pooler}

    def vectors(self, cut: list[list[int]]) -> Sequence[object]:
        return [out.outputs.embedding for out in self.llm.embed([{"prompt_token_ids": row} for row in cut], use_tqdm=False)]


KINDS: dict[str, Callable[..., BatchEngine]] = {
    "continue": VllmContinue,
    "chat": VllmChat,
    "score": VllmScore,
    "embed": VllmEmbed,
}


def engine(folder: Path, task: str, batch: int, options: dict[str, object]) -> BatchEngine:
    """Loads a model for a task."""
    return KINDS[task](folder, batch, *([options] if task in WRITES else []))
