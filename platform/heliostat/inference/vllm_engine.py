"""Runs models with vLLM on a GPU. Batch inference and the endpoint use this module.

vLLM's input and output are token ids. vLLM and transformers use the same code for prompts, chat templates, end tokens, stop
strings, and decoding. vLLM draws its own random noise, from the input's seed. Reported probabilities are the model's
probabilities, before temperature and `top_p`.
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
from heliostat.recipes.folder_weights import stored_dtype
from heliostat.recipes.precision import compute_dtype
from heliostat.recipes.text.generator import Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput, TokensPrompt
    from vllm.logprobs import Logprob

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks of adapters that vLLM's kernels support
os.environ["VLLM_NO_USAGE_STATS"] = "1"  # before vLLM's import, or vLLM reports the machine and model to its developers


def architectures() -> Collection[str]:
    """Lists the model architectures that vLLM supports."""
    from vllm import ModelRegistry

    return ModelRegistry.get_supported_archs()


def engine_options(
    folder: Path, config: PretrainedConfig, longest: int | None, batch: int, ranks: Sequence[int] = ()
) -> dict[str, object]:
    """Returns the arguments of a vLLM engine for a folder's model. vLLM computes in the same type as transformers
    (`compute_dtype`), and ignores the folder's code and its sampling settings. `ranks`: ranks of the adapters to load."""
    chosen = compute_dtype(folder)
    dtype = (config.dtype or stored_dtype(folder)) if chosen == "auto" else chosen  # with auto, vLLM computes fp32 in fp16
    adapters = {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": rank(max(ranks))} if ranks else {}
    return {
        "model": str(folder.absolute()), "dtype": str(dtype).removeprefix("torch."), "max_model_len": longest,
        "max_num_seqs": batch, "trust_remote_code": False, "generation_config": "vllm", "max_logprobs": MOST_LOGPROBS,
        "logprobs_mode": "raw_logprobs", "disable_log_stats": True, **adapters,
    }  # fmt: skip


def rank(most: int) -> int:
    """Returns the smallest LoRA rank that vLLM supports and that is at least `most`. Raises ConfigError if no supported rank is
    large enough."""
    if most > RANKS[-1]:
        raise ConfigError(f"--adapter: vLLM supports adapters up to rank {RANKS[-1]}, not {most}. Use --engine transformers")
    return next(one for one in RANKS if one >= most)


def sampling(
    most: int, temperature: float, top_p: float, seed: int, ends: Iterable[int], logprobs: int | None = None
) -> dict[str, object]:
    """Returns arguments of `SamplingParams` that sample at most `most` tokens with this seed. Only the tokens in `ends` end an
    answer."""
    return {
        "max_tokens": most, "temperature": temperature, "top_p": top_p, "seed": seed % 2**63, "stop_token_ids": sorted(ends),
        "ignore_eos": True, "logprobs": logprobs, "detokenize": False,
    }  # fmt: skip


def scoring() -> dict[str, object]:
    """Returns arguments of `SamplingParams` that score a prompt's tokens. vLLM also generates one token, because one is its
    minimum."""
    return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}


def nats(tokens: Sequence[int], scored: Sequence[Mapping[int, Logprob] | None]) -> float:
    """Returns the sum of the negative log-likelihoods, in nats, of a prompt's tokens after the first token. Raises ValueError
    if a token's log-likelihood is missing."""
    if len(scored) != len(tokens):
        raise ValueError(f"vLLM scored only {len(scored)} of {len(tokens)} tokens of the prompt")
    known = [at[token].logprob for token, at in zip(tokens[1:], scored[1:], strict=True) if at is not None and token in at]
    if len(known) != len(tokens) - 1:
        raise ValueError(f"vLLM scored only {len(known)} of {len(tokens) - 1} tokens of the prompt")
    return -math.fsum(known)


def probabilities(at: Mapping[int, Logprob], token: int, most: int) -> Chosen:
    """Returns the log probabilities of the sampled token and of the `most` likeliest tokens, in the endpoint's format."""
    best = sorted(((other, one.logprob) for other, one in at.items()), key=lambda pair: (-pair[1], pair[0]))
    return {"chosen": at[token].logprob, "best": best[:most]}


class VllmStream:
    """Generates the tokens of concurrent prompts in the caller's event loop. `adapters` maps a name to (folder, rank)."""

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
        """Yields the tokens of an answer as vLLM generates them, each with its log probabilities if `logprobs` isn't None.

        Raises HeliostatError if vLLM stops before it generates a token of `ends` or `most` tokens.
        """
        params = self.params(**sampling(most, draw.temperature, draw.top_p, draw.seed, ends, logprobs))
        prompt_tokens: TokensPrompt = {"prompt_token_ids": prompt}
        lora = self.adapters[adapter] if adapter else None
        sent, said = 0, None
        async with aclosing(self.llm.generate(prompt_tokens, params, uuid.uuid4().hex, lora_request=lora)) as outputs:
            async for out in outputs:
                written = out.outputs[0]  # each output contains all tokens so far
                for place in range(sent, len(written.token_ids)):
                    token, at = written.token_ids[place], written.logprobs[place] if logprobs is not None else None
                    yield token, None if logprobs is None or at is None else probabilities(at, token, logprobs)
                sent, said = len(written.token_ids), written.finish_reason
        raise HeliostatError(f"vLLM stopped the answer before its end ({said})")


class OnVllm:
    """Runs a batch engine's task on vLLM. vLLM gets all inputs of a Ray task at once, and forms its own batches."""

    loaded: LoadedModel
    longest: int | None
    batch: int

    def __init__(self, folder: Path, batch: int, *more: dict[str, object]) -> None:
        import vllm

        super().__init__(LoadedModel(folder, weights=False), batch, *more)  # type: ignore[call-arg]
        self.llm = vllm.LLM(**engine_options(folder, self.loaded.config, self.longest, batch), **self.kind())
        self.longest = self.loaded.longest = self.llm.model_config.max_model_len

    def kind(self) -> dict[str, object]:
        """Returns the arguments of `vllm.LLM` that only this task needs."""
        return {}

    def rows(self, longest: int) -> int:
        return 1 << 30

    def apart(self, one: int, other: int) -> bool:
        return False

    def run(self, tokens: Sequence[list[int]], samplings: Sequence[dict[str, object]]) -> list[RequestOutput]:
        """Returns vLLM's output for each prompt."""
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
    """Continues prompts with vLLM."""


class VllmChat(Written, Chat):
    """Answers chats with vLLM."""


class VllmScore(OnVllm, Score):
    """Scores texts. If a text is as long as the model's maximum, its last token isn't scored, because vLLM generates one token
    after each prompt."""

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [row if self.longest is None else row[: self.longest - 1] for row in tokens]
        scores = [nats(row, out.prompt_logprobs) for row, out in zip(cut, self.run(cut, [scoring()] * len(cut)), strict=True)]
        return [self.read(*row) for row in zip(scores, cut, tokens, inputs, strict=True)]


class VllmEmbed(OnVllm, Embed):
    """Embeds texts with vLLM."""

    def kind(self) -> dict[str, object]:
        from vllm.config import PoolerConfig

        pooler = PoolerConfig(seq_pooling_type=self.loaded.pooling.upper(), use_activation=True)  # normalized to length 1
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
    """Loads a model for a task on vLLM."""
    return KINDS[task](folder, batch, *([options] if task in WRITES else []))
