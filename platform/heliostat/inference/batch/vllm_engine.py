"""Answers batches of texts with vLLM on a GPU: continues, chats, scores and embeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from heliostat.inference import vllm_terms
from heliostat.inference.batch.engines import Answer, BatchEngine, Chat, Continue, Embed, Input, LoadedModel, Score
from heliostat.inference.batch.settings import WRITES
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text.generator import Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput


class Described(LoadedModel):
    """Reads all that is known of a model, and its tokenizer, without its weights."""

    def load(self, folder: Path, head: type | None) -> None:
        self.folder = folder
        return

    def generation(self) -> transformers.GenerationConfig:
        """Reads how the folder's model is to generate; where it does not say, its configuration does, as transformers has it."""
        if not (self.folder / "generation_config.json").is_file():
            return transformers.GenerationConfig.from_model_config(self.config)
        return from_folder("model", transformers.GenerationConfig, self.folder)


class OnVllm:
    """Puts an engine's answers on vLLM, which makes batches of its own of all inputs of a piece."""

    loaded: LoadedModel
    longest: int | None
    batch: int

    def __init__(self, folder: Path, batch: int, *options: dict[str, object]) -> None:
        import vllm

        super().__init__(Described(folder), batch, *options)  # type: ignore[call-arg]
        self.llm = vllm.LLM(**vllm_terms.engine(folder, self.loaded.config, self.longest, batch), **self.kind())
        self.longest = self.loaded.longest = self.llm.model_config.max_model_len

    def kind(self) -> dict[str, object]:
        """Returns what vLLM is made with beside what all engines have."""
        return {}

    def rows(self, longest: int) -> int:
        return 1 << 30

    def apart(self, one: int, other: int) -> bool:
        return False

    def run(self, tokens: Sequence[list[int]], asked: Sequence[dict[str, object]]) -> list[RequestOutput]:
        """Returns what vLLM says of each prompt."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": one} for one in tokens]
        return self.llm.generate(prompts, [SamplingParams(**one) for one in asked], use_tqdm=False)


class Written(OnVllm):
    sampling: Sampling
    ends: list[int]
    read: Callable[[list[int]], Answer]

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        s = self.sampling
        asked = [vllm_terms.sampling(s.max_tokens, s.temperature, s.top_p, one.seed, self.ends) for one in inputs]
        return [self.read(list(out.outputs[0].token_ids)) for out in self.run(tokens, asked)]


class VllmContinue(Written, Continue):
    """Continues prompts."""


class VllmChat(Written, Chat):
    """Answers chats."""


class VllmScore(OnVllm, Score):
    """Scores texts; one of as many tokens as the model takes loses its last, for vLLM draws a token behind each."""

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [row if self.longest is None else row[: self.longest - 1] for row in tokens]
        outputs = self.run(cut, [vllm_terms.scoring()] * len(cut))
        nats = [vllm_terms.nats(row, out.prompt_logprobs) for row, out in zip(cut, outputs, strict=True)]
        return [self.read(*row) for row in zip(nats, cut, tokens, inputs, strict=True)]


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


def engine(folder: Path, task: str, batch: int, options: dict[str, object]) -> Callable[[Sequence[Input]], list[Answer]]:
    """Loads a model for a task."""
    return KINDS[task](folder, batch, *([options] if task in WRITES else []))
