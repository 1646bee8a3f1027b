"""Chooses and loads a model's engine: transformers or vLLM. If the model doesn't support the task, rejects the task before
anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat import extras
from heliostat.curation import scoring
from heliostat.errors import ConfigError
from heliostat.inference.sampling import WRITES
from heliostat.recipes import exported
from heliostat.recipes.conformance import is_language_model
from heliostat.recipes.images import clip_folder
from heliostat.recipes.text import sentence_folder
from heliostat.text import brief

if TYPE_CHECKING:
    from heliostat.inference.batch.engines import Answer, Input

HEAD = "ForSequenceClassification"
LEAST_LABELS = 2  # with a single label, the output is a score, not a class
ENGINES = ("auto", "transformers", "vllm")
OF_VLLM = ("continue", "chat", "score", "embed", "serve")


def choose(name: str, folder: Path, task: str, gpus: int, known: Callable[[], Collection[str]] | None = None) -> tuple[str, str]:
    """Returns the engine's name and a text. The text is the version of the chosen engine. If `name` is auto and vLLM can't be
    used, the text is the reason. Raises ConfigError if `name` is vllm and vLLM doesn't support the task.

    `known`: a function that lists the architectures that vLLM supports; by default, a function that imports vLLM.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine: {name!r} isn't an engine. Use {', '.join(ENGINES)}")
    if name == "transformers":
        return name, version("transformers")
    if name == "vllm":
        extras.require("vllm", "vllm", what="--engine vllm")
    if not (lacks := _lacks(folder, task, gpus, known or _architectures)):
        return "vllm", version("vllm")
    if name == "vllm":
        raise ConfigError(f"--engine vllm: {lacks}. Use --engine transformers")
    return "transformers", lacks


def _lacks(folder: Path, task: str, gpus: int, known: Callable[[], Collection[str]]) -> str:
    """Returns the reason why vLLM can't run the task with this model; "" if vLLM can run the task."""
    if task not in OF_VLLM:
        return f"heliostat doesn't support vLLM for the task {task}"
    if clip_folder.is_one(folder):
        return "heliostat doesn't support vLLM for CLIP embeddings"
    if not gpus:
        return "this machine has no GPU"
    if find_spec("vllm") is None:
        return f"vLLM isn't installed ({extras.command('vllm')})"
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    named = config.get("architectures") or ["a model whose config.json has no architectures"]
    return "" if named[0] in known() else f"vLLM doesn't support {named[0]}"


def _architectures() -> Collection[str]:
    from heliostat.inference import vllm_engine

    return vllm_engine.architectures()


def require(folder: Path, task: str, options: dict[str, object] | None = None) -> dict[str, object]:
    """Checks that a model supports a task with these options; raises ConfigError if the model doesn't support them. Returns
    additional facts for `inference.json`, such as the labels."""
    if task == "classify":
        return {"labels": _labels(folder)}
    if clip_folder.is_one(folder):
        if task not in ("embed", "embed-images"):
            raise ConfigError(f"--task {task}: not supported for a CLIP model ({folder}). Use --task embed or embed-images")
    elif task == "embed-images":
        raise ConfigError(
            f"--task {task}: {folder} isn't a CLIP model. Use a model that heliostat.recipes:ImageEmbedder exported"
        )
    elif sentence_folder.read(folder):
        if task != "embed":
            raise ConfigError(f"--task {task}: {folder} is an embedder. Use --task embed")
    elif not is_language_model(exported.read(folder).recipe):
        raise ConfigError(
            f"{folder}: isn't a language model. To generate images from prompts: heliostat model generate --prompts"
        )
    if task == "chat":
        _require_template(folder)
    if task in WRITES:
        from heliostat.inference.batch.engines import sampling

        sampling(options or {}, _longest(folder))
    return {}


def _longest(folder: Path) -> int | None:
    """Returns the maximum tokens of a model's input; None if there is no limit. Doesn't read the model's weights.

    Raises ConfigError if the model's tokenizer or config.json can't be read.
    """
    from heliostat.inference.batch.engines import LoadedModel

    try:
        return LoadedModel(folder, weights=False).longest
    except ConfigError:
        raise
    except (OSError, ValueError) as e:  # transformers raises them
        raise ConfigError(f"{folder}: can't read its tokenizer or config.json ({brief(e)}). Copy the folder again") from e


def _labels(folder: Path) -> list[str]:
    config = scoring.describe(str(folder), "--task classify")
    named = (config.get("architectures") or ["a model whose config.json has no architectures"])[0]
    if not str(named).endswith(HEAD):
        raise ConfigError(
            f"--task classify: {folder} contains {named}, which has no classification head. Use a model whose "
            f"class name ends with {HEAD}"
        )
    if config.get("problem_type") == "regression":
        raise ConfigError(f"--task classify: {folder} has problem_type regression, which has no classes. Use a classifier")
    if len(labels := scoring.labels(config)) < LEAST_LABELS:
        raise ConfigError(f"--task classify: {folder} has one label ({labels[0]}). Use a model with several labels")
    return labels


def _require_template(folder: Path) -> None:
    import transformers

    from heliostat.recipes.pretrained import from_folder

    if not from_folder("model", transformers.AutoTokenizer, folder).chat_template:
        raise ConfigError(f"--task chat: the tokenizer of {folder} has no chat template. Use --task continue")


def engine(
    folder: Path, task: str, batch: int, options: dict[str, object], by: str = "transformers"
) -> Callable[[Sequence[Input]], list[Answer]]:
    """Loads a model for a task, on transformers or vLLM (`by`)."""
    if by == "vllm":
        from heliostat.inference import vllm_engine

        return vllm_engine.engine(folder, task, batch, options)
    from heliostat.inference.batch import engines

    if task == "embed-images":
        from heliostat.inference.batch.images import EmbedImages

        return EmbedImages(folder, batch)
    if task in WRITES:
        return {"continue": engines.Continue, "chat": engines.Chat}[task](folder, batch, options)
    kinds: dict[str, type[engines.BatchEngine]] = {"score": engines.Score, "embed": engines.Embed, "classify": engines.Classify}
    return kinds[task](folder, batch)
