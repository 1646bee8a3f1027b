"""Says when vLLM answers, and translates what is asked of it, and what it gives, in pure functions.

Tokens go in and tokens come out: prompts, chat templates, ends, stop strings and texts are the same code with either engine. An
answer's noise is vLLM's own, of the input's seed; a probability that is told is the model's, before temperature and `top_p`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from heliostat import extras
from heliostat.errors import ConfigError
from heliostat.recipes.images import clip_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.logprobs import Logprob

ENGINES = ("auto", "transformers", "vllm")
TASKS = ("continue", "chat", "score", "embed", "serve")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, for which it has kernels
MOST_LOGPROBS = 20  # of a token
os.environ["VLLM_NO_USAGE_STATS"] = "1"  # before it is imported: it would tell its makers of the machine and the model


class Chosen(TypedDict):
    """Holds the log probability of a token that was chosen, and those of the likeliest with their ids."""

    chosen: float
    best: list[tuple[int, float]]


def choose(asked: str, folder: Path, task: str, gpus: int, known: Callable[[], Collection[str]] | None = None) -> tuple[str, str]:
    """Returns the engine that answers, and why, or in what version; ConfigError if vLLM is asked for, and does not.

    `known`: lists the architectures that vLLM has; by default itself.
    """
    if asked not in ENGINES:
        raise ConfigError(f"--engine: {asked!r} is none of {', '.join(ENGINES)}")
    if asked == "transformers":
        return asked, version("transformers")
    if asked == "vllm":
        extras.require("vllm", "vllm", what="--engine vllm")
    if not (lacks := _lacks(folder, task, gpus, known or _architectures)):
        return "vllm", version("vllm")
    if asked == "vllm":
        raise ConfigError(f"--engine vllm: {lacks}; give --engine transformers")
    return "transformers", lacks


def _lacks(folder: Path, task: str, gpus: int, known: Callable[[], Collection[str]]) -> str:
    """Returns why vLLM does not answer; "" if it does."""
    if task not in TASKS:
        return f"vLLM does not {task} here"
    if clip_folder.is_one(folder):
        return "vLLM does not embed with a CLIP here"
    if not gpus:
        return "there is no GPU here"
    if find_spec("vllm") is None:
        return f"vLLM is not installed, which comes with {extras.advice('vllm')}"
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    named = config.get("architectures") or ["a model that its config.json does not name"]
    return "" if named[0] in known() else f"vLLM has no {named[0]}"


def _architectures() -> Collection[str]:
    from vllm import ModelRegistry

    return ModelRegistry.get_supported_archs()


def engine(
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
        raise ConfigError(f"--adapter: vLLM has adapters of rank {RANKS[-1]} at most, not {most}; give --engine transformers")
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
        raise ValueError(f"vLLM has scored {len(scored)} of {len(tokens)} tokens")
    known = [at[token].logprob for token, at in zip(tokens[1:], scored[1:], strict=True) if at is not None and token in at]
    if len(known) != len(tokens) - 1:
        raise ValueError(f"vLLM has scored {len(known)} of {len(tokens) - 1} tokens")
    return -math.fsum(known)


def probabilities(at: Mapping[int, Logprob], token: int, most: int) -> Chosen:
    """Returns the logarithm of the chosen token's probability, and the `most` likeliest, as the endpoint tells them."""
    best = sorted(((other, one.logprob) for other, one in at.items()), key=lambda pair: (-pair[1], pair[0]))
    return {"chosen": at[token].logprob, "best": best[:most]}
